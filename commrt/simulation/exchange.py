"""The server's end of the uplink in a simulated run: what clients are told, what is decoded."""

import abc
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from commrt.federated import Layout, Server, Uplink
from commrt.federated.store import StateStore
from commrt.simulation.steps import Aggregate, Start
from commrt.simulation.transport import Ranks

Answers = Callable[[Mapping[int, bytes] | None], dict[int, bytes] | None]


class Exchange(abc.ABC):
    """Payloads where they are decoded: from when they are encoded until they are used or lost.

    Ranks: all call all of it, together.

    Attributes:
        has_rounds: Whether clients predict from the mean of the round before.
        figures: Of what was decoded last, at the first rank.
        histories: What this rank's server keeps of each client; :meth:`state_dict` is without it.
    """

    has_rounds: bool

    def __init__(
        self,
        uplink: Uplink,
        layout: Layout,
        seed: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._uplink, self._layout, self._seed, self._ranks = uplink, layout, seed, ranks
        self._device = device
        self._payloads: dict[int, bytes] = {}
        self.figures: dict[str, float] = {}
        self.histories = StateStore()

    @abc.abstractmethod
    def begin(self, step: Start, previous: Tensor | None) -> dict[int, bytes]:
        """What clients are told."""

    def send(self, payloads: Mapping[int, bytes]) -> dict[int, int]:
        """Take what this rank's clients have encoded; the sizes of all that was."""
        found, sizes = self._ranks.deliver(payloads, self.home)
        self._payloads |= found
        return sizes

    def home(self, client: int) -> int:
        """The rank that decodes a client's updates."""
        del client
        return 0

    def drop(self, clients: Iterable[int]) -> None:
        """What these sent never arrives, or too late."""
        for client in clients:
            self._payloads.pop(client, None)

    @abc.abstractmethod
    def decode(self, step: Aggregate, answers: Answers) -> Tensor:
        """The sum of weighted updates, fp32 (N,), on the device."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank has between steps."""
        return {"payloads": dict(self._payloads)}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what :meth:`state_dict` was on each rank, of which there may be others now."""
        self._payloads = {
            client: payload
            for state in states
            for client, payload in state["payloads"].items()
            if self.home(client) == self._ranks.rank
        }


class Rounds(Exchange):
    """Cohorts that begin together, decoded together.

    Args:
        uplink: Which.
        layout: Of the updates.
        seed: Of what is drawn.
        ranks: Of the run.
        device: Where the mean goes.
        shares: Of each client in the mean.
        histories: Takes what the server keeps of each client.
    """

    has_rounds = True

    def __init__(
        self,
        uplink: Uplink,
        layout: Layout,
        seed: int,
        ranks: Ranks,
        device: torch.device,
        *,
        shares: Mapping[int, float],
        histories: StateStore,
    ) -> None:
        super().__init__(uplink, layout, seed, ranks, device)
        self._server = uplink.server(layout, seed=seed, peers=ranks)
        self._server.histories = self.histories = histories
        self._shares = shares

    def home(self, client: int) -> int:
        """See :meth:`Exchange.home`."""
        return self._server.home(client)

    def begin(self, step: Start, previous: Tensor | None) -> dict[int, bytes]:
        """See :meth:`Exchange.begin`."""
        self._payloads = {}
        weights = {client: self._shares[client] for client in step.clients}
        if not (self._server.is_shared or self._ranks.is_root):
            return self._ranks.broadcast(None)
        frames = self._server.begin(step.index, step.clients, weights=weights, previous=previous)
        return frames if self._server.is_shared else self._ranks.broadcast(frames)

    def decode(self, step: Aggregate, answers: Answers) -> Tensor:
        """See :meth:`Exchange.decode`."""
        here = [each.client for each in step.updates if self.home(each.client) == self._ranks.rank]
        self._server.receive_all({client: self._payloads.pop(client) for client in here})
        is_here = self._server.is_shared or self._ranks.is_root
        asked = set[int]()
        while True:
            requests = self._server.requests() if is_here else {}
            asked |= requests.keys()
            found = answers(requests if self._ranks.is_root else None)
            if found is None:
                break
            self._server.receive_all(found)
        if is_here:
            mean = self._finish(len(asked)).to(self._device)
        else:
            mean = torch.empty(self._layout.numel, device=self._device)
        if not self._server.is_shared:
            self._ranks.broadcast_(mean)
        return mean

    def _finish(self, asked: int) -> Tensor:
        aggregate = self._server.finish()
        self._payloads = {}
        self.figures = {"bits": aggregate.bits, **vars(aggregate.traffic), **aggregate.report}
        self.figures["asked_clients"] = float(asked)
        return aggregate.mean

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Exchange.state_dict`."""
        return {**super().state_dict(), "server": self._server.state_dict(with_histories=False)}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """See :meth:`Exchange.load_state_dicts`."""
        super().load_state_dicts(states)
        self._server.load_state_dict(states[0]["server"])


class Singles(Exchange):
    """Clients that begin and end at any time, each decoded alone: a cohort of one."""

    has_rounds = False

    def __init__(
        self, uplink: Uplink, layout: Layout, seed: int, ranks: Ranks, device: torch.device
    ) -> None:
        super().__init__(uplink, layout, seed, ranks, device)
        self._begun: dict[int, int] = {}

    def begin(self, step: Start, previous: Tensor | None) -> dict[int, bytes]:
        """See :meth:`Exchange.begin`."""
        frames = dict[int, bytes]()
        for client in step.clients:
            self._begun[client] = step.index
            if self._ranks.is_root:
                frames |= self._begin(client)[1]
        return self._ranks.broadcast(frames)

    def decode(self, step: Aggregate, answers: Answers) -> Tensor:
        """See :meth:`Exchange.decode`."""
        total = torch.zeros(self._layout.numel)
        if self._ranks.is_root:
            self._decode_(total, step)
        total = total.to(self._device)
        self._ranks.broadcast_(total)
        return total

    def _decode_(self, total: Tensor, step: Aggregate) -> None:
        sent = told = 0
        errors = list[float]()
        for update in step.updates:
            server, _ = self._begin(update.client)
            payload = self._payloads.pop(update.client)
            server.receive(update.client, payload)
            weight = 1.0 if step.mixes else update.weight
            alone = server.finish()
            total.add_(alone.mean, alpha=weight)
            sent += len(payload)
            told += alone.traffic.downlink_bytes
            errors += [alone.report["nmse"]] if "nmse" in alone.report else []
        bits = 8 * sent / (self._layout.numel * len(step.updates)) if step.updates else 0.0
        self.figures = {"bits": bits, "uplink_bytes": float(sent), "downlink_bytes": float(told)}
        if errors:
            self.figures["nmse"] = statistics.fmean(errors)

    def _begin(self, client: int) -> tuple[Server, dict[int, bytes]]:
        server = self._uplink.server(self._layout, seed=self._seed)
        return server, server.begin(self._begun[client], [client])

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Exchange.state_dict`."""
        return {**super().state_dict(), "begun": dict(self._begun)}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """See :meth:`Exchange.load_state_dicts`."""
        super().load_state_dicts(states)
        self._begun = dict(states[0]["begun"])
