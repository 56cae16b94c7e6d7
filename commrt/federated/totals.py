"""One rate for all clients together: how it is best divided, and the least that reaches an error.

Berger–Tung's sum rate, ``ln det(I + Sigma P) / (2 ln2)`` bits, is concave in the precisions p; its
tangent at the present point, with slopes M_kk of ``M = (Sigma^-1 + P)^-1``, lies above it. At the
least distortion for that tangent, the slopes -dD/dp_k are proportional to M_kk for all clients that
speak. So each pass multiplies the precisions by a power of
``sqrt(-dD/dp_k / M_kk)`` and scales them to the budget: with power 1 the fixed point of
majorisation-minimisation, with larger ones, tried while they gain, the same point sooner.
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
        return self._minimise(lambda p: -self._fidelity(p)[0], self._log_det, nats)

    def to_distortion(self, distortion: float) -> Array:
        """Precisions (K,) of least rate that reach a distortion, which silence does not."""
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
