"""Who trains on which version of the model, and what is aggregated when: steps of virtual time.

A schedule knows nothing of models. Whoever carries it out asks for the next step, trains and
encodes, and says how many bytes each client sends, since its upload takes as long as they do::

    schedule = make_schedule(FedBuff(buffer=10, concurrency=40), traces, ...)
    while step := schedule.next():
        if isinstance(step, Start):
            for client, payload in train_and_encode(step.clients, models[step.version]):
                payloads[client] = payload
                schedule.sent(client, len(payload))
        elif isinstance(step, Lost):
            drop(payloads, step.clients)
        else:
            models[step.version] = aggregate(models, payloads, step)
        models = {version: models[version] for version in schedule.alive}

A client has one piece of work at a time: from when it loads the model until its update is
aggregated or lost. Each ends up in exactly one :class:`Aggregate` or :class:`Lost`, unless the
schedule ends before.
"""

import abc
import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from commrt.errors import ConfigError, StateError
from commrt.simulation.clock import Clock, Event
from commrt.simulation.flights import Flight, Flights
from commrt.simulation.steps import Aggregate, Lost, Start, Step, Update, from_state, to_state
from commrt.simulation.traces import Traces, uniform

# After so many in a row without an aggregation something must be wrong with the settings.
MOST_EVENTS = 1_000_000
# The same of updates in a row that nobody can send: training diverges.
MOST_FAILED = 1000


