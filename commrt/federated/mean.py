"""A weighted mean of updates, the same bits in whatever order and on however many machines."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from commrt import ops

# A float64 counts so far.
_WHOLE_BITS = 52


class ExactMean:
    """Sums in whole numbers of a unit that is the same for all, which no order changes.

    The unit is so small that elements a 2**18th of the largest still have all bits of an fp32 with
    a thousand updates; the sum is rounded to fp32 once.

    Args:
        numel: N, elements of an update.
        largest: No element of an update times its share is larger.
        count: Updates, on all machines.

    Cost: 8 bytes an element; 16 once something is missing.
    """

    def __init__(self, numel: int, largest: float, count: int) -> None:
        _, exponent = math.frexp(largest)
        self._unit = math.ldexp(1.0, exponent + max(1, count).bit_length() - _WHOLE_BITS)
        self.total = torch.zeros(numel, dtype=torch.float64)
        self._shares = 0.0
        self._present: Tensor | None = None

    def add(
        self,
        updates: Tensor,
        shares: Sequence[float],
        missing: Sequence[Sequence[slice]] | None = None,
    ) -> None:
        """Take updates, fp32 (K, N), but for the missing parts of each, which become zeros."""
        missing = [()] * len(shares) if missing is None else missing
        for update, parts in zip(updates, missing, strict=True):
            for part in parts:
                update[part] = 0.0
        ops.update_add_(self.total, updates, [share / self._unit for share in shares])
        for share, parts in zip(shares, missing, strict=True):
            self._count(share, parts)

    def _count(self, share: float, missing: Sequence[slice]) -> None:
        if missing and self._present is None:
            self._present = torch.full_like(self.total, self._shares)
        self._shares += share
        if self._present is not None:
            had = [self._present[part].clone() for part in missing]
            self._present += share
            for part, before in zip(missing, had, strict=True):
                self._present[part] = before

    def mean(self) -> Tensor:
        """fp32 (N,), of each element over those updates that have it; zero where none has.

        The shares of all updates add up to one. Nothing is missing where there are peers.
        """
        mean = self.total * self._unit
        if self._present is not None:
            mean = torch.where(self._present > 0, mean / self._present, 0.0)
        return mean.float()
