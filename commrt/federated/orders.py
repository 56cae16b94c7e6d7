"""Orders of decoding: the best noises of one order in closed form, and the search for an order.

For any number of clients: a pass of an order costs O(K r^2) with a factor model of rank r, O(K^3)
with a dense covariance, and passes of many orders run as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from commrt.federated.gaussian import Array, Decoding, FactorCovariance, array_namespace, see

_NATS = 2 * math.log(2)  # of 2 I, a bit
_LEAST_VARIANCE = 1e-12  # of a client's: less is rounding
_GAIN = 1e-4  # of the distortion: a smaller one is not worth another sweep
_SETTLED = 1e-6  # of a precision
_BATCH_ELEMENTS = 1 << 22  # of the largest array of a batch, 32 MiB
_THOROUGH = 64  # clients
_PASSES = 200
_ROTATIONS = 16


class OrderSearch:
    """Looks for the order in which given rates give the least distortion of the mean.

    Args:
        model: Covariance of K clients.
        rates: Bits each may use, at least 0, (K,).
        weights: Of the mean, (K,).
        unbiased: The distortion is that of the plain mean of the U_k, ``sum w_k^2 / precision_k``.
    """

    def __init__(
        self, model: FactorCovariance, rates: Array, weights: Array, *, unbiased: bool
    ) -> None:
        xp = array_namespace(rates)
        self._model, self._weights, self._unbiased = model, weights, unbiased
        self._nats, self._snr = _NATS * rates, xp.expm1(_NATS * rates)

    def search(self) -> Array:
        """Greedy: sorted orders, then swaps of neighbours until none gains; the best, (K,).

        Swaps start from each of the sorted orders, beyond 64 clients from the best one only.
        """
        starts = self._sorted_orders()
        if starts.shape[1] > _THOROUGH:
            starts = self._best(starts)[0][None, :]
        ends = [self._descended(starts[i, :]) for i in range(starts.shape[0])]
        return self._best(array_namespace(starts).stack(ends))[0]

    def corner(self, orders: Array) -> Array:
        """Precisions (B, K) if each order stands alone and clients use all their rate.

        They are ``(2^(2 R_k) - 1) / v_k``, v_k given the clients before.

        Args:
            orders: Integers (B, K).
        """
        return self._pass(orders, None)[0]

    def shared(self, orders: Array) -> Array:
        """Precisions (1, K) if the orders share the coordinates equally.

        Then a client's rate is its mean over the orders. From what independent coding allows, each
        pass raises the precisions by a Newton step. The mean rate is concave in a client's own
        precision and falls as others become more precise, so no step exceeds the rates.

        Args:
            orders: Integers (B, K).
        """
        xp = array_namespace(orders)
        variances = self._model.variances
        precision = self._snr / xp.where(variances > 0, variances, math.inf)
        for _ in range(_PASSES):
            known = self._pass(orders, precision)[1]
            snr = known * precision
            slope = xp.mean(known / (1 + snr), axis=0)
            missing = self._nats - xp.mean(xp.log1p(snr), axis=0)
            step = xp.where(missing > 0, missing, 0.0) / xp.where(slope > 0, slope, math.inf)
            precision = precision + step
            if bool(xp.all(step <= _SETTLED * precision)):
                break
        return precision[None, :]

    def distortions(self, precision: Array) -> Array:
        """Of the mean: (B,) of precisions (B, K)."""
        xp = array_namespace(precision)
        if not self._unbiased:
            return see(self._model, precision).covariance.quadratic(self._weights)
        heard = xp.where(self._weights == 0, 1.0, precision)
        errors = self._weights**2 / xp.where(heard > 0, heard, 1.0)
        return xp.sum(xp.where(heard > 0, errors, math.inf), axis=-1)

    def _pass(self, orders: Array, precision: Array | None) -> tuple[Array, Array]:
        """Precisions and conditional variances (B, K); without precisions, those of a corner."""
        xp = array_namespace(orders)
        decoding = Decoding(self._model, orders.shape[0])
        least = _LEAST_VARIANCE * self._model.variances
        least = xp.where(least > 0, least, math.inf)
        precisions, variances = [], []
        for i in range(orders.shape[1]):
            clients = orders[:, i]
            sight = decoding.look(clients)
            if precision is None:
                known = xp.maximum(sight.variance, xp.take(least, clients))
                precisions.append(xp.take(self._snr, clients) / known)
            else:
                precisions.append(xp.take(precision, clients))
            variances.append(sight.variance)
            decoding.learn(sight, precisions[-1])
        places = xp.argsort(orders, axis=1)
        by_client = [
            xp.take_along_axis(xp.stack(rows, axis=1), places, axis=1)
            for rows in (precisions, variances)
        ]
        return by_client[0], by_client[1]

    def _descended(self, order: Array) -> Array:
        order, distortion = self._best(order[None, :])
        while True:
            order, less = self._swapped(order, distortion)
            if less >= distortion * (1 - _GAIN):
                return order
            distortion = less

    def _best(self, orders: Array) -> tuple[Array, float]:
        """The order of least distortion, (K,), and that."""
        found = self._evaluate(orders)
        best = min(range(len(found)), key=found.__getitem__)
        return orders[best, :], found[best]

    def _evaluate(self, orders: Array) -> list[float]:
        num_orders, num_clients = orders.shape
        rank = self._model.factor.shape[1]
        batch = max(1, _BATCH_ELEMENTS // (max(num_clients, rank) * rank))
        found: list[float] = []
        for start in range(0, num_orders, batch):
            stop = min(start + batch, num_orders)
            part = self.distortions(self.corner(orders[start:stop, :]))
            found += [float(part[i]) for i in range(part.shape[0])]
        return found

    def _sorted_orders(self) -> Array:
        """The high rates first, the low ones first, the precise, the important: (4, K)."""
        xp = array_namespace(self._snr)
        variances = self._model.variances
        alone = self._snr / xp.where(variances > 0, variances, math.inf)
        keys = [self._snr, -self._snr, alone, self._weights**2 * variances]
        return xp.asarray([largest_first(key) for key in keys])

    def _swapped(self, order: Array, distortion: float) -> tuple[Array, float]:
        """The best of all swaps of two neighbours, or of many of them at once."""
        xp = array_namespace(order)
        num_clients = order.shape[0]
        if num_clients == 1:
            return order, distortion
        place, first = xp.arange(num_clients)[None, :], xp.arange(num_clients - 1)[:, None]
        moved = xp.astype(first == place, xp.int64) - xp.astype(first + 1 == place, xp.int64)
        taken = xp.take(order, xp.reshape(place + moved, (-1,)))
        found = self._evaluate(xp.reshape(taken, (num_clients - 1, num_clients)))
        swaps = _apart(sorted(range(len(found)), key=found.__getitem__), found, distortion)
        if not swaps:
            return order, distortion
        clients = numbers_of(order)
        counts = {min(1 << i, len(swaps)) for i in range(len(swaps).bit_length() + 1)}
        together = [_with_swaps(clients, swaps[:count]) for count in sorted(counts)]
        return self._best(xp.asarray(together))


def largest_first(keys: Array) -> list[int]:
    """Clients by falling key; equal ones stay in order, with every library."""
    values = [float(keys[i]) for i in range(keys.shape[0])]
    return sorted(range(len(values)), key=values.__getitem__, reverse=True)


def numbers_of(order: Array) -> list[int]:
    """An array of integers as a list."""
    return [int(order[i]) for i in range(order.shape[0])]


def rotations(order: Sequence[int]) -> list[tuple[int, ...]]:
    """Up to 16 rotations of an order, evenly apart, so that nobody is always early or late."""
    num_clients = len(order)
    count = min(num_clients, _ROTATIONS)
    starts = [i * num_clients // count for i in range(count)]
    return [(*order[start:], *order[:start]) for start in starts]


def _apart(ranked: Iterable[int], found: Sequence[float], distortion: float) -> list[int]:
    """Of the swaps that gain, the best ones of which no two move the same client."""
    chosen: list[int] = []
    taken: set[int] = set()
    for swap in ranked:
        if found[swap] < distortion and not taken & {swap, swap + 1}:
            chosen.append(swap)
            taken |= {swap, swap + 1}
    return chosen


def _with_swaps(order: Sequence[int], swaps: Iterable[int]) -> list[int]:
    swapped = list(order)
    for i in swaps:
        swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
    return swapped
