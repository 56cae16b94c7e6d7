"""The Berger–Tung region of few clients: the best noises for given rates, and the orders for them.

With P = diag(precision), P_others 0 for the clients of A, all 2^K - 1 constraints are listed::

    ln det(I + Sigma P) - ln det(I + Sigma P_others) <= 2 ln2 R(A)

Of the two terms, both concave in the precisions, the first makes the problem non-convex;
majorisation-minimisation replaces it by its tangent at the present point, which lies above it, so
that what is feasible with the tangent is feasible. Here the majorised function is the distortion
with a logarithmic barrier, and between two tangents it takes one Newton step, as more would be
spent on a tangent that is soon another.

Source: Hunter and Lange, "A tutorial on MM algorithms", Am. Stat. 58(1), 2004; Boyd and
Vandenberghe, "Convex Optimization", section 11.3 (barrier method); Tse and Hanly, "Multiaccess
fading channels I", IEEE Trans. Inf. Theory 44(7), 1998 (contrapolymatroids).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from commrt.federated.gaussian import (
    Array,
    FactorCovariance,
    Seen,
    array_namespace,
    diagonal,
    see,
)
from commrt.federated.limits import corner_rates, shared_rates, subset_members, subset_rates

_FIRST_BARRIER, _LAST_BARRIER, _BARRIER_STEP = 1e-1, 1e-8, 0.1  # of the first distortion
_CENTRED = 1e-2  # Newton decrement in units of the barrier's weight
_ROUNDING = 1e-13  # of the distortion: smaller gains are not seen
_NEWTON_STEPS = 300  # for one weight of the barrier; about ten are usual
_SHORTEST_STEP = 1e-10
_RIDGE = 1e-13  # of a Hessian with ones on its diagonal
_TIGHT = 1e-6  # bits: less slack is none
_EXCESS = 1e-12  # bits
_CROSSINGS = 4  # a client


class Point(NamedTuple):
    """Precisions inside the region.

    Attributes:
        precision: (K,).
        slack: Nats that each set of clients has left, (2^K - 1,).
        seen: Through the U of each set of clients, the last being all, a batch of 2^K.
        value: The distortion with its barrier.
    """

    precision: Array
    slack: Array
    seen: Seen
    value: float


class Region:
    """Minimises the distortion of the mean over the precisions for which given rates suffice.

    Args:
        model: Covariance of K clients, each with a variance above 0.
        rates: Bits each may use, above 0, (K,).
        weights: Of the mean, (K,).
        unbiased: The distortion is that of the plain mean of the U_k, ``sum w_k^2 / precision_k``.
    """

    def __init__(
        self, model: FactorCovariance, rates: Array, weights: Array, *, unbiased: bool
    ) -> None:
        xp = array_namespace(rates)
        self._model, self._weights, self._unbiased = model, weights, unbiased
        # Row i leaves the U of set i; the constraint is on what the other clients send.
        self._given = subset_members(xp, rates.shape[0])
        self._allowed = 2 * math.log(2) * ((1 - self._given) @ rates)

    def minimise(self, precision: Array) -> tuple[Array, list[float]]:
        """The best precisions, and the distortion after each weight of the barrier.

        Args:
            precision: To start from, inside the region, (K,).
        """
        first = self.distortion(precision)
        barrier = _FIRST_BARRIER * first / self._allowed.shape[0]
        history = []
        while barrier * self._allowed.shape[0] > _LAST_BARRIER * first:
            precision = self._centre(precision, barrier)
            history.append(self.distortion(precision))
            barrier *= _BARRIER_STEP
        return precision, history

    def distortion(self, precision: Array) -> float:
        """Of the mean."""
        xp = array_namespace(precision)
        if self._unbiased:
            return float(xp.sum(self._weights**2 / precision))
        return float(see(self._model, precision).covariance.quadratic(self._weights))

    def _centre(self, precision: Array, barrier: float) -> Array:
        """Minimises the distortion with its barrier, to a part of the barrier's weight."""
        xp = array_namespace(precision)
        point = self._point(precision, barrier)
        assert point is not None, "outside the region"
        ridge = _RIDGE * xp.eye(precision.shape[0], dtype=xp.float64)
        for _ in range(_NEWTON_STEPS):
            gradient, hessian = self._majoriser(point, barrier)
            scale = 1 / xp.sqrt(diagonal(hessian))
            scaled = hessian * scale * scale[:, None] + ridge
            step = -scale * xp.linalg.solve(scaled, gradient * scale)
            gain = -float(xp.sum(gradient * step))
            if gain <= max(_CENTRED * barrier, _ROUNDING * abs(point.value)):
                break
            found = self._search(point, step, gain, barrier)
            if found is None:
                break
            point = found
        return point.precision

    def _point(self, precision: Array, barrier: float) -> Point | None:
        """None outside the region."""
        xp = array_namespace(precision)
        seen = see(self._model, self._given * precision)
        slack = (self._allowed - seen.log_det[-1] + seen.log_det)[:-1]
        if not bool(xp.all(slack > 0)):
            return None
        logs = float(xp.sum(xp.log(slack)) + xp.sum(xp.log(precision)))
        return Point(precision, slack, seen, self.distortion(precision) - barrier * logs)

    def _majoriser(self, point: Point, barrier: float) -> tuple[Array, Array]:
        """Gradient and Hessian of the surrogate whose tangent is at the point."""
        xp = array_namespace(point.precision)
        given, covariances = self._given, point.seen.covariance.dense()
        variances = given * diagonal(covariances)
        pull = (variances[:-1, :] - variances[-1, :]) / point.slack[:, None]
        pairs = given[:-1, :, None] * given[:-1, None, :]
        bend = xp.sum(pairs * covariances[:-1, :, :] ** 2 / point.slack[:, None, None], axis=0)
        eye = xp.eye(given.shape[1], dtype=xp.float64)
        gradient, hessian = self._slopes(point.precision, covariances[-1, :, :])
        gradient = gradient - barrier * (xp.sum(pull, axis=0) + 1 / point.precision)
        return gradient, hessian + barrier * (pull.T @ pull + bend + eye / point.precision**2)

    def _slopes(self, precision: Array, covariance: Array) -> tuple[Array, Array]:
        """Gradient and Hessian of the distortion."""
        xp = array_namespace(precision)
        if self._unbiased:
            eye = xp.eye(precision.shape[0], dtype=xp.float64)
            ratio = self._weights**2 / precision**2
            return -ratio, 2 * eye * ratio / precision
        error = covariance @ self._weights
        return -(error**2), 2 * covariance * error * error[:, None]

    def _search(self, start: Point, step: Array, gain: float, barrier: float) -> Point | None:
        """Backtracks to a point inside that gains enough (Armijo); None if rounding hides it."""
        xp = array_namespace(step)
        shrinking = float(xp.max(-step / start.precision))
        length = min(1.0, 0.95 / shrinking) if shrinking > 0 else 1.0
        while length > _SHORTEST_STEP:
            found = self._point(start.precision + length * step, barrier)
            if found is not None and found.value <= start.value - 0.1 * length * gain:
                return found
            length /= 2
        return None


