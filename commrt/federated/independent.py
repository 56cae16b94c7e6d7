"""An uplink of any vector codec: each update is coded and decoded without the others."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from commrt.codecs import derive_seed
from commrt.errors import ConfigError, StateError, WireFormatError
from commrt.federated.cohort import MOST_KEPT_BYTES, Round, RoundServer
from commrt.federated.layout import Layout, magnitude
from commrt.federated.peers import ALONE, Peers
from commrt.federated.uplink import Aggregate, Client, Uplink
from commrt.federated.vector import Draw, VectorCodec
from commrt.federated.wire import Kind, Reader, context_of, seal, unseal, varint

MOST_CLIENTS = 1 << 20
"""Of a cohort; some codecs spend a few bytes and operations for each of its clients."""


@dataclasses.dataclass(frozen=True)
class IndependentUplink(Uplink):
    """Sends what ``codec`` makes of each update.

    Clients keep the codec's residual, if it has one; the server keeps nothing. The mean is as
    unbiased as the codec is.
    """

    codec: VectorCodec

    @property
    def spec(self) -> str:
        """The codec's."""
        return self.codec.spec

    def client(self, layout: Layout, client: int, *, seed: int = 0) -> "IndependentClient":
        """See :meth:`Uplink.client`."""
        return IndependentClient(_Ends(self.codec, layout, seed), client)

    def server(self, layout: Layout, *, seed: int = 0, peers: Peers = ALONE) -> "IndependentServer":
        """See :meth:`Uplink.server`."""
        return IndependentServer(_Ends(self.codec, layout, seed), peers)


@dataclasses.dataclass(frozen=True)
class _Ends:
    """What both ends have."""

    codec: VectorCodec
    layout: Layout
    seed: int

    def context(self, round_index: int, client: int) -> bytes:
        return context_of(self.codec.spec, self.layout.digest, self.seed, round_index, client)

    def draw(self, round_index: int, index: int, count: int) -> Draw:
        return Draw(seed=_round_seed(self.seed, round_index), index=index, count=count)


@functools.lru_cache(maxsize=16)
def _round_seed(seed: int, round_index: int) -> int:
    """Which all clients of a round draw from."""
    return derive_seed("uplink", seed, round_index)


@dataclasses.dataclass(frozen=True)
class _Memory:
    """The residual after the round encoded last, and before it, in case it is encoded again.

    No tensor in it is written to.
    """

    residual: Tensor
    before: Tensor
    round_index: int


