"""The server's end: a sum of masked codes, and what it takes to read it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from commrt.codecs.hadamard import unrotate
from commrt.errors import ConfigError, StateError, WireFormatError
from commrt.federated.baselines.wire import PayloadReader
from commrt.federated.cohort import Round, RoundServer
from commrt.federated.secure.ends import Ends, write_clients
from commrt.federated.uplink import Aggregate
from commrt.federated.wire import Kind, Reader, seal, unseal


class SecureServer(RoundServer):
    """A server that keeps the sum of what came, and of nobody's what it was.

    :meth:`requests` ends the time for updates if any are lacking and enough are there: from then on
    they are too late.
    """

    def __init__(self, ends: Ends) -> None:
        super().__init__()
        self._ends = ends
        self._last: Tensor | None = None
        self._previous: Tensor | None = None
        self._total = torch.zeros(0, dtype=torch.int64)
        self._arrived = set[int]()
        self._answered = set[int]()
        self._dropped: tuple[int, ...] = ()

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
            ConfigError: Also for weights that are not equal, and as :meth:`SecureUplink.step`.
        """
        running = Round(round_index, cohort, weights)
        if len(set(running.weights.values())) > 1:
            raise ConfigError(f"weights of clients are {running.weights}: must be equal")
        self._ends.uplink.step(len(running.cohort), self._ends.layout.numel)
        self._start(self._last if previous is None else previous)
        self._round = running
        body = write_clients(tuple(sorted(running.cohort)))
        return running.sent(
            {
                client: seal(Kind.PARAMETERS, running.index, body, self._context(client))
                for client in running.cohort
            }
        )

    def receive(self, client: int, payload: bytes) -> None:
        """See :meth:`Server.receive`."""
        running = self._running()
        running.place(client)
        running.came(client, payload, is_answer=bool(self._dropped))
        if self._dropped:
            self._receive_answer(client, payload)
            return
        if client in self._arrived:
            raise WireFormatError(f"client {client} has sent its update of this round before")
        reader = PayloadReader(unseal(Kind.UPDATE, running.index, payload, self._context(client)))
        codes = reader.codes(self._ends.layout.numel, self._ends.uplink.bits)
        reader.end()
        self._total += torch.from_numpy(codes.astype("<i8"))
        self._arrived.add(client)

    def requests(self) -> dict[int, bytes]:
        """Of all whose updates came: the seeds that they share with the others."""
        running = self._running()
        dropped = tuple(sorted(set(running.cohort) - self._arrived))
        if not dropped or len(self._arrived) < self._ends.uplink.least:
            return {}
        self._dropped = dropped
        body = write_clients(dropped)
        return running.sent(
            {
                client: seal(Kind.REQUEST, running.index, body, self._context(client))
                for client in sorted(self._arrived - self._answered)
            }
        )

    def finish(self) -> Aggregate:
        """See :meth:`Server.finish`.

        Raises:
            StateError: Also where fewer than ``least`` updates came, or masks are left since
                somebody was not asked or did not answer.
        """
        running, self._round = self._running(), None
        clients = tuple(sorted(self._arrived))
        [share, *_] = running.shares(clients)
        least = self._ends.uplink.least
        if len(clients) < least:
            raise StateError(f"round {running.index} ends with {len(clients)} updates of {least}")
        silent = sorted(self._arrived - self._answered)
        if silent and len(clients) < len(running.cohort):
            raise StateError(
                f"round {running.index} has masks of those who dropped out: {silent} have not said "
                "the seeds that they share with them"
            )
        total, load = self._unwrapped(running, clients)
        mean = unrotate(total.mul_(share).float()[None], self._ends.rotation(running.index))[0]
        if self._previous is not None:
            mean += self._ends.uplink.predict * self._previous
        self._last = mean if self._ends.uplink.predict else None
        self._start(None)
        return Aggregate(mean=mean, traffic=running.traffic, clients=clients, report={"load": load})

    def state_dict(self, *, with_histories: bool = True) -> dict[str, Any]:
        """The last mean, if predictions are made from it."""
        del with_histories
        return {} if self._last is None else {"mean": self._last.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Server.load_state_dict`.

        Raises:
            StateError: It is not the state of such a server.
        """
        mean = state.get("mean")
        allowed = {"mean"} if self._ends.uplink.predict and isinstance(mean, Tensor) else set()
        if set(state) - allowed:
            raise StateError(f"state has {sorted(state)}: must have a mean, with predict, or none")
        try:
            self._last = None if mean is None else self._ends.layout.check(mean, "mean").clone()
        except ConfigError as error:
            raise StateError(f"state does not fit: {error}") from error

    def _start(self, previous: Tensor | None) -> None:
        self._previous = self._ends.predicted(previous)
        self._total = torch.zeros(self._ends.layout.numel, dtype=torch.int64)
        self._arrived, self._answered, self._dropped = set(), set(), ()

    def _receive_answer(self, client: int, payload: bytes) -> None:
        if client not in self._arrived:
            raise WireFormatError(f"client {client} is too late: others have revealed its masks")
        if client in self._answered:
            raise WireFormatError(f"client {client} has answered before")
        running = self._running()
        reader = Reader(unseal(Kind.ANSWER, running.index, payload, self._context(client)))
        seeds = reader.unpack(f"{len(self._dropped)}Q")
        reader.end()
        if max(seeds) >= 1 << 63:
            raise WireFormatError(f"a seed of {max(seeds)}: must be below 2**63")
        for other, seed in zip(self._dropped, seeds, strict=True):
            self._total -= self._ends.mask(int(seed), client, other)
        self._answered.add(client)

    def _unwrapped(self, running: Round, clients: Sequence[int]) -> tuple[Tensor, float]:
        """The sum of rotated updates, float64 (N,), and its load."""
        uplink, numel = self._ends.uplink, self._ends.layout.numel
        dithers = torch.zeros(numel, dtype=torch.float64)
        for client in clients:
            dithers += self._ends.dither(running.index, client)
        turns = (self._total & (uplink.modulus - 1)).double().sub_(dithers).div_(uplink.modulus)
        turns -= turns.round()
        load = 2 * uplink.reach * float(turns.square().mean().sqrt())
        step = uplink.step(len(running.cohort), numel)
        return turns.mul_(uplink.modulus * step), load

    def _context(self, client: int) -> bytes:
        return self._ends.context(self._running().index, client, self._previous)
