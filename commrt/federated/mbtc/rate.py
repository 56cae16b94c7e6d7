"""How fine each client's quantizer is in the next round: for a distortion, or for bits to spend."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from commrt.errors import ConfigError
from commrt.federated.allocation import (
    Allocation,
    allocate,
    allocate_distortion,
    allocate_total,
)
from commrt.federated.covariance import RANK, fit_factors
from commrt.federated.gaussian import FactorCovariance, diagonal
from commrt.federated.mbtc.parameters import LEAST_STEP, MOST_STEP
from commrt.ops.dither import SECOND_MOMENT

if TYPE_CHECKING:
    from commrt.federated.mbtc.spec import Mbtc

Floats = NDArray[np.float64]

MOST_BITS = 12.0
LEAST_BITS = 0.03
# How much of what a round tells replaces what was known.
NEWS = 0.5
# Of an energy, beside the usual one: noise hides what is less, and what is more is not believed.
LEAST_RELATIVE, MOST_RELATIVE = 0.05, 100.0
# Of the noise: there was nothing, but there may be something again.
LEAST_LEVEL = 1e-8
# Bits; heavy tails take less than the Gaussian region says.
LEAST_EXCESS = -2.0
# Of larger cohorts allocation takes a factor model of the covariance, which is faster.
MOST_DENSE = 16


class Energy(NamedTuple):
    """A weight's, without the quantizer's noise: of an update, and of what was not predicted."""

    update: float
    residual: float


_USUAL = Energy(1.0, 1.0)
_NOTHING = (0.0, 0.0)


class Coded(NamedTuple):
    """How a client's update was coded.

    Attributes:
        noise: Of the quantizer.
        bits: A weight.
        energy: As the server measured it.
        is_chosen: Whether the client has chosen the step.
    """

    noise: float
    bits: float
    energy: Energy
    is_chosen: bool


class Planned(NamedTuple):
    """The steps of a cohort's clients, 0 where they choose, and orders of decoding with shares."""

    steps: list[float]
    orders: Sequence[tuple[int, ...]] = ()
    shares: Sequence[float] = ()


def check_budgets(cohort: Sequence[int], budgets: Mapping[int, float] | None) -> None:
    """Raise :class:`ConfigError` unless each client has one, in (0, 12], or none does."""
    if budgets is None:
        return
    wrong = {
        client: budgets.get(client)
        for client in cohort
        if not 0 < budgets.get(client, 0) <= MOST_BITS
    }
    if wrong:
        raise ConfigError(f"budgets of clients are {wrong}: must be in (0, {MOST_BITS:g}]")


