"""One rate for all clients together: how it is best divided, and the least that reaches an error.

Berger–Tung's sum rate, ``ln det(I + Sigma P) / (2 ln2)`` bits, is concave in the precisions p; its
tangent at the present point, with slopes M_kk of ``M = (Sigma^-1 + P)^-1``, lies above it. At the
least distortion for that tangent, the slopes -dD/dp_k are proportional to M_kk for all clients that
speak. So each pass multiplies the precisions by a power of
``sqrt(-dD/dp_k / M_kk)`` and scales them to the budget: with power 1 the fixed point of
majorisation-minimisation, with larger ones, tried while they gain, the same point sooner.

Where clients tell nothing of each other, and the mean is unbiased, the best noises q of variances v
have ``q (q + v) = m v / w^2`` with one multiplier m for all, which Newton's method finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from commrt.federated.gaussian import Array, FactorCovariance, array_namespace, see

Measure = Callable[[Array], tuple[float, float]]  # with its slope in the logarithm of the scale

_PASSES = 2000
_GAIN = 1e-10  # nats; a smaller one, with power 1, ends the search
_FASTER = 2.0  # the next power, after a gain
_LEAST_FACTOR = 1e-6  # of one pass
_SILENT = 1e-7  # signal to noise of a client that is not worth its bits
_EXACT = 1e-13  # of the budget
_SCALINGS, _LARGEST_STEP = 100, 4.0


class Division:
    """Chooses precisions for the least distortion of the mean, or for the least rate.

    Args:
        model: Covariance of K clients.
        weights: Of the mean, (K,), not all of clients without variance.
        unbiased: The distortion is that of the plain mean of the U_k, ``sum w_k^2 / precision_k``.
    """

    def __init__(self, model: FactorCovariance, weights: Array, *, unbiased: bool) -> None:
        self._model, self._weights, self._unbiased = model, weights, unbiased

    def of_rate(self, nats: float) -> Array:
        """Precisions (K,) of least distortion with ``ln det(I + Sigma P)`` of so many nats."""
        if self._unbiased and self._model.is_diagonal:
            return _Apart(self._model.unique, self._weights).of_rate(nats)
        return self._minimise(lambda p: -self._fidelity(p)[0], self._log_det, nats)

    def to_distortion(self, distortion: float) -> Array:
        """Precisions (K,) of least rate that reach a distortion, which silence does not."""
        if self._unbiased and self._model.is_diagonal:
            return _Apart(self._model.unique, self._weights).to_distortion(distortion)
        return self._minimise(lambda p: self._log_det(p)[0], self._fidelity, -math.log(distortion))

    def _minimise(self, loss: Callable[[Array], float], budget: Measure, target: float) -> Array:
        precision = _scaled(self._start(), budget, target)
        value, power = loss(precision), 1.0
        for _ in range(_PASSES):
            found = _scaled(precision * self._factor(precision, power), budget, target)
            found_value = loss(found)
            gain = value - found_value
            if gain > 0:
                precision, value = found, found_value
            if gain < _GAIN and power == 1.0:
                break
            power = power * _FASTER if gain >= _GAIN else 1.0
        return precision if self._unbiased else self._without_faint(precision, budget, target)

    def _start(self) -> Array:
        """The same signal to noise for all clients."""
        xp = array_namespace(self._weights)
        variances = self._model.variances
        heard = variances > 0
        if self._unbiased:
            heard = heard & (self._weights != 0)
        return xp.where(heard, 1 / xp.where(heard, variances, 1.0), 0.0)

    def _factor(self, precision: Array, power: float) -> Array:
        """By which a pass multiplies the precisions, at most 1."""
        xp = array_namespace(precision)
        seen = see(self._model, precision).covariance
        if self._unbiased:
            slope = xp.abs(self._weights) / xp.where(precision > 0, precision, math.inf)
        else:
            slope = xp.abs(seen.times(self._weights))
        ratio = slope / xp.sqrt(xp.where(seen.variances > 0, seen.variances, math.inf))
        factor = (ratio / xp.max(ratio)) ** power
        return xp.where(factor > _LEAST_FACTOR, factor, _LEAST_FACTOR)

    def _without_faint(self, precision: Array, budget: Measure, target: float) -> Array:
        xp = array_namespace(precision)
        faint = precision * self._model.variances < _SILENT
        return _scaled(xp.where(faint, 0.0, precision), budget, target)

    def _log_det(self, precision: Array) -> tuple[float, float]:
        xp = array_namespace(precision)
        seen = see(self._model, precision)
        return float(seen.log_det), float(xp.sum(seen.covariance.variances * precision))

    def _fidelity(self, precision: Array) -> tuple[float, float]:
        """``-ln D``."""
        xp = array_namespace(precision)
        if self._unbiased:
            heard = xp.where(precision > 0, precision, math.inf)
            return -math.log(float(xp.sum(self._weights**2 / heard))), 1.0
        seen = see(self._model, precision).covariance
        distortion = float(seen.quadratic(self._weights))
        slope = float(xp.sum(precision * seen.times(self._weights) ** 2)) / distortion
        return -math.log(distortion), slope


class _Apart:
    """Independent clients and an unbiased mean.

    Args:
        variances: (K,).
        weights: (K,); clients that have none, or none to speak of, or do not vary, are silent.
    """

    def __init__(self, variances: Array, weights: Array) -> None:
        xp = array_namespace(variances)
        squares = weights**2
        self._speaks = variances * squares > 0
        self._variances = xp.where(self._speaks, variances, 1.0)
        self._weights = xp.where(self._speaks, squares, 1.0)
        self._counts = xp.astype(self._speaks, xp.float64)

    def of_rate(self, nats: float) -> Array:
        """See :meth:`Division.of_rate`."""
        xp = array_namespace(self._weights)
        least = float(xp.min(self._variances * self._weights))
        return self._solved(self._log_det, nats, math.log(least) - _log_expm1(nats))

    def to_distortion(self, distortion: float) -> Array:
        """See :meth:`Division.to_distortion`."""
        log_distortion = math.log(distortion)
        return self._solved(self._log_distortion, log_distortion, log_distortion)

    def _solved(
        self, measure: Callable[[float], tuple[float, float]], to: float, at: float
    ) -> Array:
        """The precisions at the multiplier, whose logarithm is ``at`` or more, that has a measure.

        The logarithm of the distortion has slopes from 1/2 to 1, the rate is convex and falls: of
        both Newton's method finds every value.
        """
        for _ in range(_SCALINGS):
            value, slope = measure(at)
            if abs(value - to) <= _EXACT * max(1.0, abs(to)) or slope == 0:
                break
            at += (to - value) / slope
        xp = array_namespace(self._weights)
        return xp.where(self._speaks, 1 / self._noise(at)[0], 0.0)

    def _log_det(self, log_multiplier: float) -> tuple[float, float]:
        xp = array_namespace(self._weights)
        noise, root = self._noise(log_multiplier)
        rate = xp.sum(self._counts * xp.log1p(self._variances / noise))
        return float(rate), -float(xp.sum(self._counts * self._variances / root))

    def _log_distortion(self, log_multiplier: float) -> tuple[float, float]:
        xp = array_namespace(self._weights)
        noise, root = self._noise(log_multiplier)
        distortion = float(xp.sum(self._counts * self._weights * noise))
        moved = float(xp.sum(self._counts * self._variances / root))
        return math.log(distortion), math.exp(log_multiplier) * moved / distortion

    def _noise(self, log_multiplier: float) -> tuple[Array, Array]:
        """q, and sqrt(v^2 + 4 m v / w^2), by which it is that without cancelling."""
        xp = array_namespace(self._weights)
        reach = math.exp(log_multiplier) / self._weights
        root = xp.sqrt(self._variances * (self._variances + 4 * reach))
        return 2 * self._variances * reach / (self._variances + root), root


def _log_expm1(nats: float) -> float:
    return nats + math.log(-math.expm1(-nats))


def _scaled(precision: Array, budget: Measure, target: float) -> Array:
    """The precisions times the factor at which a budget, increasing in it, is just met.

    Newton's method in the factor's logarithm, which halves an interval where it would leave it.
    """
    low, high, log_factor = -math.inf, math.inf, 0.0
    for _ in range(_SCALINGS):
        value, slope = budget(precision * math.exp(log_factor))
        if abs(value - target) <= _EXACT * max(1.0, abs(target)):
            break
        low, high = (log_factor, high) if value < target else (low, log_factor)
        limit = _LARGEST_STEP * max(slope, 1e-300)
        log_factor += max(-limit, min(limit, target - value)) / max(slope, 1e-300)
        if not low < log_factor < high:
            log_factor = (low + high) / 2
    return precision * math.exp(log_factor)
