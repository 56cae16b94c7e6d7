"""Rate allocation: how precise each client's update should be, for the least error of the mean.

Client k sends U_k = X_k + Z_k with Z_k ~ N(0, noise_k). The noises are chosen so that the error of
the mean, and through it the bound on convergence (:func:`convergence_bound`), is least, within

rates for each client
    :func:`allocate`: all of the Berger–Tung region for up to 8 clients (region.py), greedy orders
    for more (orders.py).
a rate for all clients together
    :func:`allocate_total`; its converse, the cheapest way to an error, is
    :func:`allocate_distortion`.

The mean is either the linear estimate of least error (``limits.combine_weights``), or the plain,
unbiased one, ``sum_k w_k U_k``.

Source: the problem, and majorisation-minimisation for small and large systems, are those of arXiv
2204.10985; surrogates and searches here are not taken from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from commrt.errors import ConfigError
from commrt.federated.gaussian import (
    Array,
    FactorCovariance,
    array_namespace,
    factored,
    see,
    weights_of,
)
from commrt.federated.limits import shared_rates, unbiased_distortion
from commrt.federated.orders import OrderSearch, largest_first, numbers_of, rotations
from commrt.federated.region import Region, time_sharing
from commrt.federated.totals import Division

MAX_EXACT = 8  # clients; beyond, their subsets are too many
MAX_RATE = 64.0  # bits a coordinate

_NATS = 2 * math.log(2)  # of 2 I, a bit
_EXCESS = 1e-9  # bits
_LOUD = 1e12  # signal to noise: as good as none
_INSIDE = 0.9  # of what independent coding allows: strictly inside the region


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """How precise each client's update is, and how it is decoded.

    Attributes:
        noise: Variance of each client's Z_k, (K,); infinity for a client that stays silent.
        rates: Bits a coordinate of each client, (K,), the mean over the orders.
        distortion: Error of the mean a coordinate.
        orders: Of decoding, each with all clients, the first to be decoded first.
        shares: Of the coordinates, for each order; they sum to 1.
        history: Distortion after each step of the exact algorithm, where it ran.
    """

    noise: Array
    rates: Array
    distortion: float
    orders: tuple[tuple[int, ...], ...]
    shares: tuple[float, ...]
    history: tuple[float, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The order of the largest share; the only one, where rates are those of a corner."""
        return self.orders[max(range(len(self.shares)), key=self.shares.__getitem__)]


def allocate(
    covariance: Array | FactorCovariance,
    rates: Array,
    weights: Array | None = None,
    *,
    unbiased: bool = False,
    exact: bool | None = None,
) -> Allocation:
    """The least distortion for given rates of the clients.

    Greedily it is the better of two: one order, found by swaps, in which clients use all their
    rate, or rotations of that order. Up to 8 clients majorisation-minimisation over all constraints
    of the region finds noises at which no small change helps, unless an order alone does as well;
    their rates may need several orders that share the coordinates.

    Args:
        covariance: Of the updates (residuals, with prediction), (K, K) or a factor model.
        rates: Bits a coordinate that each client may use, from 0 to 64, (K,).
        weights: Of the mean, (K,); None is 1 / K each.
        unbiased: Whether the mean is ``sum_k w_k U_k``, or the estimate of least error.
        exact: Whether to use the exact algorithm; None decides by the number of clients.

    Returns:
        What clients need no more than their rates for, to 1e-9 bits.

    Raises:
        ConfigError: For shapes and values outside these, the exact algorithm for more than 8
            clients, or an unbiased mean without rate for a client that has weight.

    Cost: exact, about 100 times the factoring of 2^K matrices (K, K); else K K r^2 operations a
    sweep with a factor model of rank r, K^4 with a dense covariance, to be avoided beyond K = 64.
    """
    model = factored(covariance)
    target = _effective_weights(weights, model, unbiased)
    rates = _checked_rates(rates, target, unbiased)
    xp = array_namespace(rates)
    if exact is None:
        exact = rates.shape[0] <= MAX_EXACT
    if exact and rates.shape[0] > MAX_EXACT:
        raise ConfigError(f"exact=True for {rates.shape[0]} clients: must be at most {MAX_EXACT}")
    if model.is_diagonal:  # then no order is better than another
        precision = xp.expm1(_NATS * rates) / xp.where(model.unique > 0, model.unique, math.inf)
        return _loudest_first(model, precision, target, unbiased)
    found = _greedy(model, rates, target, unbiased)
    if not exact:
        return found
    best = _exact(model, rates, target, unbiased)
    # An order alone needs no barrier, and no care where rates are millions of times apart.
    within = bool(xp.all(best.rates <= rates + _EXCESS))
    if within and best.distortion <= found.distortion:
        return best
    return dataclasses.replace(found, history=best.history)


