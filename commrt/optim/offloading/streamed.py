"""Weights stay on the device; a chunk's state is there only while it is stepped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from commrt.optim.offloading.chunks import Ranges, Row
from commrt.optim.offloading.link import Copies, Copy, FileRange
from commrt.optim.offloading.pipeline import Chunk
from commrt.optim.offloading.slab import Slab


class StreamedChunk(Chunk):
    """Rows whose state comes into a slot.

    Args:
        rows: With their state in the slab.
        slab: Of host memory.
    """

    def __init__(self, rows: Sequence[Row], slab: Slab) -> None:
        super().__init__(rows)
        self._slab = slab
        self._ranges = Ranges(rows, slab)

    @property
    def slot_bytes(self) -> int:
        """That a slot must have for it."""
        return self._ranges.num_bytes

    def settle_in(self, slot: Tensor, through: Tensor | None) -> None:
        """Use this memory of the device and, if state is in a file, of the host."""
        self._slot, self._through = slot, through

    @property
    def rows_there(self) -> list[Row]:
        """See :class:`Chunk`."""
        return [self._ranges.in_slot(row, self._slot) for row in self.rows]

    def arriving(self) -> Copies:
        """See :class:`Chunk`."""
        return [Copy(slot, kept, through) for slot, kept, through in self._places()]

    def leaving(self) -> Copies:
        """See :class:`Chunk`."""
        return [Copy(kept, slot, through) for slot, kept, through in self._places()]

    def _places(self) -> Iterator[tuple[Tensor, Tensor | FileRange, Tensor | None]]:
        for begin, end, place in self._ranges.pairs:
            there = slice(place, place + end - begin)
            through = None if self._through is None else self._through[there]
            yield self._slot[there], self._slab.between(begin, end), through
