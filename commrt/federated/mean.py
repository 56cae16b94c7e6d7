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

    Attributes:
        total: The sum so far, in units; of peers, each one's are added up before :meth:`mean`.
        added: Of each update its share and its parts that are missing, in the order of clients; of
            peers, all ones' before :meth:`mean`, if anything is missing.

    Cost: 8 bytes an element; 16 once something is missing.
    """

    def __init__(self, numel: int, largest: float, count: int) -> None:
        _, exponent = math.frexp(largest)
        self._unit = math.ldexp(1.0, exponent + max(1, count).bit_length() - _WHOLE_BITS)
        self.total = torch.zeros(numel, dtype=torch.float64)
        self.added: list[tuple[float, Sequence[slice]]] = []

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
        self.added += zip(shares, missing, strict=True)

    def mean(self) -> Tensor:
        """fp32 (N,), of each element over those updates that have it; zero where none has.

        The shares of all updates add up to one.
        """
        mean = self.total * self._unit
        if any(missing for _, missing in self.added):
            present = self._present()
            mean = torch.where(present > 0, mean / present, 0.0)
        return mean.float()

    def _present(self) -> Tensor:
        """Of each element the shares of the updates that have it, added up in one order."""
        present = torch.zeros_like(self.total)
        for share, missing in self.added:
            before = [present[part].clone() for part in missing]
            present += share
            for part, each in zip(missing, before, strict=True):
                present[part] = each
        return present