def time_sharing(
    model: FactorCovariance, precision: Array, rates: Array
) -> tuple[Array, tuple[tuple[int, ...], ...], tuple[float, ...]]:
    """Orders of decoding, and for how much of the coordinates each, that need no more than rates.

    First the rates are lowered until every client belongs to a set that has nothing left. A point
    of that face is a mean of its corners: one is found, and from it, through the point, the face is
    crossed to a smaller one; K corners are enough, but for rounding. What rounding adds to the
    rates, about 1e-6 bits, is made up for by the precisions.

    Args:
        model: Covariance of K clients.
        precision: (K,), above 0.
        rates: Bits (K,), inside the region of these precisions.

    Returns:
        Precisions, by a rounding below the given ones; orders of all clients, the first to be
        decoded first; and their shares, which sum to 1.
    """
    needed = subset_rates(model, 1 / precision)
    members = subset_members(array_namespace(precision), rates.shape[0])
    point = _lowered(rates, members, needed)
    orders: list[tuple[int, ...]] = []
    shares: list[float] = []
    left = 1.0
    while left > 0:
        order = _order_of_face(members @ point - needed)
        corner = corner_rates(model, 1 / precision, order)
        reach = _reach(corner, point, members, needed)
        if left < _TIGHT or len(orders) == _CROSSINGS * rates.shape[0]:
            reach = math.inf
        orders.append(order)
        shares.append(left * (1 - 1 / reach))
        left /= reach
        if left > 0:
            point = corner + reach * (point - corner)
    kept = [i for i, share in enumerate(shares) if share > _TIGHT]
    orders = [orders[i] for i in kept]
    shares = [shares[i] / sum(shares[i] for i in kept) for i in kept]
    return _within(model, precision, rates, orders, shares), tuple(orders), tuple(shares)


def _reach(corner: Array, point: Array, members: Array, needed: Array) -> float:
    """How many times the way from a corner to a point leads to the end of the face."""
    xp = array_namespace(point)
    away = members @ (corner - point)
    room = xp.where(away > _TIGHT, members @ corner - needed, math.inf)
    return max(1.0, float(xp.min(room / xp.where(away > _TIGHT, away, 1.0))))


def _within(
    model: FactorCovariance,
    precision: Array,
    rates: Array,
    orders: Sequence[Sequence[int]],
    shares: Sequence[float],
) -> Array:
    """The precisions, lowered by as little as makes the orders need no more than the rates.

    The rates of every corner rise with a common factor of the precisions.
    """
    xp = array_namespace(precision)
    for exponent in range(-9, 0):
        needed = shared_rates(model, 1 / precision, orders, shares)
        if bool(xp.all(needed <= rates + _EXCESS)):
            break
        precision = precision * (1 - 10.0**exponent)
    return precision


def _lowered(rates: Array, members: Array, needed: Array) -> Array:
    """Rates of which none could be lower, none above the given ones."""
    xp = array_namespace(rates)
    rates = xp.asarray(rates, copy=True)
    for client in range(rates.shape[0]):
        spare = xp.where(members[:, client] > 0, members @ rates - needed, math.inf)
        rates[client] -= max(0.0, float(xp.min(spare)))
    return rates


def _order_of_face(slack: Array) -> tuple[int, ...]:
    """An order whose corner lies on every face of the region that a point lies on.

    Sets without slack form a lattice; the corner that belongs to a longest chain of them, its
    smallest set decoded last, has none of them slack.

    Args:
        slack: Of the point, bits (2^K,); the set of all clients has none.
    """
    num_sets = slack.shape[0]
    tight = [chosen for chosen in range(1, num_sets) if float(slack[chosen]) <= _TIGHT]
    order: list[int] = []
    last = 0
    for chosen in sorted({*tight, num_sets - 1}, key=int.bit_count):
        if chosen & last == last and chosen != last:
            order = [*_members_of(chosen & ~last), *order]
            last = chosen
    return tuple(order)


def _members_of(chosen: int) -> list[int]:
    return [client for client in range(chosen.bit_length()) if chosen >> client & 1]
