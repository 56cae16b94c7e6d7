"""The blocks of what a rank has of a tensor: those that it has whole, and parts of others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.optim.partition import Blocks
from commrt.optim.shards import Box, Piece, Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Rows of a piece whose blocks are alike.

    Attributes:
        piece: The rows.
        block: First block, of the whole tensor; those of the other rows or columns follow it.
        block_rows: Rows that each has here.
        is_whole: Whether the rank has all of these blocks.
    """

    piece: Piece
    block: int
    block_rows: int
    is_whole: bool

    @property
    def num_blocks(self) -> int:
        """With blocks of rows."""
        return self.piece.rows // self.block_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Rows of one matrix, whose columns have second moments.

    Attributes:
        piece: The rows.
        second: Place of the first column's second moment in the rank's state.
        block_of: int64, the block of each column.
        is_whole: Whether the rank has all of these blocks.
    """

    piece: Piece
    second: int
    block_of: Tensor
    is_whole: bool


class Layout:
    """What a rank has of a tensor, and its blocks.

    Attributes:
        shard: What it has.
        blocks: Of the whole tensor.
        pieces: Its rows.

    Raises:
        ConfigError: Columns are cut within.
    """

    def __init__(self, shard: Shard, blocks: Blocks) -> None:
        if blocks.axis == "element" and isinstance(shard, Box):
            blocks = dataclasses.replace(blocks, row_dims=shard.last_cut or blocks.row_dims)
        self.shard, self.blocks = shard, blocks
        if isinstance(shard, Box) and any(
            part != whole
            for part, whole in list(zip(shard.size, shard.shape, strict=True))[
                blocks.row_dims + 1 :
            ]
        ):
            raise ConfigError(
                f"parameter {shard.name!r} of shape {shard.shape} is cut to {shard.size}: must be "
                f"cut along its first {blocks.row_dims + 1} dimensions"
            )
        self.pieces = tuple(shard.pieces(blocks))
        self.sections: tuple[Section, ...] = ()
        self.columns: tuple[Columns, ...] = ()
        if blocks.axis == "row":
            self.sections = tuple(_row_sections(blocks, self.pieces))
        elif blocks.axis == "column":
            self.columns = tuple(_column_sections(shard, blocks, self.pieces))

    @property
    def numel(self) -> int:
        """Elements that the rank has."""
        return sum(piece.rows * piece.cols for piece in self.pieces)

    @property
    def is_apart(self) -> bool:
        """Whether its step needs nothing of other tensors, ranks, or sums over its rows."""
        return all(section.is_whole for section in self.sections) and not self.columns

    def block_numel(self, block_B: Tensor) -> Tensor:
        """Elements of blocks of the whole tensor, int64."""
        sizes, counts = [], []
        for lines, size in self.blocks.block_sizes():
            sizes.append(size)
            counts.append(lines // size)
        size_B = torch.tensor(sizes, dtype=torch.int64).repeat_interleave(
            torch.tensor(counts, dtype=torch.int64)
        )
        if self.blocks.axis == "row":
            return size_B[block_B] * self.blocks.cols
        return size_B[block_B % len(size_B)] * self.blocks.matrix_rows


def _row_sections(blocks: Blocks, pieces: tuple[Piece, ...]) -> Iterator[Section]:
    first_line, first_block = 0, 0
    for lines, size in blocks.block_sizes():
        for piece in pieces:
            low = max(piece.row, first_line) - first_line
            high = min(piece.row + piece.rows, first_line + lines) - first_line
            is_complete = piece.cols == blocks.cols
            for begin, end in _cut(low, high, size):
                rows = rows_between(piece, begin + first_line, end + first_line)
                yield Section(
                    piece=rows,
                    block=first_block + begin // size,
                    block_rows=min(size, rows.rows),
                    is_whole=is_complete and rows.rows >= size,
                )
        first_line += lines
        first_block += lines // size


def _cut(low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    """A range before, in, and after whole multiples of a size."""
    if low >= high:
        return
    after, before = min(-(-low // size) * size, high), max(high // size * size, low)
    ends = (low, after, max(before, after), high)
    for begin, end in itertools.pairwise(ends):
        if begin < end:
            yield begin, end


def rows_between(piece: Piece, begin: int, end: int) -> Piece:
    """Rows [begin, end) of the whole tensor."""
    ahead = begin - piece.row
    return replace(
        piece,
        start=piece.start + ahead * piece.cols,
        row=begin,
        rows=end - begin,
        line=piece.line + ahead,
        segment=piece.segment + ahead * piece.segments_per_row,
    )


def _column_sections(shard: Shard, blocks: Blocks, pieces: tuple[Piece, ...]) -> Iterator[Columns]:
    sizes = torch.tensor([size for _, size in blocks.block_sizes()], dtype=torch.int64)
    lines = torch.tensor([lines for lines, _ in blocks.block_sizes()], dtype=torch.int64)
    size_B = sizes.repeat_interleave(lines // sizes)
    block_C = torch.arange(len(size_B)).repeat_interleave(size_B)
    rows = blocks.matrix_rows
    for piece in pieces:
        first, last = piece.row // rows, (piece.row + piece.rows - 1) // rows
        for matrix in range(first, last + 1):
            part = rows_between(
                piece,
                max(piece.row, matrix * rows),
                min(piece.row + piece.rows, (matrix + 1) * rows),
            )
            yield Columns(
                piece=part,
                second=shard.column(blocks, matrix, part.col),
                block_of=matrix * len(size_B) + block_C[part.col : part.col + part.cols],
                is_whole=(part.rows, part.cols) == (rows, blocks.cols),
            )