class IndependentClient(Client):
    """A client whose codec needs no other.

    Cost: where the codec has a residual, two of them.
    """

    def __init__(self, ends: _Ends, client: int) -> None:
        self._ends, self._client = ends, client
        empty = ends.codec.residual(ends.layout.numel)
        self._memory = None if empty is None else _Memory(empty, empty, -1)

    def encode(
        self, round_index: int, update: Tensor, parameters: bytes, previous: Tensor | None = None
    ) -> bytes:
        """See :meth:`Client.encode`; nothing is predicted from ``previous``."""
        context = self._ends.context(round_index, self._client)
        reader = Reader(unseal(Kind.PARAMETERS, round_index, parameters, context))
        index, count = reader.varint(MOST_CLIENTS), reader.varint(MOST_CLIENTS)
        reader.end()
        if index >= count:
            raise WireFormatError(f"client {index} of a cohort of {count}")
        update = self._ends.layout.check(update, "update")
        draw = self._ends.draw(round_index, index, count)
        return seal(Kind.UPDATE, round_index, self._encode(round_index, update, draw), context)

    def state_dict(self) -> dict[str, Any]:
        """The residuals after and before the last round, and that round; empty without residual."""
        if self._memory is None:
            return {}
        return {
            "residual": self._memory.residual.clone(),
            "before": self._memory.before.clone(),
            "round": self._memory.round_index,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Client.load_state_dict`.

        Raises:
            StateError: It is not the state of a client of this codec and layout.
        """
        expected = [] if self._memory is None else ["before", "residual", "round"]
        if sorted(state) != expected:
            raise StateError(f"state has {sorted(state)}: must have {expected}")
        if self._memory is None:
            return
        if not isinstance(state["round"], int):
            raise StateError(f"state has round={state['round']!r}: must be a whole number")
        residual, before = (self._loaded(state[name]) for name in ("residual", "before"))
        self._memory = _Memory(residual, before, state["round"])

    def _encode(self, round_index: int, update: Tensor, draw: Draw) -> bytes:
        memory = self._memory
        if memory is None:
            return self._ends.codec.encode(update, draw)
        is_again = round_index == memory.round_index
        before = memory.before if is_again else memory.residual
        residual = before.clone()
        body = self._ends.codec.encode(update, draw, residual)
        self._memory = _Memory(residual, before, round_index)
        return body

    def _loaded(self, residual: Any) -> Tensor:
        if not isinstance(residual, Tensor):
            raise StateError(f"state has a residual of type {type(residual).__name__}: is a tensor")
        try:
            self._ends.codec.check_residual(residual, self._ends.layout.numel)
        except ConfigError as error:
            raise StateError(f"state does not fit: {error}") from error
        return residual.cpu().clone()


class IndependentServer(RoundServer):
    """A server that decodes what comes as it comes.

    Cost: what is decoded, up to 256 MB; of the rest the payloads, which are decoded twice.
    """

    def __init__(self, ends: _Ends, peers: Peers) -> None:
        super().__init__(peers)
        self._ends = ends
        self._most_kept = MOST_KEPT_BYTES // (4 * ends.layout.numel)
        self._updates: dict[int, Tensor] = {}
        self._bodies: dict[int, bytes] = {}
        self._largest: dict[int, float] = {}

    def begin(
        self,
        round_index: int,
        cohort: Sequence[int],
        *,
        weights: Mapping[int, float] | None = None,
        previous: Tensor | None = None,
    ) -> dict[int, bytes]:
        """See :meth:`Server.begin`.

        Raises:
            ConfigError: Also for a cohort of more than `MOST_CLIENTS`.
        """
        if len(cohort) > MOST_CLIENTS:
            raise ConfigError(f"a cohort of {len(cohort)}: must be of {MOST_CLIENTS} at most")
        self._round = Round(round_index, cohort, weights)
        self._updates, self._bodies, self._largest = {}, {}, {}
        frames = {}
        for index, client in enumerate(self._round.cohort):
            body = varint(index) + varint(len(cohort))
            context = self._ends.context(round_index, client)
            frames[client] = seal(Kind.PARAMETERS, round_index, body, context)
        return self._round.sent(frames)

    def receive(self, client: int, payload: bytes) -> None:
        """See :meth:`Server.receive`."""
        running = self._expecting(client)
        running.came(client, payload)
        if client in self._largest:
            raise WireFormatError(f"client {client} has sent its update of this round before")
        context = self._ends.context(running.index, client)
        body = unseal(Kind.UPDATE, running.index, payload, context)
        update = self._decoded(running, client, body)
        self._largest[client] = magnitude(update)
        if len(self._updates) < self._most_kept:
            self._updates[client] = update
        else:
            self._bodies[client] = body

    def finish(self) -> Aggregate:
        """See :meth:`Server.finish`."""
        running, self._round = self._running(), None
        shares, traffic, mean = self._gathered(running, self._ends.layout.numel, self._largest)
        for client, update in self._updates.items():
            mean.add(update[None], [shares[client]])
        for client, body in self._bodies.items():
            mean.add(self._decoded(running, client, body)[None], [shares[client]])
        self._peers.sum_(mean.total)
        self._updates, self._bodies, self._largest = {}, {}, {}
        return Aggregate(mean=mean.mean(), traffic=traffic, clients=tuple(shares), report={})

    def _decoded(self, running: Round, client: int, body: bytes) -> Tensor:
        draw = self._ends.draw(running.index, running.place(client), len(running.cohort))
        return self._ends.codec.decode(body, self._ends.layout.numel, draw)
