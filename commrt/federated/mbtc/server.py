"""The server of MBTC: decodes a cohort's updates jointly."""

import math
import operator
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from commrt.errors import StateError, WireFormatError
from commrt.federated.cohort import MOST_KEPT_BYTES, Round, RoundServer
from commrt.federated.layout import Layout
from commrt.federated.mbtc import coding, plan, side
from commrt.federated.mbtc.cosets import MOST_CLIENTS, Cosets
from commrt.federated.mbtc.ended import Ended, gathered
from commrt.federated.mbtc.parameters import Parameters
from commrt.federated.mbtc.plan import NO_PLAN, Plan
from commrt.federated.mbtc.rate import Coded, Energy, RateControl, check_budgets
from commrt.federated.mbtc.received import (
    Frame,
    Received,
    flags_of,
    read_answer,
    read_updates,
)
from commrt.federated.mbtc.requests import Wanted, write_request
from commrt.federated.mbtc.sharing import JointDecoding, agreed
from commrt.federated.mbtc.side import History, Sources
from commrt.federated.mbtc.tables import Tables
from commrt.federated.mean import ExactMean
from commrt.federated.peers import ALONE, Peers
from commrt.federated.uplink import Aggregate
from commrt.federated.wire import Kind, check_of, seal, unseal

if TYPE_CHECKING:
    from commrt.federated.mbtc.spec import Mbtc

# Of a weight of an update that is decoded.
RECEIVED_BYTES = 10


class _Asked(NamedTuple):
    """What a client was asked for, and the digest of the request."""

    wanted: list[Wanted]
    request: int