def allocate_total(
    covariance: Array | FactorCovariance,
    rate: float,
    weights: Array | None = None,
    *,
    unbiased: bool = False,
) -> Allocation:
    """The least distortion for a rate of all clients together.

    Args:
        covariance: Of the updates, (K, K) or a factor model.
        rate: Bits a coordinate that the clients may use in all, above 0, at most 64 each.
        weights: Of the mean, (K,); None is 1 / K each.
        unbiased: As for :func:`allocate`.

    Returns:
        Rates of one order, the clients with the most signal to noise first; any other order, or
        several, needs the same in all.

    Raises:
        ConfigError: For shapes and values outside these.
    """
    model = factored(covariance)
    target = _effective_weights(weights, model, unbiased)
    if not 0 < rate <= MAX_RATE * target.shape[0]:
        raise ConfigError(f"rate is {rate}: must be above 0, at most {MAX_RATE} a client")
    if _mean_is_known(model, target, unbiased):
        return _silence(model, target)
    precision = Division(model, target, unbiased=unbiased).of_rate(_NATS * rate)
    return _loudest_first(model, precision, target, unbiased)


def allocate_distortion(
    covariance: Array | FactorCovariance,
    distortion: float,
    weights: Array | None = None,
    *,
    unbiased: bool = False,
) -> Allocation:
    """The least rate of all clients together that reaches a distortion: the Berger–Tung limit.

    Args:
        covariance: Of the updates, (K, K) or a factor model.
        distortion: Error of the mean a coordinate, above 0.
        weights: Of the mean, (K,); None is 1 / K each.
        unbiased: As for :func:`allocate`.

    Returns:
        Rates of one order, as :func:`allocate_total`; all silent where that is good enough.

    Raises:
        ConfigError: For shapes and values outside these.
    """
    if not 0 < distortion < math.inf:
        raise ConfigError(f"distortion is {distortion}: must be positive and finite")
    model = factored(covariance)
    target = _effective_weights(weights, model, unbiased)
    quiet = not unbiased and float(model.quadratic(target)) <= distortion
    if quiet or _mean_is_known(model, target, unbiased):
        return _silence(model, target)
    precision = Division(model, target, unbiased=unbiased).to_distortion(distortion)
    return _loudest_first(model, precision, target, unbiased)


def convergence_bound(
    distortions: Array,
    *,
    num_weights: int,
    smoothness: float,
    learning_rate: float,
    local_steps: int,
    initial_gap: float,
    drift: float = 0.0,
    bias: float = 0.0,
) -> float:
    """Bound of ``mean_t E |grad F(x_t)|^2``, increasing in every distortion.

    For an L-smooth objective F and T rounds of noise e_t that is zero in the mean,
    ``2 (F_0 - F*) / ((1 - b) eta tau T) + drift + L / (eta tau) mean_t d D_t``: of all that coding
    decides, the distortions alone, so the noises that minimise each D_t minimise the bound.

    Args:
        distortions: D_t, error of the mean update a coordinate, of each round, (T,).
        num_weights: d, coordinates of the model.
        smoothness: L.
        learning_rate: eta, of the clients.
        local_steps: tau, a client's steps in a round.
        initial_gap: F_0 - F*.
        drift: What does not depend on coding: variance of the gradients, drift of the clients.
        bias: b, the part of the update that the server's estimate takes away; 0 when unbiased, see
            ``limits.combine_bias``.

    Raises:
        ConfigError: For no rounds, or a bias outside [0, 1).

    Source: the standard descent lemma, as in Bottou, Curtis and Nocedal, "Optimization methods for
    large-scale machine learning", SIAM Review 60(2), 2018, theorem 4.8.
    """
    rounds = distortions.shape[0]
    if rounds == 0 or not 0 <= bias < 1:
        raise ConfigError(f"{rounds} rounds, bias {bias}: must be at least 1, and in [0, 1)")
    noise = num_weights * float(array_namespace(distortions).mean(distortions))
    travelled = learning_rate * local_steps
    descent = 2 * initial_gap / ((1 - bias) * travelled * rounds)
    return float(descent + drift + smoothness / travelled * noise)


def _effective_weights(weights: Array | None, model: FactorCovariance, unbiased: bool) -> Array:
    """Weights, 0 for clients whose updates are always 0: nothing is lost when those are silent."""
    xp = array_namespace(model.unique)
    return xp.where(model.variances > 0, weights_of(weights, model.unique), 0.0)