class RateControl:
    """Allocates rates among a round's clients, see :mod:`commrt.federated.allocation`.

    Without budgets of their own, clients get the noises that reach the distortion of ``nmse`` in
    the fewest bits, or the least distortion for ``bits`` on average. What a client takes beyond the
    region's rate, since lattices, tables and headers are not ideal, is learned round by round.
    """

    def __init__(self, codec: "Mbtc", numel: int) -> None:
        self._codec, self._numel = codec, numel
        self._level: Energy | None = None
        self._relative: dict[int, Energy] = {}
        self._excess: dict[int, float] = {}
        self._usual_excess = 0.0
        self._planned: dict[int, tuple[float, float]] = {}  # rates, and variances they are for

    def begin(
        self,
        cohort: Sequence[int],
        shares: Sequence[float],
        budgets: Mapping[int, float] | None,
        covariance: Floats | None,
    ) -> Planned:
        """Plan a round.

        Args:
            cohort: K clients.
            shares: Of each in the mean, which add up to one.
            budgets: Bits a weight of each client, or the codec's way.
            covariance: Of the clients' residuals, (K, K) up to a factor; None if they are decoded
                without each other.
        """
        self._planned = {}
        if self._level is None:
            return Planned([0.0] * len(cohort))
        allocation = self._allocate(cohort, np.array(shares), budgets, covariance)
        variances = self._energies(cohort)[:, 1].tolist()
        planned = zip(allocation.rates.tolist(), variances, strict=True)
        self._planned = dict(zip(cohort, planned, strict=True))
        steps = np.sqrt(allocation.noise / SECOND_MOMENT[self._codec.lattice])
        steps = np.clip(steps, LEAST_STEP, MOST_STEP).astype(np.float32)  # as they are sent
        return Planned(steps.tolist(), allocation.orders, allocation.shares)

    def learn(self, coded: Mapping[int, Coded]) -> None:
        """Take what a round's updates tell, by client."""
        energies = np.array([each.energy for each in coded.values()])
        noise = statistics.fmean(each.noise for each in coded.values())
        # Of what is measured of one update: of a mean of noise that is known but for its draw.
        deviation = noise * math.sqrt(2 / self._numel)
        # The median, since one client that is far off, or says so, is not to decide for all.
        found = np.median(energies, axis=0)
        least = max(LEAST_LEVEL * noise, LEAST_STEP**2)
        before = found if self._level is None else np.array(self._level)
        news = _credibility(found, before, deviation / math.sqrt(len(coded)))
        self._level = level = Energy(*np.maximum(before + news * (found - before), least).tolist())
        if found[0] <= least:
            return  # such a round says nothing of others
        self._learn_relative(list(coded), energies, deviation / level.update)
        self._learn_excess(coded)

    def _learn_relative(self, clients: Sequence[int], energies: Floats, deviation: float) -> None:
        known = np.array([self._relative.get(client, _USUAL) for client in clients])
        fresh = np.clip(energies / np.array(self._level), LEAST_RELATIVE, MOST_RELATIVE)
        news = _credibility(fresh, known, deviation)
        news[[client in self._relative for client in clients]] *= NEWS
        moved = (known + news * (fresh - known)).tolist()
        self._relative |= {
            client: Energy(*each) for client, each in zip(clients, moved, strict=True)
        }

    def _learn_excess(self, coded: Mapping[int, Coded]) -> None:
        now = self._energies(list(coded))[:, 1].tolist()
        for (client, each), residual in zip(coded.items(), now, strict=True):
            rate, variance = self._planned.get(client, _NOTHING)
            if each.is_chosen:
                rate, variance = _NOTHING
            # What is more to say, or less, than was planned for is no excess.
            rate += math.log2((1 + residual / each.noise) / (1 + variance / each.noise)) / 2
            excess = max(LEAST_EXCESS, min(MOST_BITS, each.bits - rate))
            known = self._excess.get(client, excess)
            self._excess[client] = known + NEWS * (excess - known)
        self._usual_excess = sum(self._excess[client] for client in coded) / len(coded)

    def state_dict(self) -> dict[str, Any]:
        """What was learned, between rounds."""
        return {
            "level": self._level and tuple(self._level),
            "relative": {client: tuple(each) for client, each in self._relative.items()},
            "excess": dict(self._excess),
            "usual_excess": self._usual_excess,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._level = state["level"] and Energy(*state["level"])
        self._relative = {client: Energy(*each) for client, each in state["relative"].items()}
        self._excess = dict(state["excess"])
        self._usual_excess = float(state["usual_excess"])

    def _allocate(
        self,
        cohort: Sequence[int],
        shares: Floats,
        budgets: Mapping[int, float] | None,
        covariance: Floats | None,
    ) -> Allocation:
        model = self._model(cohort, covariance)
        nmse, bits = self._codec.nmse, self._codec.bits
        if budgets is None and nmse is not None:
            energies = self._energies(cohort)[:, 0]
            distortion = nmse * float(shares**2 @ energies)
            return allocate_distortion(model, distortion, shares, unbiased=True)
        excess = np.array([self._excess.get(client, self._usual_excess) for client in cohort])
        allowed = np.array([bits if budgets is None else budgets[client] for client in cohort])
        rates = np.maximum(allowed - excess, LEAST_BITS)
        if budgets is None:
            return allocate_total(model, float(rates.sum()), shares, unbiased=True)
        return allocate(model, rates, shares, unbiased=True)

    def _model(self, cohort: Sequence[int], covariance: Floats | None) -> Floats | FactorCovariance:
        if covariance is None:
            variances = self._energies(cohort)[:, 1]
            return FactorCovariance(np.zeros((len(cohort), 1)), variances)
        assert self._level is not None
        covariance = covariance * (self._level.residual / diagonal(covariance).mean())
        return covariance if len(cohort) <= MOST_DENSE else fit_factors(covariance, RANK)

    def _energies(self, clients: Sequence[int]) -> Floats:
        """What is expected of clients, (K, 2): energies of updates and of residuals."""
        relative = [self._relative.get(client, _USUAL) for client in clients]
        energies: Floats = np.array(relative) * np.array(self._level)
        return energies


def _credibility(found: Floats, before: Floats, deviation: float) -> Floats:
    """How much of what was found, give or take a deviation, replaces what was known before."""
    size: Floats = np.maximum(np.abs(found), before) ** 2
    return size / (size + deviation**2)
