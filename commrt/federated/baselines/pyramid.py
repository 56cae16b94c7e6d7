"""Points of a pyramid: integer vectors of a given L1 norm, found and numbered.

Shapes: B vectors, L dimensions, K the norm ("pulses").
"""

import functools

import numpy as np

MAX_INDEX_BITS = 62
_NEVER = np.iinfo(np.int64).max


class Pyramid:
    """All integer vectors of L elements whose magnitudes sum to K.

    Args:
        block: L.
        pulses: K.

    Cost: numbering takes a table look-up an element, the way back K + 1 comparisons.
    """

    def __init__(self, block: int, pulses: int) -> None:
        self.block = block
        self.pulses = pulses
        counts = _count_points(block, pulses)
        self.num_points = counts[block][pulses]
        self.index_bits = (self.num_points - 1).bit_length()
        if self.index_bits <= MAX_INDEX_BITS:
            self._counts = np.array(counts, np.int64)
            self._firsts = _first_numbers(self._counts)

    def nearest(self, values_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each vector, a point near its direction, and the gain of least squared error.

        Most pulses go to the rounded-down share of each element, the others one by one to where
        they raise the correlation most; of equal ones to the first.

        Args:
            values_BL: float64.

        Returns:
            Points, int64 (B, L), and gains, float64 (B,), at least 0.
        """
        size_BL = np.abs(values_BL)
        total_B1 = size_BL.sum(axis=1, keepdims=True)
        share_BL = size_BL / np.where(total_B1 > 0, total_B1, 1.0)
        pulses_BL = np.floor(share_BL * self.pulses)
        rows = np.arange(len(values_BL))
        while (lacking := rows[pulses_BL[rows].sum(axis=1) < self.pulses]).size:
            rows = lacking
            pulses_BL[rows, _best_place(share_BL[rows], pulses_BL[rows])] += 1
        overlap_B = (size_BL * pulses_BL).sum(axis=1)
        gain_B = overlap_B / np.square(pulses_BL).sum(axis=1)
        return np.copysign(pulses_BL, values_BL).astype(np.int64), gain_B

    def number(self, points_BL: np.ndarray) -> np.ndarray:
        """The number of each point, int64 (B,), below ``num_points``.

        Of points alike up to an element, those with a zero there come first, then by magnitude,
        the positive before the negative.
        """
        number_B = np.zeros(len(points_BL), np.int64)
        left_B = np.full(len(points_BL), self.pulses)
        for place in range(self.block):
            size_B = np.abs(points_BL[:, place])
            behind = self._counts[self.block - place - 1]
            number_B += self._firsts[self.block - place, left_B, size_B]
            left_B -= size_B
            number_B += np.where(points_BL[:, place] < 0, behind[left_B], 0)
        return number_B

    def points(self, number_B: np.ndarray) -> np.ndarray:
        """The points of numbers below ``num_points``: int64 (B, L)."""
        points_BL = np.empty((len(number_B), self.block), np.int64)
        left_B = np.full(len(number_B), self.pulses)
        for place in range(self.block):
            firsts_BK = self._firsts[self.block - place, left_B]
            behind = self._counts[self.block - place - 1]
            size_B = (firsts_BK[:, 1:] <= number_B[:, None]).sum(axis=1)
            number_B = number_B - np.take_along_axis(firsts_BK, size_B[:, None], axis=1)[:, 0]
            left_B -= size_B
            is_negative_B = (size_B > 0) & (number_B >= behind[left_B])
            number_B -= np.where(is_negative_B, behind[left_B], 0)
            points_BL[:, place] = np.where(is_negative_B, -size_B, size_B)
        return points_BL


@functools.lru_cache(maxsize=8)
def pyramid(block: int, pulses: int) -> Pyramid:
    """The pyramid of these parameters, whose tables take a while."""
    return Pyramid(block, pulses)


def _best_place(share_BL: np.ndarray, pulses_BL: np.ndarray) -> np.ndarray:
    """Where one more pulse makes the cosine of pulses and shares largest."""
    overlap_B1 = (share_BL * pulses_BL).sum(axis=1, keepdims=True)
    energy_B1 = np.square(pulses_BL).sum(axis=1, keepdims=True)
    cosine_BL = np.square(overlap_B1 + share_BL) / (energy_B1 + 2 * pulses_BL + 1)
    place_B: np.ndarray = cosine_BL.argmax(axis=1)
    return place_B


def _count_points(block: int, pulses: int) -> list[list[int]]:
    """Points by dimensions and pulses, (L + 1, K + 1). Source: Fischer 1986, equation 3."""
    counts = [[1] + [0] * pulses]
    for _ in range(block):
        above, row = counts[-1], [1]
        for k in range(1, pulses + 1):
            row.append(above[k] + row[k - 1] + above[k - 1])
        counts.append(row)
    return counts


def _first_numbers(counts: np.ndarray) -> np.ndarray:
    """Points before the first that has a magnitude: (L + 1, K + 1, K + 1).

    By dimensions left, pulses left and the magnitude; more than any number where the magnitude is
    above the pulses left.
    """
    block, pulses = counts.shape[0] - 1, counts.shape[1] - 1
    firsts = np.full((block + 1, pulses + 1, pulses + 1), _NEVER, np.int64)
    firsts[:, :, 0] = 0
    for k in range(1, pulses + 1):
        behind = counts[:-1, k::-1].copy()  # of the other dimensions, by this one's magnitude
        behind[:, 1:] *= 2  # either sign
        firsts[1:, k, 1 : k + 1] = np.cumsum(behind[:, :k], axis=1)
    return firsts