def _mean_is_known(model: FactorCovariance, weights: Array, unbiased: bool) -> bool:
    """Whether it takes no bits: the mean does not vary, or no client with weight does."""
    if unbiased:
        return not bool(array_namespace(weights).any(weights != 0))
    return float(model.quadratic(weights)) == 0


def _checked_rates(rates: Array, weights: Array, unbiased: bool) -> Array:
    xp = array_namespace(weights)
    if rates.shape != weights.shape or not bool(xp.all((rates >= 0) & (rates <= MAX_RATE))):
        raise ConfigError(f"rates must be {weights.shape[0]} numbers from 0 to {MAX_RATE}")
    if unbiased and bool(xp.any((rates == 0) & (weights != 0))):
        raise ConfigError("rates must be above 0 for clients with weight, for an unbiased mean")
    return xp.astype(rates, xp.float64)


def _exact(model: FactorCovariance, rates: Array, weights: Array, unbiased: bool) -> Allocation:
    """By the region of the clients that can speak; what others add to the mean is predicted."""
    xp = array_namespace(rates)
    speaks = (rates > 0) & (model.variances > 0)
    numbers = [client for client in range(rates.shape[0]) if bool(speaks[client])]
    if not numbers:
        return _silence(model, weights)
    chosen = xp.asarray(numbers)
    speakers = FactorCovariance(
        xp.take(model.factor, chosen, axis=0), xp.take(model.unique, chosen, axis=0)
    )
    allowed, target = xp.take(rates, chosen), xp.take(weights, chosen)
    if not unbiased and len(numbers) < rates.shape[0]:
        loud = xp.where(speaks, _LOUD / xp.where(speaks, model.variances, 1.0), 0.0)
        target = xp.take(loud * see(model, loud).covariance.times(weights), chosen)
    region = Region(speakers, allowed, target, unbiased=unbiased)
    start = _INSIDE * xp.expm1(_NATS * allowed) / speakers.variances
    best, history = region.minimise(start)
    best, orders, shares = time_sharing(speakers, best, allowed)
    precision = xp.zeros_like(rates)
    for i, client in enumerate(numbers):
        precision[client] = best[i]
    silent = [client for client in range(rates.shape[0]) if client not in numbers]
    orders = tuple((*(numbers[i] for i in order), *silent) for order in orders)
    result = _allocation(model, precision, weights, unbiased, orders, shares)
    unheard = result.distortion - region.distortion(best)
    return dataclasses.replace(result, history=tuple(value + unheard for value in history))


def _greedy(model: FactorCovariance, rates: Array, weights: Array, unbiased: bool) -> Allocation:
    """The better of one order and its rotations."""
    xp = array_namespace(rates)
    search = OrderSearch(model, rates, weights, unbiased=unbiased)
    found = search.search()
    order = tuple(numbers_of(found))
    turned = rotations(order)
    alone, shared = search.corner(found[None, :]), search.shared(xp.asarray(turned))
    if float(search.distortions(alone)[0]) <= float(search.distortions(shared)[0]):
        return _allocation(model, alone[0, :], weights, unbiased, [order])
    shares = [1 / len(turned)] * len(turned)
    return _allocation(model, shared[0, :], weights, unbiased, turned, shares)


def _loudest_first(
    model: FactorCovariance, precision: Array, weights: Array, unbiased: bool
) -> Allocation:
    order = tuple(largest_first(precision * model.variances))
    return _allocation(model, precision, weights, unbiased, [order])


def _silence(model: FactorCovariance, weights: Array) -> Allocation:
    xp = array_namespace(weights)
    order = tuple(range(weights.shape[0]))
    return _allocation(model, xp.zeros_like(weights), weights, False, [order])


def _allocation(
    model: FactorCovariance,
    precision: Array,
    weights: Array,
    unbiased: bool,
    orders: Sequence[tuple[int, ...]],
    shares: Sequence[float] = (1.0,),
) -> Allocation:
    xp = array_namespace(precision)
    heard = precision > 0
    noise = xp.where(heard, 1 / xp.where(heard, precision, 1.0), math.inf)
    if unbiased:
        distortion = unbiased_distortion(noise, weights)
    else:
        distortion = float(see(model, precision).covariance.quadratic(weights))
    return Allocation(
        noise=noise,
        rates=shared_rates(model, noise, orders, shares),
        distortion=distortion,
        orders=tuple(orders),
        shares=tuple(shares),
    )
