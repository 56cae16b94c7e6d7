"""Rows of parameters that are updated together, and where their state is meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from commrt.ops import StepTensor
from commrt.optim.offloading.slab import Slab, aligned
from commrt.optim.parts import Part
from commrt.optim.sections import rows_between
from commrt.optim.shards import Piece


class Row(NamedTuple):
    """Rows of a part.

    Attributes:
        part: Whose they are.
        name: Of the op that updates them.
        piece: Which rows.
        tensor: Their tensors.
    """

    part: Part
    name: str
    piece: Piece
    tensor: StepTensor

    def between(self, begin: int, end: int) -> Row:
        """Some of them."""
        if (begin, end) == (0, self.tensor.rows):
            return self
        first = self.piece.row
        piece = rows_between(self.piece, first + begin, first + end)
        return self._replace(piece=piece, tensor=self.tensor.between(begin, end))

    def moved(self, slab: Slab) -> Iterator[tuple[int, int]]:
        """What of its state is in the slab: where it begins and ends."""
        for value in _state(self.tensor):
            found = slab.range_of(value)
            if found is not None:
                yield found


def chunks_of(rows: Iterable[Row], slab: Slab, most_bytes: int) -> Iterator[list[Row]]:
    """Cut rows into lists that have at most so many bytes in the slab, if their blocks allow it.

    Args:
        rows: In the order in which they are to be updated.
        slab: Where the state is.
        most_bytes: Of a chunk.
    """
    chunk: list[Row] = []
    left = most_bytes
    for row in rows:
        num_rows, begin = row.tensor.rows, 0
        bytes_per_row = sum(end - start for start, end in row.moved(slab)) / max(1, num_rows)
        least = row.tensor.block_rows
        while begin < num_rows:
            fitting = num_rows - begin
            if bytes_per_row and bytes_per_row * fitting > left:
                fitting = int(max(left, 0) / bytes_per_row) // least * least
            if fitting == 0 and chunk:
                yield chunk
                chunk, left = [], most_bytes
                continue
            end = min(begin + max(fitting, least), num_rows)
            chunk.append(row.between(begin, end))
            left -= int(bytes_per_row * (end - begin))
            begin = end
    if chunk:
        yield chunk


class Ranges:
    """What a chunk has in the slab, and where that is in a slot.

    Args:
        rows: Of the chunk.
        slab: Where their state is.

    Attributes:
        pairs: Begin and end in the slab, begin in the slot.
        num_bytes: That the slot needs.
    """

    def __init__(self, rows: Sequence[Row], slab: Slab) -> None:
        self._slab = slab
        self.pairs: list[tuple[int, int, int]] = []
        at = 0
        for begin, end in sorted({found for row in rows for found in row.moved(slab)}):
            last = self.pairs[-1] if self.pairs else None
            if last is not None and begin <= aligned(last[1]):
                self.pairs[-1] = last[0], end, last[2]
            else:
                place = at + begin - begin // 64 * 64
                self.pairs.append((begin, end, place))
            begin, end, place = self.pairs[-1]
            at = aligned(place + end - begin)
        self.num_bytes = at

    def in_slot(self, row: Row, slot: Tensor) -> Row:
        """The row with what is in the slab taken from the slot."""
        tensor = row.tensor

        def there(value: Tensor) -> Tensor:
            found = self._slab.range_of(value)
            if found is None:
                return value
            begin, end = found
            start, _, place = next(p for p in self.pairs if p[0] <= begin and end <= p[1])
            place += begin - start
            return slot[place : place + end - begin].view(value.dtype)

        moved = dataclasses.replace(
            tensor,
            moments=tuple(map(there, tensor.moments)),
            scales=tuple(map(there, tensor.scales)),
            extra=None if tensor.extra is None else there(tensor.extra),
            second=None if tensor.second is None else there(tensor.second),
        )
        return row._replace(tensor=moved)


def _state(tensor: StepTensor) -> Iterator[Tensor]:
    yield from tensor.moments
    yield from tensor.scales
    for value in (tensor.extra, tensor.second):
        if value is not None:
            yield value
