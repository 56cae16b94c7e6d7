"""How few bits could do: limits of coding a cohort's updates, for jointly Gaussian ones.

Point to point
    each client is decoded alone; what entropy-coded dithered quantisers need at most.
Berger–Tung
    clients code separately, the server decodes jointly: U_k = X_k + Z_k with Z_k ~ N(0, noise_k).
    Rates are achievable if, for every set A of clients, sum_A R_k >= I(X_A; U_A | U_others). The
    corners of that region are successive decodings, clients before serving as side information.
Co-operative
    clients know each other's updates: a bound on every scheme.

Rates are bits a coordinate, distortions mean squared errors a coordinate of ``sum_k w_k X_k``,
noises variances (infinity: a silent client). A covariance is an array (K, K) or a
:class:`FactorCovariance`.

Source: Berger, "Multiterminal source coding", and Tung's thesis, both 1978 (the inner bound); Cover
and Thomas, "Elements of Information Theory", 2nd edition, theorem 10.3.3 (reverse water-filling);
Zamir and Feder, "On universal quantization by randomized uniform/lattice quantizers", IEEE Trans.
Inf. Theory 38(2), 1992 (dithered quantisers); the federated use: arXiv 2204.10985.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from commrt.errors import ConfigError
from commrt.federated.gaussian import (
    Array,
    Decoding,
    FactorCovariance,
    array_namespace,
    factored,
    order_of,
    precision_of,
    see,
    weights_of,
)

SCALAR_MOMENT = 1 / 12  # of an interval: second moment a dimension at unit volume
E8_MOMENT = 929 / 12960  # of E8's cell: Conway and Sloane, "Sphere Packings", table 2.3
MAX_SUBSETS_OF = 16  # clients; their subsets are listed

_BITS = 0.5 / math.log(2)  # of a log det in nats
_HALVINGS = 200
_LARGEST_LOG = 700.0  # whose exponential float64 holds


def lattice_offset(moment: float) -> float:
    """Bits by which a dithered lattice quantiser may exceed Gaussian noise of its variance.

    0.254 for intervals, 0.146 for E8.

    Args:
        moment: Of the lattice's cell, normalised, see `SCALAR_MOMENT` and `E8_MOMENT`.
    """
    return 0.5 * math.log2(2 * math.pi * math.e * moment)


def quantiser_rate(variance: Array, noise: Array, moment: float = SCALAR_MOMENT) -> Array:
    """What an entropy-coded dithered quantiser needs at most, given the dither, in bits.

    Args:
        variance: Of what is quantised, whatever its distribution; of residuals, with prediction.
        noise: Variance of the quantiser's error: step^2 / 12 for intervals.
        moment: Of the lattice's cell.
    """
    xp = array_namespace(variance)
    return _BITS * xp.log1p(variance / noise) + lattice_offset(moment)


def independent_rates(
    variances: Array, distortion: float, weights: Array | None = None, *, unbiased: bool = False
) -> Array:
    """The fewest bits in all at which clients decoded one by one reach a distortion of the mean.

    Estimates that minimise the error are shrunk; then the errors of independent updates are
    ``sum_k w_k^2 D_k`` and reverse water-filling is optimal: ``w_k^2 D_k = min(level, w_k^2
    variance_k)``. Unbiased ones, ``U_k`` itself, cost more, ``log2(1 + variance_k / noise_k) / 2``,
    and their errors do not add up whatever the correlation; there
    ``w_k^2 noise_k (1 + noise_k / variance_k)`` is the same for all.

    Args:
        variances: Of the updates, (K,).
        distortion: Of the weighted mean, above 0.
        weights: (K,); None is 1 / K each.
        unbiased: Which of the two.

    Returns:
        Rates (K,), 0 for clients that stay silent.

    Raises:
        ConfigError: The distortion is not positive, or shapes do not fit.
    """
    xp = array_namespace(variances)
    _require_positive(distortion)
    variances = xp.astype(variances, xp.float64)
    share = weights_of(weights, variances) ** 2 * variances
    speaking = share > 0
    divisor = xp.where(speaking, share, 1.0)

    def errors(level: float) -> Array:
        if unbiased:  # the root t of t (1 + t / share) = level
            return 2 * level / (1 + xp.sqrt(1 + 4 * level / divisor))
        return xp.where(share < level, share, level)

    def total(level: float) -> float:
        return float(xp.sum(xp.where(speaking, errors(level), 0.0)))

    smallest = float(xp.min(xp.where(speaking, share, math.inf)))
    level = _solve_increasing(total, distortion, 0.0, distortion * (1 + distortion / smallest))
    ratio = share / xp.where(speaking, errors(level), 1.0)
    return _BITS * (xp.log1p(ratio) if unbiased else xp.log(xp.where(ratio > 1, ratio, 1.0)))


def subset_rates(covariance: Array | FactorCovariance, noise: Array) -> Array:
    """``I(X_A; U_A | U_others)`` for every set A of clients: what A has to send together.

    Args:
        covariance: Of K clients, K at most 16.
        noise: (K,).

    Returns:
        Bits (2^K,); client k belongs to A if bit k of A's index is set. The region is what
        fulfils ``sum_A R_k >= subset_rates[A]`` for all A.

    Raises:
        ConfigError: Too many clients, or shapes do not fit.
    """
    model = factored(covariance)
    xp = array_namespace(model.unique)
    num_clients = model.unique.shape[0]
    precision = precision_of(noise, model.unique)
    others = 1 - subset_members(xp, num_clients)
    return _BITS * (see(model, precision).log_det - see(model, others * precision).log_det)


def subset_members(xp: Any, num_clients: int) -> Array:
    """1.0 where client k belongs to set A, 0.0 elsewhere: float64 (2^K, K), see `subset_rates`."""
    if num_clients > MAX_SUBSETS_OF:
        raise ConfigError(f"{num_clients} clients: subsets are listed of {MAX_SUBSETS_OF} at most")
    index = xp.arange(2**num_clients)[:, None]
    return xp.astype((index >> xp.arange(num_clients)) & 1, xp.float64)


def corner_rates(covariance: Array | FactorCovariance, noise: Array, order: Sequence[int]) -> Array:
    """Rates of successive decoding, ``log2(1 + v_k / noise_k) / 2``, v_k given the ones before.

    Args:
        covariance: Of K clients.
        noise: (K,).
        order: All clients, the first to be decoded first.

    Returns:
        Bits (K,), of client k at k. O(K r^2), or O(K^3) for a dense covariance.

    Raises:
        ConfigError: The order is no permutation, or shapes do not fit.
    """
    model = factored(covariance)
    precision = precision_of(noise, model.unique)
    clients = order_of(order, model.unique)
    xp = array_namespace(precision)
    if model.is_diagonal:
        return _BITS * xp.log1p(model.unique * precision)
    decoding = Decoding(model)
    rates = xp.zeros_like(precision)
    for i, client in enumerate(order):
        sight, seen = decoding.look(clients[i : i + 1]), precision[client : client + 1]
        decoding.learn(sight, seen)
        rates[client] = _BITS * xp.log1p(sight.variance * seen)[0]
    return rates


def shared_rates(
    covariance: Array | FactorCovariance,
    noise: Array,
    orders: Sequence[Sequence[int]],
    shares: Sequence[float],
) -> Array:
    """Rates (K,) of several orders that share the coordinates: the mean of their corners.

    Args:
        covariance: Of K clients.
        noise: (K,).
        orders: Each as for `corner_rates`.
        shares: Of each order, summing to 1.
    """
    model = factored(covariance)
    corners = [corner_rates(model, noise, order) for order in orders]
    return sum(share * corner for share, corner in zip(shares, corners, strict=True))


def sum_rate(covariance: Array | FactorCovariance, noise: Array) -> float:
    """``I(X; U)``: bits a coordinate of all clients together, the same at every corner."""
    model = factored(covariance)
    return _BITS * float(see(model, precision_of(noise, model.unique)).log_det)


def combine_weights(
    covariance: Array | FactorCovariance, noise: Array, weights: Array | None = None
) -> Array:
    """Weights (K,) of the U_k in the mean's linear estimate of least error; see `combine_bias`."""
    model = factored(covariance)
    precision = precision_of(noise, model.unique)
    target = weights_of(weights, model.unique)
    return precision * see(model, precision).covariance.times(target)


