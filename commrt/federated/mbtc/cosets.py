"""Joint decoding, round by round: when to, with what, and what came of it."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commrt.codecs.entropy import code_length
from commrt.errors import ConfigError
from commrt.federated.covariance import CovarianceStore, successive_side_information
from commrt.federated.gaussian import Array
from commrt.federated.layout import Layout
from commrt.federated.mbtc import plan
from commrt.federated.mbtc.combine import lmmse_mean_
from commrt.federated.mbtc.ended import Ended
from commrt.federated.mbtc.parameters import Plane
from commrt.federated.mbtc.plan import Plan
from commrt.federated.mbtc.sharing import BITS, FAILED, WHOLE, JointDecoding
from commrt.federated.mbtc.side import ROUNDING
from commrt.federated.peers import Peers

if TYPE_CHECKING:
    from commrt.federated.mbtc.received import Received
    from commrt.federated.mbtc.spec import Mbtc

Floats = NDArray[np.float64]

# Of blocks, that cannot be decided at once: where more and fewer bits cost about the same.
WANTED_FAILURES = 0.05
MARGIN_STEP = 0.5
LEAST_MARGIN, MOST_MARGIN = -0.5, 1.0
# Of larger cohorts no covariance is kept: they are coded without each other.
MOST_CLIENTS = 64
# Of so many clients, those that came last, covariances are kept.
MOST_KNOWN = 256
# Rounds that a group is coded alone after its cosets were not worth it.
REST = 8


class Record:
    """What was learned of a group in the rounds before.

    Attributes:
        excess: Bits a weight that its codes take without the other clients, beyond those that a
            Gaussian of their variance needs: of steps to come, too.
        margin: Of the bits that are sent beyond the entropy, how many more, as a share.
        rest: Rounds in which it is to be coded alone.
    """

    def __init__(self) -> None:
        self.excess, self.margin, self.rest = 0.0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Its attributes."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if state.keys() != vars(self).keys():
            raise ValueError(f"a record has {sorted(state)}: must have {sorted(vars(self))}")
        vars(self).update(state)

    def learn(self, failed: float, gain: float, least_gain: float) -> None:
        """Take the share of blocks that failed at first, and the bits a weight that were saved."""
        margin = self.margin + MARGIN_STEP * (failed - WANTED_FAILURES)
        self.margin = max(LEAST_MARGIN, min(MOST_MARGIN, margin))
        if gain < least_gain:
            self.rest = REST


class Cosets:
    """See the module."""

    def __init__(self, codec: "Mbtc", layout: Layout) -> None:
        self._codec, self._layout = codec, layout
        self.covariances = [CovarianceStore(most_clients=MOST_KNOWN) for _ in layout.groups]
        self._records = [Record() for _ in layout.groups]
        self._was_joint = False

    def covariance(self, clients: Sequence[int]) -> Array | None:
        """Of residuals, on average over the groups; None unless some were decoded jointly."""
        if not self._was_joint or len(clients) > MOST_CLIENTS:
            return None
        total = sum(
            group.numel * self._covariance(index, clients)
            for index, group in enumerate(self._layout.groups)
        )
        return total / self._layout.numel

    def begin(self, cohort: Sequence[int], steps: Sequence[float], order: Sequence[int]) -> Plan:
        """What is decoded jointly.

        Args:
            cohort: The clients.
            steps: Of each, 0 where it chooses.
            order: Of decoding, places.
        """
        if len(cohort) > MOST_CLIENTS:
            return Plan(order, [((),) * len(self._records)] * len(cohort), {})
        by_group, covariances = [], dict[int, Array]()
        for index, record in enumerate(self._records):
            covariance = self._covariance(index, cohort) if self._may_pay(index, steps) else None
            planes: list[tuple[Plane, ...]] = [()] * len(cohort)
            if covariance is not None:
                planes = self._planes_of(record, covariance, steps, order)
            by_group.append(planes)
            if covariance is not None and any(planes):
                covariances[index] = covariance
        return Plan(order, list(zip(*by_group, strict=True)), covariances)

    def check(self, cohort: Sequence[int]) -> None:
        """Raise :class:`ConfigError` for a cohort that is too large."""
        if self._codec.combine == "lmmse" and len(cohort) > MOST_CLIENTS:
            raise ConfigError(
                f"combine='lmmse' of {len(cohort)} clients: must be {MOST_CLIENTS} at most"
            )

    def refine_(
        self, mean: Tensor, shares: Sequence[float], ended: Sequence[Ended], peers: Peers
    ) -> dict[str, float]:
        """Make ``mean`` what is asked for, at all peers; the first one's figures of it.

        That is, with ``combine="lmmse"``, the linear estimate of least error, unless a block is
        missing, and the expected alignment, on average over all elements.
        """
        if self._codec.combine == "mean":
            return {}
        report, frames = dict[str, float](), None
        if peers.rank == 0:
            report["alignment"] = self._estimate_(mean, shares, ended)
            frames = {0: mean.numpy().tobytes()} if peers.size > 1 else {}
        for estimate in peers.broadcast(frames).values():
            mean.copy_(torch.frombuffer(bytearray(estimate), dtype=torch.float32))
        return report

    def _estimate_(self, mean: Tensor, shares: Sequence[float], ended: Sequence[Ended]) -> float:
        if not self.covariances[0].clients or any(each.missing for each in ended):
            return 1.0
        clients, noise, residuals = _stacked(ended)
        predicted = torch.stack([each.predicted for each in ended if each.predicted is not None])
        total = 0.0
        for index, group in enumerate(self._layout.groups):
            covariance = self._covariance(index, clients)
            alignment = lmmse_mean_(
                mean, group, np.array(shares), residuals, predicted, covariance, noise
            )
            total += alignment * group.numel
        return total / self._layout.numel

    def bits_alone(self, update: "Received") -> tuple[float, ...]:
        """Bits a weight that the codes of each group take without the other clients.

        Empty where that is all they ever do.
        """
        if self._codec.joint == "off":
            return ()
        codes, rows = update.codes, update.how.rows
        return tuple(
            code_length(group.of(codes), group.of(rows)) / group.numel
            for group in self._layout.groups
        )

    def learn(
        self, cohort: Sequence[int], ended: Sequence[Ended], joint: JointDecoding
    ) -> dict[str, float]:
        """End the round: take what it tells for the next, and return figures of it."""
        figures = {
            "joint_groups": float(len(joint.plan.covariances)),
            "missing_blocks": float(sum(each.missing for each in ended)),
        }
        self._was_joint = joint.is_running
        for record in self._records:
            record.rest = max(0, record.rest - 1)
        if len(cohort) > MOST_CLIENTS:
            return figures
        clients, noise, residuals = _stacked(ended)
        places = [cohort.index(client) for client in clients]
        limits = np.zeros(2)
        for index, (record, group) in enumerate(
            zip(self._records, self._layout.groups, strict=True)
        ):
            alone = {
                place: each.bits_alone[index]
                for place, each in zip(places, ended, strict=True)
                if each.bits_alone
            }
            if index in joint.plan.covariances:
                self._learn_cosets(index, alone, joint)
            self.covariances[index].update(clients, group.of(residuals).numpy(), noise)
            covariance = self._covariance(index, clients)
            if alone:
                needed = _bits_alone(covariance, noise)
                record.excess = sum(alone.values()) / len(alone) - float(needed.mean())
            limits += group.numel * np.array(_limits(covariance, noise))
        independent, jointly = limits / self._layout.numel
        return {
            "limit_independent": float(independent),
            "limit_joint": float(jointly),
            **figures,
        }

    def state_dict(self) -> dict[str, Any]:
        """What was learned, between rounds."""
        return {
            "covariances": [
                {name: torch.from_numpy(array) for name, array in each.state_dict().items()}
                for each in self.covariances
            ],
            "records": [each.state_dict() for each in self._records],
            "was_joint": self._was_joint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for covariances, each in zip(self.covariances, state["covariances"], strict=True):
            covariances.load_state_dict({name: flat.numpy() for name, flat in each.items()})
        for record, each in zip(self._records, state["records"], strict=True):
            record.load_state_dict(each)
        self._was_joint = bool(state["was_joint"])

    def _may_pay(self, index: int, steps: Sequence[float]) -> bool:
        """Whether joint decoding of a group is to be thought of."""
        is_on = self._codec.joint != "off" and min(steps) > 0 and not self._records[index].rest
        is_known = bool(self.covariances[index].clients)
        return is_on and is_known and self._layout.groups[index].numel >= self._codec.block

    def _planes_of(
        self,
        record: Record,
        covariance: Array,
        steps: Sequence[float],
        order: Sequence[int],
    ) -> list[tuple[Plane, ...]]:
        noise = np.square(steps) * ROUNDING
        _, variances = successive_side_information(covariance, noise, order)
        alone = _bits_alone(covariance, noise) + record.excess
        return plan.planes_of_group(
            self._codec, np.sqrt(variances) / steps, order, alone, record.margin
        )

    def _covariance(self, index: int, clients: Sequence[int]) -> Array:
        """Of a group's residuals, as far as it is known; some round has ended."""
        return self.covariances[index].estimate(clients)

    def _learn_cosets(self, index: int, alone: Mapping[int, float], joint: JointDecoding) -> None:
        """What a group's cosets came to; ``alone`` has the bits of codes without, by place."""
        block, record = self._codec.block, self._records[index]
        group, counts = self._layout.groups[index], joint.counts[index].tolist()
        planes = {place: joint.plan.planes[place][index] for place in alone}
        sent = {place: plan.bits_of(each, block) for place, each in planes.items() if each}
        failed = gain = 0.0
        if sent:
            saved = sum(alone[place] - bits for place, bits in sent.items())
            usual = sum(alone.values()) / len(alone)
            asked = counts[BITS] + round(usual * block) * counts[WHOLE]
            failed = counts[FAILED] / (group.numel // block * len(sent))
            gain = (saved - asked / group.numel) / len(sent)
        record.learn(failed, gain, self._codec.least_gain)


def _stacked(ended: Sequence[Ended]) -> tuple[list[int], Floats, Tensor]:
    """The clients, the variances of their noises, and their residuals, fp32 (K, N)."""
    clients = [each.client for each in ended]
    noise = np.array([each.coded.noise for each in ended])
    return clients, noise, torch.stack([_there(each.residual) for each in ended])


def _there(residual: Tensor | None) -> Tensor:
    assert residual is not None
    return residual


def _limits(covariance: Floats, noise: Floats) -> tuple[float, float]:
    """Bits a weight and client that Gaussian residuals need: without each other, and jointly.

    The latter is :func:`commrt.federated.limits.sum_rate`, for a covariance that is dense.
    """
    _, log_det = np.linalg.slogdet(np.eye(len(noise)) + covariance / noise)
    alone = _bits_alone(covariance, noise)
    return float(alone.mean()), float(log_det) / (2 * math.log(2) * len(noise))


def _bits_alone(covariance: Floats, noise: Floats) -> Floats:
    """Bits a weight that each client's Gaussian residual needs without the others."""
    bits: Floats = np.log2(1 + np.diagonal(covariance) / noise) / 2
    return bits
