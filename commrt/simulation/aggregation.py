"""When the server aggregates, and with which weights: the schedules of the policies."""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from commrt.errors import ConfigError, StateError
from commrt.simulation.policies import FedAsync, FedAvg, FedBuff, FedFix, Policy, Staleness
from commrt.simulation.schedule import Schedule
from commrt.simulation.traces import Traces

MOST_FAILED_ROUNDS = 100


def make_schedule(
    policy: Policy,
    traces: Traces,
    *,
    examples: Sequence[float],
    down_bytes: int,
    importance: Sequence[float] | None = None,
    seed: int = 0,
    aggregations: int,
    until_s: float = math.inf,
) -> Schedule:
    """The schedule of a policy; arguments as :class:`~commrt.simulation.schedule.Schedule`'s.

    Raises:
        ConfigError: A value is out of range, the policy needs more clients, or it knows of no
            importance and one is given.
    """
    if importance is not None and isinstance(policy, FedAsync | FedBuff):
        raise ConfigError(f"importance is given: {policy} counts all clients the same")
    common: dict[str, Any] = {
        "examples": examples,
        "down_bytes": down_bytes,
        "importance": importance,
        "seed": seed,
        "aggregations": aggregations,
        "until_s": until_s,
    }
    if isinstance(policy, FedAvg):
        return _Rounds(policy, traces, **common)
    if isinstance(policy, FedFix):
        return _Intervals(policy, traces, **common)
    return _Stream(policy, traces, **common)


class _Rounds(Schedule):
    """FedAvg."""

    def __init__(self, policy: FedAvg, traces: Traces, **common: Any) -> None:
        _fits("cohort", policy.cohort, traces)
        super().__init__(policy, traces, **common)
        self._policy = policy
        self._deadline_s = math.inf
        self._is_open = False
        self._counts |= {"round": 0, "failed": 0}

    def _begin(self) -> None:
        clients = list[int]()
        while len(clients) < self._policy.asked and (client := self._draw()) is not None:
            clients.append(client)
        if len(clients) < self._policy.least:
            self._idle.extend(clients)
            return
        self._is_open = True
        self._deadline_s = self.now_s + self._policy.deadline_s
        number = self._count("round")
        if self._deadline_s < math.inf:
            self._set_timer(self._deadline_s, number)
        for client in clients:
            self._launch(client)

    def _on_return(self) -> None:
        if not self._is_open:
            self._begin()

    def _on_arrival(self, client: int) -> None:
        if len(self._arrived) == self._policy.cohort or not self._flights:
            self._close()

    def _on_loss(self) -> None:
        if not self._flights:
            self._close()

    def _on_timer(self, number: int) -> None:
        if self._is_open and number == self._counts["round"] - 1:
            self._close()

    def _close(self) -> None:
        self._is_open = False
        self._deadline_s = math.inf
        self._leave_out(list(self._flights), "late")
        if len(self._arrived) >= self._policy.least:
            self._counts["failed"] = 0
            self._aggregate(self._weights())
        else:
            self._leave_out(list(self._arrived), "too few")
            self._count("failed")
        if self._counts["failed"] == MOST_FAILED_ROUNDS:
            raise StateError(
                f"{MOST_FAILED_ROUNDS} rounds one after the other had fewer updates than "
                f"least={self._policy.least}, with deadline_s={self._policy.deadline_s}"
            )
        self._begin()

    def _leave_out(self, clients: list[int], reason: str) -> None:
        self._lose(clients, reason)
        self._idle.extend(sorted(clients))

    def _weights(self) -> dict[int, float]:
        if self._policy.sampling == "weighted":
            return dict.fromkeys(self._arrived, 1 / len(self._arrived))
        shares = {client: self._importance[client] for client in self._arrived}
        total = math.fsum(shares.values())
        return {client: share / total for client, share in shares.items()}

    def _drawn_place(self) -> int:
        if self._policy.sampling == "uniform":
            return super()._drawn_place()
        sums = list(itertools.accumulate(self._importance[client] for client in self._idle))
        drawn = self._uniform() * sums[-1]
        return min(bisect.bisect_right(sums, drawn), len(sums) - 1)

    @property
    def _horizon_s(self) -> float:
        return self._deadline_s

    def state_dict(self) -> dict[str, Any]:
        own = {"deadline_s": self._deadline_s, "is_open": self._is_open}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._deadline_s, self._is_open = state["deadline_s"], state["is_open"]


class _Stream(Schedule):
    """FedAsync and FedBuff: always so many at work, aggregated by so many."""

    def __init__(self, policy: FedAsync | FedBuff, traces: Traces, **common: Any) -> None:
        _fits("concurrency", policy.concurrency, traces)
        self.mixes = isinstance(policy, FedAsync)
        self._buffer = 1 if isinstance(policy, FedAsync) else policy.buffer
        _fits("buffer", self._buffer, traces)
        super().__init__(policy, traces, **common)
        self._concurrency = policy.concurrency
        self._full_weight = policy.alpha if isinstance(policy, FedAsync) else 1 / policy.buffer
        self._staleness = Staleness.parse(policy.staleness)

    def _begin(self) -> None:
        while len(self._flights) < self._concurrency:
            client = self._draw()
            if client is None:
                return
            self._launch(client)

    def _on_arrival(self, client: int) -> None:
        if len(self._arrived) == self._buffer:
            self._aggregate({c: self._weight(v) for c, v in self._arrived.items()})
        self._begin()

    def _weight(self, version: int) -> float:
        return self._full_weight * self._staleness(self._newest - version)

    def _on_loss(self) -> None:
        self._begin()

    def _on_return(self) -> None:
        self._begin()


class _Intervals(Schedule):
    """FedFix."""

    def __init__(self, policy: FedFix, traces: Traces, **common: Any) -> None:
        super().__init__(policy, traces, **common)
        self._interval_s, self._most_gap = policy.interval_s, policy.most_gap
        self._counted = [0] * traces.num_clients

    def _begin(self) -> None:
        self._begin_interval(1)

    def _begin_interval(self, number: int) -> None:
        while (client := self._draw()) is not None:
            self._launch(client)
        if self._flights or self._clock.next_s < math.inf:
            # Not a sum: rounding would add up.
            self._set_timer(number * self._interval_s, number)

    def _on_arrival(self, client: int) -> None:
        """It waits for the end of the interval."""

    def _on_loss(self) -> None:
        """It begins again with the next interval."""

    def _on_timer(self, number: int) -> None:
        weights = {}
        for client in self._arrived:
            gap = number - self._counted[client]
            weights[client] = self._importance[client] * min(gap, self._most_gap or gap)
            self._counted[client] = number
        if weights:
            self._aggregate(weights)
        self._begin_interval(number + 1)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"counted": tuple(self._counted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._counted = list(state["counted"])


def _fits(name: str, value: int, traces: Traces) -> None:
    if value > traces.num_clients:
        raise ConfigError(
            f"{name} is {value}: it must be at most the number of clients, {traces.num_clients}"
        )