class Schedule(abc.ABC):
    """What all policies share: the clock, who is idle, who is at work, what has arrived.

    Args:
        settings: Of the policy.
        traces: Of the clients.
        examples: By client, on how many it trains in one piece of work, each epoch counted; 0 for
            one that has none.
        down_bytes: What a client loads before.
        importance: By client, positive: its share in the objective once they are made to add up to
            one. Default, equal ones.
        seed: Of the sampling.
        aggregations: After how many the schedule ends.
        until_s: At what time it ends.

    Raises:
        ConfigError: A value is out of range; names it.
    """

    mixes = False

    def __init__(
        self,
        settings: object,
        traces: Traces,
        *,
        examples: Sequence[float],
        down_bytes: int,
        importance: Sequence[float] | None,
        seed: int,
        aggregations: int,
        until_s: float,
    ) -> None:
        shares = [1.0] * traces.num_clients if importance is None else list(importance)
        _require("examples", examples, traces.num_clients, least=0.0)
        _require("importance", shares, traces.num_clients, least=math.ulp(0.0))
        if down_bytes < 0 or aggregations < 1 or not until_s > 0:
            raise ConfigError(
                f"down_bytes is {down_bytes}, aggregations {aggregations} and until_s {until_s}: "
                "they must be at least 0, at least 1 and above 0"
            )
        self._settings = repr(settings)
        self._traces = traces
        self._examples = examples
        self._down_bytes = down_bytes
        total = math.fsum(shares)
        self._importance = [share / total for share in shares]
        self._seed = seed
        self._aggregations = aggregations
        self._until_s = until_s
        self._clock = Clock()
        self._has_begun = False
        self._counts = {"version": 0, "work": 0, "draw": 0, "start": 0}
        self._counts |= {"uneventful": 0, "failed in a row": 0}
        self._idle = list(range(traces.num_clients))
        self._flights = Flights(keep_models=self.mixes)
        self._asked: set[int] = set()
        self._arrived: dict[int, int] = {}
        self._steps: deque[Step] = deque()

    # What is carried out

    def next(self) -> Step | None:
        """The next step; None at the end.

        Raises:
            StateError: ``sent`` was not called for all that started; or a million events went by,
                or a policy's own limit, without an aggregation.
        """
        if self._asked:
            raise StateError(f"clients {sorted(self._asked)} have started: call sent() for each")
        if not self._has_begun:
            self._has_begun = True
            self._begin()
        while not self._steps and self.ended is None:
            self._advance()
        if not self._steps:
            return None
        step = self._steps.popleft()
        if isinstance(step, Start):
            self._asked = set(step.clients)
        return step

    def sent(self, client: int, up_bytes: int) -> None:
        """A client that started has encoded its update: how large it is.

        Raises:
            StateError: It did not start, or this was said before.
        """
        flight = self._answer(client)
        self._counts["failed in a row"] = 0
        finish = self._traces.resize(client, flight.finish, up_bytes)
        if finish.lost_s is None:
            self._clock.add(Event(finish.uploaded_s, client, "arrival", flight.work))
        else:
            self._clock.add(Event(finish.lost_s, client, str(finish.reason), flight.work))

    def failed(self, client: int) -> None:
        """A client that started has no update to send, such as one that is not finite.

        Raises:
            StateError: It did not start, or ``sent`` was called; or it is the thousandth in a row.
        """
        flight = self._answer(client)
        if self._count("failed in a row") + 1 == MOST_FAILED:
            raise StateError(
                f"the last {MOST_FAILED} updates were none that could be sent, such as those that "
                "are not finite: training diverges"
            )
        self._clock.add(Event(flight.finish.uploaded_s, client, "failed", flight.work))

    @property
    def ended(self) -> str | None:
        """Why there are no further steps: ``"aggregations"``, ``"time"``, ``"clients"`` or None.

        With ``"clients"`` nobody is at work and nobody will ever come.
        """
        if self._steps or not self._has_begun:
            return None
        if self._newest >= self._aggregations:
            return "aggregations"
        next_s = min(self._due_s, self._clock.next_s)
        if next_s <= self._until_s and next_s < math.inf:
            return None
        return "time" if self._flights.any_waits or self._clock.next_s < math.inf else "clients"

    @property
    def version(self) -> int:
        """Of the newest model: how many aggregations were returned."""
        return self._newest - sum(isinstance(step, Aggregate) for step in self._steps)

    @property
    def _newest(self) -> int:
        """The same, and those that will be returned before time goes on."""
        return self._counts["version"]

    @property
    def now_s(self) -> float:
        """The time of what happened last."""
        return self._clock.now_s

    @property
    def at_work(self) -> tuple[int, ...]:
        """Who has begun and not yet arrived or been lost, in ascending order."""
        return tuple(sorted(self._flights))

    @property
    def alive(self) -> tuple[int, ...]:
        """The versions that are still needed once the step returned last is carried out."""
        return tuple(
            sorted(v for v in {self.version} | self._flights.versions if v <= self.version)
        )

    # What a policy decides

    @abc.abstractmethod
    def _begin(self) -> None:
        """It is time 0."""

    @abc.abstractmethod
    def _on_arrival(self, client: int) -> None:
        """Its update is in ``_arrived`` now."""

    @abc.abstractmethod
    def _on_loss(self) -> None:
        """Somebody is no longer at work."""

    def _on_return(self) -> None:  # noqa: B027
        """Somebody is there again."""

    def _on_timer(self, number: int) -> None:
        """The time that ``_set_timer`` was given has come."""
        raise AssertionError(f"timer {number} was never set")

    @property
    def _horizon_s(self) -> float:
        """Who cannot arrive by then need not train."""
        return math.inf

    # What policies are made of

    def _draw(self) -> int | None:
        """A client taken from the idle ones that are there, uniformly; None if there is none."""
        while self._idle:
            client = self._take(self._drawn_place())
            on_s, _ = self._traces.window(client, self.now_s)
            if on_s <= self.now_s:
                return client
            if on_s < math.inf:
                self._clock.add(Event(on_s, client, "return", -1))
        return None

    def _drawn_place(self) -> int:
        return int(self._uniform() * len(self._idle))

    def _uniform(self) -> float:
        return uniform("schedule", self._seed, self._count("draw"))

    def _take(self, place: int) -> int:
        # The last takes its place, so that nothing has to move.
        self._idle[place], self._idle[-1] = self._idle[-1], self._idle[place]
        return self._idle.pop()

    def _launch(self, client: int) -> None:
        """A client begins, on the newest model."""
        work = self._count("work")
        examples = self._examples[client]
        # With nothing to send: the earliest that it could arrive.
        finish = self._traces.finish(client, self.now_s, examples, self._down_bytes, 0, work)
        flight = Flight(self._newest, work, self.now_s, finish)
        if finish.lost_s is None:
            self._flights.add_waiting(client, flight)
        else:
            self._flights.add_lost(client, flight)
            self._clock.add(Event(finish.lost_s, client, str(finish.reason), work))

    def _aggregate(self, weights: Mapping[int, float]) -> None:
        """Make a new model of all that has arrived."""
        updates = tuple(Update(c, v, weights[c]) for c, v in sorted(self._arrived.items()))
        self._arrived.clear()
        self._count("version")
        self._counts["uneventful"] = 0
        self._steps.append(Aggregate(self._newest, updates, self.now_s, self.mixes))
        self._idle.extend(update.client for update in updates)

    def _lose(self, clients: Iterable[int], reason: str) -> None:
        """Neither at work nor arrived any longer."""
        lost = tuple(sorted(clients))
        for client in lost:
            if client in self._flights:
                self._flights.end(client)
            else:
                del self._arrived[client]
        if lost:
            self._steps.append(Lost(lost, reason, self.now_s))

    def _set_timer(self, at_s: float, number: int) -> None:
        # Behind all clients: who arrives at the same time is in time.
        self._clock.add(Event(at_s, self._traces.num_clients, "timer", number))

    # How time goes on

    def _advance(self) -> None:
        if self._due_s <= self._clock.next_s:
            self._hand_out()
            return
        if self._count("uneventful") > MOST_EVENTS:
            raise StateError(
                f"{MOST_EVENTS} events without an aggregation, at {self.now_s} s: "
                f"{self._settings} cannot work with these traces"
            )
        event = self._clock.pop()
        if event.kind == "timer":
            self._on_timer(event.work)
        elif event.kind == "return":
            self._idle.append(event.client)
            self._on_return()
        elif self._is_current(event):
            self._end_work(event)

    def _is_current(self, event: Event) -> bool:
        flight = self._flights.get(event.client)
        return flight is not None and flight.work == event.work

    def _end_work(self, event: Event) -> None:
        client = event.client
        if event.kind == "arrival":
            self._arrived[client] = self._flights.end(client).version
            self._on_arrival(client)
            return
        self._lose([client], event.kind)
        away_s = self._traces.config.rejoin_s if event.kind == "dropout" else 0.0
        if away_s:
            self._clock.add(Event(self.now_s + away_s, client, "return", -1))
        else:
            self._idle.append(client)
        self._on_loss()

    @property
    def _due_s(self) -> float:
        """Until when time can go on without the results of those that wait."""
        bound_s = self._flights.bound_s
        return bound_s if bound_s <= self._horizon_s else math.inf

    def _hand_out(self) -> None:
        """Let those train that wait, all at once: the fewer and larger starts the better."""
        due = self._flights.take_due(self._horizon_s)
        for version, group in itertools.groupby(due, lambda c: self._flights[c].version):
            clients = tuple(group)
            at_s = min(self._flights[client].start_s for client in clients)
            self._steps.append(Start(self._count("start"), clients, version, at_s))

    def _answer(self, client: int) -> Flight:
        if client not in self._asked:
            raise StateError(f"client {client} is not among {sorted(self._asked)}, which started")
        self._asked.remove(client)
        return self._flights.trained(client)

    def _count(self, what: str) -> int:
        """How many there were before this one."""
        self._counts[what] += 1
        return self._counts[what] - 1

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers, strings and tuples. Fit for JSON."""
        return {
            "settings": self._settings,
            "num_clients": self._traces.num_clients,
            "seed": self._seed,
            "clock": self._clock.state_dict(),
            "has_begun": self._has_begun,
            "counts": dict(self._counts),
            "idle": tuple(self._idle),
            "at_work": self._flights.state_dict(),
            "asked": tuple(sorted(self._asked)),
            "arrived": tuple(self._arrived.items()),
            "steps": tuple(map(to_state, self._steps)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        With other ``aggregations`` and ``until_s`` it goes on as if they had been these all along.

        Raises:
            StateError: It is of other settings, clients or another seed.
        """
        for name, own in (
            ("settings", self._settings),
            ("num_clients", self._traces.num_clients),
            ("seed", self._seed),
        ):
            if state.get(name) != own:
                raise StateError(f"{name} of the state is {state.get(name)}: here it is {own}")
        self._clock.load_state_dict(state["clock"])
        self._has_begun = state["has_begun"]
        self._counts |= state["counts"]
        self._idle = list(state["idle"])
        self._flights.load_state_dict(state["at_work"])
        self._asked = set(state["asked"])
        self._arrived = dict(state["arrived"])
        self._steps = deque(map(from_state, state["steps"]))


def _require(name: str, values: Sequence[float], num_clients: int, *, least: float) -> None:
    if len(values) != num_clients:
        raise ConfigError(
            f"{name} has {len(values)} values: it must have one for each of {num_clients} clients"
        )
    for client, value in enumerate(values):
        if not least <= value < math.inf:
            allowed = "positive, finite" if least else "at least 0 and finite"
            raise ConfigError(f"{name} of client {client} is {value}: it must be {allowed}")
