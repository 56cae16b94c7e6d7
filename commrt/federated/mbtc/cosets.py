"""The server's joint decoding, round by round: when to, with what, and what came of it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commrt.codecs.entropy import code_length
from commrt.federated.layout import Group, Layout
from commrt.federated.mbtc import plan
from commrt.federated.mbtc.joint import JointGroup
from commrt.federated.mbtc.parameters import Plane
from commrt.federated.mbtc.planes import Blocks
from commrt.federated.mbtc.requests import Wanted
from commrt.federated.mbtc.side import ROUNDING

if TYPE_CHECKING:
    from commrt.federated.mbtc.received import Received
    from commrt.federated.mbtc.spec import Mbtc

# Of blocks, that cannot be decided at once: where more and fewer bits cost about the same.
WANTED_FAILURES = 0.05
MARGIN_STEP = 0.05
LEAST_MARGIN, MOST_MARGIN = -0.05, 0.1
# Rounds that a group is coded alone after its cosets were not worth it.
REST = 8


class Record:
    """What was learned of a group in the rounds before.

    Attributes:
        bits_alone: Bits a weight that its codes take without the other clients.
        margin: Bits a bit to send beyond what is needed on average.
        rest: Rounds in which it is to be coded alone.
    """

    def __init__(self) -> None:
        self.bits_alone, self.margin, self.rest = 0.0, 0.0, 0

    def learn(self, failed: float, gain: float, least_gain: float) -> None:
        """Take the share of blocks that failed at first, and the bits a weight that were saved."""
        margin = self.margin + MARGIN_STEP * (failed - WANTED_FAILURES)
        self.margin = max(LEAST_MARGIN, min(MOST_MARGIN, margin))
        if gain < least_gain:
            self.rest = REST


class Running:
    """A group whose cosets are decoded in this round."""

    def __init__(
        self, joint: JointGroup, planes: Sequence[tuple[Plane, ...]], order: Sequence[int]
    ) -> None:
        self.joint, self.planes, self.order = joint, planes, order
        self.tried: dict[int, int] = {}
        self.bits_asked = 0

    def decode(self, index: int, received: "Mapping[int, Received]") -> None:
        """Decide what can be of group ``index`` of the clients that came, by place."""
        for place in self.order:
            update = received.get(place)
            if update is None:
                continue
            if not self.planes[place]:
                if place not in self.tried:
                    self.joint.add_alone(place, update.how, update.alone)
                    self.tried[place] = 0
                continue
            blocks = update.blocks[index]
            self.joint.decide(place, update.how, blocks)
            self.tried.setdefault(place, int((~blocks.is_whole).sum()))

    def failed(self, num_blocks: int) -> float:
        """The share of blocks that could not be decided at first."""
        places = [place for place in self.tried if self.planes[place]]
        total = num_blocks * len(places)
        return sum(self.tried[place] for place in places) / total if total else 0.0


class Cosets:
    """See the module."""

    def __init__(self, codec: "Mbtc", layout: Layout) -> None:
        self._codec, self._layout = codec, layout
        self.covariances = [Covariances() for _ in layout.groups]
        self._records = [Record() for _ in layout.groups]
        self._running: dict[int, Running] = {}

    def begin(
        self, round_index: int, cohort: Sequence[int], step: float
    ) -> list[tuple[tuple[Plane, ...], ...]]:
        """The planes of each client and group, in the order of the cohort."""
        order = plan.order_of(len(cohort), round_index)
        self._running = {}
        by_group = []
        for index, record in enumerate(self._records):
            planes = self._planes_of(index, cohort, order, step)
            record.rest = max(0, record.rest - 1)
            by_group.append(planes)
            if any(planes):
                covariance = self.covariances[index].of(cohort)
                assert covariance is not None
                joint = JointGroup(self._layout.groups[index], self._codec.block, covariance)
                self._running[index] = Running(joint, planes, order)
        return list(zip(*by_group, strict=True))

    def decode(self, received: "Mapping[int, Received]") -> None:
        """Decide what can be of the updates that came, by place in the cohort."""
        for index, running in self._running.items():
            running.decode(index, received)

    def wanted(self, received: "Received") -> list[Wanted]:
        """What to ask a client for."""
        wanted = []
        for index in self._running:
            blocks = received.blocks[index]
            for which in (~blocks.is_whole).nonzero()[:, 0].tolist():
                wanted.append(Wanted(index, which, *blocks.lacking(which)))
        return wanted

    def take(self, wanted: Wanted, answer: bytes | Tensor, blocks: Blocks) -> None:
        """Take what a client answered."""
        running = self._running[wanted.group]
        if isinstance(answer, bytes):
            blocks.add(wanted.block, wanted.plane, answer)
            running.bits_asked += 8 * len(answer)
        else:
            blocks.replace(wanted.block, answer)
            running.bits_asked += round(self._records[wanted.group].bits_alone * blocks.block)

    def learn(
        self,
        cohort: Sequence[int],
        received: "Mapping[int, Received]",
        codes: Mapping[int, Tensor],
        updates: Mapping[int, Tensor],
    ) -> dict[str, float]:
        """End the round: take what it tells for the next, and return figures of it."""
        places = sorted(received)
        clients = [cohort[place] for place in places]
        residuals = torch.stack([updates[p] - received[p].how.predicted for p in places])
        noise = np.array([received[p].how.step ** 2 * ROUNDING for p in places])
        for index, (record, group) in enumerate(
            zip(self._records, self._layout.groups, strict=True)
        ):
            alone = {p: self._bits_alone(group, received[p], codes[p]) for p in places}
            record.bits_alone = sum(alone.values()) / len(alone)
            part = group.of(residuals).double()
            moments = (part @ part.T / group.numel).numpy() - np.diag(noise)
            self.covariances[index].learn(clients, moments)
            running = self._running.get(index)
            if running is not None:
                blocks = group.numel // self._codec.block
                gain = self._gain(running, group, alone)
                record.learn(running.failed(blocks), gain, self._codec.least_gain)
        return {"joint_groups": float(len(self._running))}

    def _planes_of(
        self, index: int, cohort: Sequence[int], order: Sequence[int], step: float
    ) -> list[tuple[Plane, ...]]:
        record, covariance = self._records[index], self.covariances[index].of(cohort)
        is_on = self._codec.joint == "auto" and step > 0 and not record.rest
        if not is_on or covariance is None or self._layout.groups[index].numel < self._codec.block:
            return [()] * len(cohort)
        noise = np.full(len(cohort), step * step * ROUNDING)
        return plan.planes_of_group(
            self._codec, covariance, noise, order, record.bits_alone, record.margin
        )

    def _bits_alone(self, group: Group, update: "Received", codes: Tensor) -> float:
        return code_length(group.of(codes), group.of(update.how.rows)) / group.numel

    def _gain(self, running: Running, group: Group, alone: Mapping[int, float]) -> float:
        """Bits a weight that cosets of a group saved to the clients that sent them."""
        sent = {
            place: plan.bits_of(running.planes[place], self._codec.block)
            for place in alone
            if running.planes[place]
        }
        if not sent:
            return 0.0
        saved = sum(alone[place] - bits for place, bits in sent.items())
        return (saved - running.bits_asked / group.numel) / len(sent)


class Covariances:
    """Of a group's residuals, between clients."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], tuple[float, float]] = {}

    def learn(self, clients: Sequence[int], moments: NDArray[np.float64]) -> None:
        for i, a in enumerate(clients):
            for j, b in enumerate(clients):
                total, weight = self._sums.get((a, b), (0.0, 0.0))
                self._sums[a, b] = (0.9 * total + moments[i, j], 0.9 * weight + 1)

    def of(self, clients: Sequence[int]) -> NDArray[np.float64] | None:
        if not all((a, a) in self._sums for a in clients):
            return None
        sums = [[self._sums.get((a, b), (0.0, 1.0)) for b in clients] for a in clients]
        matrix = np.array([[t / w for t, w in row] for row in sums])
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.maximum(values, 1e-4 * values[-1])) @ vectors.T