class MbtcServer(RoundServer):
    """See :class:`commrt.federated.mbtc.spec.Mbtc`.

    Of peers the first one plans rounds and learns rates and covariances; each keeps the histories
    of the clients that it is home to, and decodes their updates; see :class:`JointDecoding` for
    what is decoded jointly.

    Cost: histories, and in a round with no joint decoding the payloads; what is decoded of them is
    kept to the round's end up to 256 MB, and beyond decoded twice. With joint decoding all of it is
    kept, about 10 bytes a weight of each update. Between peers goes the sum, 8 bytes a weight; of
    cohorts of up to 64 clients 4 bytes a weight and client to the first one, which learns from
    them and has them until the end; with ``combine="lmmse"`` 4 more, and the mean back.
    """

    def __init__(self, codec: "Mbtc", layout: Layout, seed: int, peers: Peers = ALONE) -> None:
        self._may_join = codec.combine == "lmmse" or (
            codec.joint != "off" and any(group.numel >= codec.block for group in layout.groups)
        )
        super().__init__(peers)
        self._codec, self._layout, self._seed = codec, layout, seed
        self._tags: dict[int, int] = {}
        self._tables = {has_own: Tables(layout) for has_own in (False, True)}
        self._rates = RateControl(codec, layout.numel)
        self._cosets = Cosets(codec, layout)
        self._mean: Tensor | None = None
        self._most_kept = MOST_KEPT_BYTES // (RECEIVED_BYTES * layout.numel)
        self._start_round(None, {}, NO_PLAN)

    def begin(
        self,
        round_index: int,
        cohort: Sequence[int],
        *,
        weights: Mapping[int, float] | None = None,
        previous: Tensor | None = None,
        budgets: Mapping[int, float] | None = None,
    ) -> dict[int, bytes]:
        """See :meth:`Server.begin`.

        Args:
            round_index: As there.
            cohort: As there.
            weights: As there.
            previous: As there.
            budgets: Bits a weight of each client in the cohort; it learns in a few rounds to keep
                to them. Default, rates are divided among them for the codec's ``nmse`` or ``bits``.

        Raises:
            ConfigError: As there; or a budget is missing or not in (0, 12]; or the cohort is too
                large for ``combine="lmmse"``.
        """
        running = Round(round_index, cohort, weights)
        self._cosets.check(running.cohort)
        check_budgets(running.cohort, budgets)
        known = self._mean if previous is None else self._layout.check(previous, "previous").clone()
        told, plan, frames = dict[int, Parameters](), None, None
        if self._peers.rank == 0:
            told, plan = self._plan(running, budgets, has_previous=known is not None)
            frames = self._sealed(running, told)
        frames = self._peers.broadcast(frames)
        if self._peers.rank:
            told = self._read_told(running, frames)
        planes = [told[client].planes for client in running.cohort if client in told]
        self._start_round(known, told, agreed(self._peers, plan, planes))
        self._round = running
        return running.sent(frames)

    def receive(self, client: int, payload: bytes) -> None:
        """See :meth:`Server.receive`."""
        self.receive_all({client: payload})

    def receive_all(self, payloads: Mapping[int, bytes]) -> None:
        """See :meth:`Server.receive_all`."""
        running = self._running()
        updates = list[tuple[int, bytes]]()
        try:
            for client, payload in payloads.items():
                if self._is_update(client, payload):
                    updates.append((client, payload))
        finally:  # also those before one that is refused
            for some in coding.batches(updates, self._layout.numel, _uses_previous):
                self._take_updates(running, some)

    def _is_update(self, client: int, payload: bytes) -> bool:
        """Count what came, and take it if it is an answer; whether it is an update instead."""
        running = self._expecting(client)
        running.came(client, payload, is_answer=client in self._payloads)
        if client not in self._payloads:
            return True
        if client not in self._asked:
            raise WireFormatError(f"client {client} has sent its update of this round before")
        self._take_answer(running, client, self._received[running.place(client)], payload)
        self._taken[client] += len(payload)
        return False

    def _take_updates(self, running: Round, some: Sequence[tuple[int, bytes]]) -> None:
        """Of one batch; if one is damaged, those before it."""
        try:
            received = self._read(running, some)
        except WireFormatError:
            if len(some) == 1:
                raise
            for each in some:
                self._take_updates(running, [each])
            raise
        is_kept = self._joint.is_running or len(self._received) < self._most_kept
        for (client, payload), update in zip(some, received, strict=True):
            self._largest[client] = update.largest
            self._payloads[client] = payload
            self._taken[client] = len(payload)
            if is_kept:
                self._received[running.place(client)] = update

    def requests(self) -> dict[int, bytes]:
        """See :meth:`Server.requests`."""
        running = self._running()
        self._joint.decode(self._received)
        frames = {}
        self._asked.clear()
        for place in self._received:
            client = running.cohort[place]
            wanted = self._joint.wanted(place)
            if wanted:
                body = write_request(wanted, self._told[client].planes)
                self._asked[client] = _Asked(wanted, zlib.crc32(body))
                context = self._context(running, client, check_of(self._payloads[client]))
                frames[client] = seal(Kind.REQUEST, running.index, body, context)
        return running.sent(self._joint.all_frames(frames))

    def finish(self) -> Aggregate:
        """See :meth:`Server.finish`; the first peer alone has a report."""
        running, self._round = self._running(), None
        self._joint.decode(self._received)
        shares, traffic, mean = self._gathered(running, self._layout.numel, self._largest)
        ended = [
            each
            for some in self._batches(running)
            for each in self._end(running, some, shares, mean)
        ]
        ended = gathered(self._peers, sorted(ended, key=operator.attrgetter("client")))
        self._peers.sum_(mean.total)
        for tables in self._tables.values():
            tables.close_round(self._peers)
        if self._joint.is_running:
            missing = self._joint.close(self._received)
            mean.added = [(share, missing.get(running.place(c), ())) for c, share in shares.items()]
        self._mean = mean.mean()
        report = self._cosets.refine_(self._mean, list(shares.values()), ended, self._peers)
        if self._peers.rank == 0:
            report |= self._learn(running, shares, ended)
        self._start_round(None, {}, NO_PLAN)
        return Aggregate(
            mean=self._mean.clone(), traffic=traffic, clients=tuple(shares), report=report
        )

    def state_dict(self, *, with_histories: bool = True) -> dict[str, Any]:
        """Histories, tables, rates, what was learned for joint decoding; between rounds."""
        if self._round is not None:
            raise StateError(f"round {self._round.index} is running: finish() ends it")
        state = {
            "tags": dict(self._tags),
            "tables": {has_own: each.state_dict() for has_own, each in self._tables.items()},
            "rates": self._rates.state_dict(),
            "cosets": self._cosets.state_dict(),
            "mean": self._mean,
        }
        return state | {"histories": dict(self.histories)} if with_histories else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Server.load_state_dict`.

        Raises:
            StateError: It is not one of such a server; nothing of it is taken.
        """
        new = MbtcServer(self._codec, self._layout, self._seed, self._peers)
        new.histories = self.histories
        try:
            new._take(state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"not a state of {self._codec.spec}: {error!r}") from error
        vars(self).update(vars(new))

    def _take(self, state: Mapping[str, Any]) -> None:
        self._tags = {int(client): int(tag) for client, tag in state["tags"].items()}
        if "histories" in state:
            self.histories = {
                client: History.of(each, self._layout).state_dict()
                for client, each in state["histories"].items()
            }
        for has_own, tables in self._tables.items():
            tables.load_state_dict(state["tables"][has_own])
        self._rates.load_state_dict(state["rates"])
        self._cosets.load_state_dict(state["cosets"])
        mean = state["mean"]
        self._mean = None if mean is None else self._layout.check(mean, "mean").clone()

    def _plan(
        self, running: Round, budgets: Mapping[int, float] | None, *, has_previous: bool
    ) -> tuple[dict[int, Parameters], Plan]:
        """What each client is told, and what is decoded jointly."""
        cohort = running.cohort
        planned = self._rates.begin(
            cohort, running.shares(cohort), budgets, self._cosets.covariance(cohort)
        )
        order = plan.order_of(cohort, running.index, None if budgets is None else planned)
        joint = self._cosets.begin(cohort, planned.steps, order)
        fitted = {has_own: tables.fit() for has_own, tables in self._tables.items()}
        told = {
            client: Parameters(
                step=step,
                history=self._tags.get(client, 0),
                tables=fitted[client in self._tags],
                planes=each,
                has_previous=has_previous,
            )
            for client, each, step in zip(cohort, joint.planes, planned.steps, strict=True)
        }
        return told, joint

    def _start_round(
        self, previous: Tensor | None, told: dict[int, Parameters], plan: Plan
    ) -> None:
        self._previous, self._digest, self._told = previous, side.digest(previous), told
        self._joint = JointDecoding(self._layout, self._codec.block, self._peers, plan)
        self._received: dict[int, Received] = {}
        self._payloads: dict[int, bytes] = {}
        self._largest: dict[int, float] = {}
        self._asked: dict[int, _Asked] = {}
        self._taken: dict[int, int] = {}

    def _context(self, running: Round, client: int, *known: int) -> bytes:
        return coding.context(self._codec, self._layout, self._seed, running.index, client, *known)

    def _sealed(self, running: Round, told: Mapping[int, Parameters]) -> dict[int, bytes]:
        return {
            client: seal(
                Kind.PARAMETERS, running.index, each.pack(), self._context(running, client)
            )
            for client, each in told.items()
        }

    def _read_told(self, running: Round, frames: Mapping[int, bytes]) -> dict[int, Parameters]:
        """What clients are told: those at home here, or all that may be decoded jointly."""
        may_join = self._may_join and len(running.cohort) <= MOST_CLIENTS
        told = dict[int, Parameters]()
        for client, frame in frames.items():
            if may_join or self.home(client) == self._peers.rank:
                context = self._context(running, client)
                body = unseal(Kind.PARAMETERS, running.index, frame, context)
                groups = len(self._layout.groups)
                told[client] = Parameters.unpack(body, groups, self._codec.block)
        return told

    def _read(self, running: Round, some: Sequence[tuple[int, bytes]]) -> list[Received]:
        frames = [self._frame(running, client, payload) for client, payload in some]
        return read_updates(self._codec, self._layout, frames)

    def _frame(self, running: Round, client: int, payload: bytes) -> Frame:
        flags = flags_of(payload)
        history = None
        if flags & coding.USES_OWN and client in self.histories:
            history = History(**self.histories[client])
        sources = Sources(
            self._previous if flags & coding.USES_PREVIOUS else None,
            None if history is None else history.decoded,
        )
        known = (
            0 if sources.previous is None else self._digest,
            0 if history is None else history.digest,
        )
        context = self._context(running, client, *known)
        body = unseal(Kind.UPDATE, running.index, payload, context)
        dither = coding.dither_seed(self._seed, running.index, client)
        return Frame(body, self._told[client], sources, dither)

    def _take_answer(self, running: Round, client: int, update: Received, payload: bytes) -> None:
        wanted, request = self._asked[client]
        context = self._context(running, client, request)
        body = unseal(Kind.ANSWER, running.index, payload, context)
        taken = read_answer(body, wanted, update, self._layout)
        for each, answer in zip(wanted, taken, strict=True):
            self._joint.take(running.place(client), each, answer, update.blocks[each.group])
        del self._asked[client]

    def _batches(self, running: Round) -> Iterator[list[tuple[int, Received]]]:
        """Clients and updates that were decoded together; what was not kept is decoded again."""
        kept, others = dict[int, list[tuple[int, Received]]](), list[tuple[int, bytes]]()
        for client, payload in self._payloads.items():
            update = self._received.get(running.place(client))
            if update is None:
                others.append((client, payload))
            else:
                kept.setdefault(id(update.all_how), []).append((client, update))
        yield from kept.values()
        for some in coding.batches(others, self._layout.numel, _uses_previous):
            yield [
                (client, update)
                for (client, _), update in zip(some, self._read(running, some), strict=True)
            ]

    def _end(
        self,
        running: Round,
        some: Sequence[tuple[int, Received]],
        shares: Mapping[int, float],
        mean: ExactMean,
    ) -> list[Ended]:
        """Add a batch of updates to the mean, and take what they tell of the clients."""
        how, codes = some[0][1].all_how, some[0][1].all_codes
        missing = [update.missing(self._layout) for _, update in some]
        for _, update in some:
            update.settle_(self._layout)
        decoded, histories = how.dequantise(codes, keep=self._codec.memory)
        mean.add(decoded.values, [shares[client] for client, _ in some], missing)
        self._count(some, missing)
        is_small = len(running.cohort) <= MOST_CLIENTS
        ended = list[Ended]()
        for k, (client, update) in enumerate(some):
            tag, one = 0, update.how
            if histories and not missing[k]:
                self.histories[client], tag = histories[k].state_dict(), histories[k].tag
            energy = Energy(*(square - one.noise for square in decoded.squares[k]))
            bits = 8 * self._taken[client] / self._layout.numel
            ended.append(
                Ended(
                    client,
                    Coded(one.noise, bits, energy, one.step != self._told[client].step),
                    tag,
                    len(missing[k]),
                    decoded.residuals[k] if is_small else None,
                    one.predicted if self._codec.combine == "lmmse" else None,
                    self._cosets.bits_alone(update) if is_small and self._may_join else (),
                )
            )
        return ended

    def _count(
        self, some: Sequence[tuple[int, Received]], missing: Sequence[Sequence[slice]]
    ) -> None:
        """Take codes of updates with no block missing for the tables of later rounds."""
        whole = [update for (_, update), lacks in zip(some, missing, strict=True) if not lacks]
        for has_own, tables in self._tables.items():
            updates = [update for update in whole if update.has_own == has_own]
            if len(updates) == len(some) and self._codec.lattice == "z":
                tables.count(updates[0].all_codes, updates[0].all_how.contexts)
                continue
            for update in updates:
                tables.count(*(each[None] for each in update.how.scalar(update.codes)))

    def _learn(
        self, running: Round, shares: Mapping[int, float], ended: Sequence[Ended]
    ) -> dict[str, float]:
        """Take what the round tells for the next ones; the figures of its report."""
        self._tags |= {each.client: each.tag for each in ended if each.tag}
        self._rates.learn({each.client: each.coded for each in ended})
        noise = sum(shares[each.client] ** 2 * each.coded.noise for each in ended)
        energy = sum(shares[each.client] ** 2 * each.coded.energy.update for each in ended)
        figures = self._cosets.learn(running.cohort, ended, self._joint)
        return {"nmse": noise / energy if energy > 0 else math.inf, **figures}


def _uses_previous(sent: tuple[int, bytes]) -> bool:
    return bool(flags_of(sent[1]) & coding.USES_PREVIOUS)