def distortion(
    covariance: Array | FactorCovariance, noise: Array, weights: Array | None = None
) -> float:
    """Error of the mean estimated by `combine_weights`: ``w^T (Sigma^-1 + diag(1/noise))^-1 w``."""
    model = factored(covariance)
    left = see(model, precision_of(noise, model.unique)).covariance
    return float(left.quadratic(weights_of(weights, model.unique)))


def unbiased_distortion(noise: Array, weights: Array | None = None) -> float:
    """Error of the plain mean ``sum_k w_k U_k``: infinite if a client that has weight is silent."""
    xp = array_namespace(noise)
    precision = precision_of(noise, noise)
    target = weights_of(weights, precision)
    heard = xp.where(target == 0, 1.0, precision)
    return float(xp.sum(target**2 / heard)) if bool(xp.all(heard > 0)) else math.inf


def combine_bias(
    covariance: Array | FactorCovariance, noise: Array, weights: Array | None = None
) -> float:
    """The part b of the mean S that `combine_weights` takes away: ``E[S S_hat] = (1-b) E[S^2]``."""
    model = factored(covariance)
    size = float(model.quadratic(weights_of(weights, model.unique)))
    return distortion(model, noise, weights) / size if size > 0 else 0.0


def cooperative_rate(
    covariance: Array | FactorCovariance, distortion: float, weights: Array | None = None
) -> float:
    """Bits a client, on average, below which no scheme reaches a distortion of the mean."""
    _require_positive(distortion)
    model = factored(covariance)
    size = float(model.quadratic(weights_of(weights, model.unique)))
    return max(0.0, 0.5 * math.log2(size / distortion)) / model.unique.shape[0] if size else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Symmetric:
    """The limits in closed form where all clients, pairs and weights are alike.

    The covariance is ``variance ((1 - correlation) I + correlation 1 1^T)``, weights are 1 / K, and
    all clients use the same noise, which minimises the sum rate.

    Attributes:
        num_clients: K.
        correlation: Of any two clients, from -1 / (K - 1) to 1.
        variance: Of each.

    Raises:
        ConfigError: For a value outside these.
    """

    num_clients: int
    correlation: float
    variance: float = 1.0

    def __post_init__(self) -> None:
        if self.num_clients < 1:
            raise ConfigError(f"num_clients is {self.num_clients}: must be at least 1")
        least = -1 / max(1, self.num_clients - 1)
        if not least <= self.correlation <= 1:
            raise ConfigError(f"correlation is {self.correlation}: must be from {least:.4g} to 1")
        if not 0 < self.variance < math.inf:
            raise ConfigError(f"variance is {self.variance}: must be positive")

    @property
    def common(self) -> float:
        """The largest eigenvalue for correlations above 0: K times the variance of the mean."""
        return self.variance * max(0.0, 1 + (self.num_clients - 1) * self.correlation)

    def conditional_variance(self, noise: float, decoded: int) -> float:
        """Of a client's update, given that many others seen through noise."""
        rho, own = self.correlation, noise / self.variance
        known = decoded * rho**2 / (1 + own + (decoded - 1) * rho) if decoded else 0.0
        return self.variance * (1 - known)

    def distortion(self, noise: float) -> float:
        """Of the mean, estimated with least error."""
        return self.common / self.num_clients / (1 + self.common / noise)

    def rate(self, noise: float) -> float:
        """Bits a client: the sum rate over K."""
        others = self.variance * (1 - self.correlation)
        nats = math.log1p(self.common / noise) + (self.num_clients - 1) * math.log1p(others / noise)
        return _BITS * nats / self.num_clients

    def noise_for(self, distortion: float, *, unbiased: bool = False) -> float:
        """The noise at which the mean has this distortion; infinite if silence does."""
        _require_positive(distortion)
        target = distortion * self.num_clients
        if unbiased:
            return target
        return target / (1 - target / self.common) if target < self.common else math.inf

    def limit(self, distortion: float, *, unbiased: bool = False) -> float:
        """Berger–Tung: the fewest bits a client at which the mean has this distortion."""
        return self.rate(self.noise_for(distortion, unbiased=unbiased))

    def distortion_at(self, rate: float, *, unbiased: bool = False) -> float:
        """The inverse of `limit`: the least distortion for so many bits a client."""
        _require_positive(rate)
        wide = (-_LARGEST_LOG, _LARGEST_LOG)
        noise = math.exp(-_solve_increasing(lambda x: self.rate(math.exp(-x)), rate, *wide))
        return noise / self.num_clients if unbiased else self.distortion(noise)

    def cooperative_limit(self, distortion: float) -> float:
        """Bits a client below which no scheme reaches this distortion."""
        _require_positive(distortion)
        size = self.common / self.num_clients
        return max(0.0, 0.5 * math.log2(size / distortion)) / self.num_clients if size else 0.0


def _require_positive(value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{value} given: must be positive and finite")


def _solve_increasing(
    function: Callable[[float], float], target: float, low: float, high: float
) -> float:
    """Where between the bounds an increasing function reaches the target; high if it does not."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return high
