"""How a list of tensors is cut into one shard a rank, in whole blocks.

Blocks begin anew at each tensor, so a block never mixes two parameters and the result does not
depend on how DDP happens to bucket them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from commrt.codecs import BlockwiseCodec, Window

ALIGNMENT = 16  # bytes; payloads of different shards begin on a vector boundary


class Piece(NamedTuple):
    """A window of one tensor that belongs to a shard."""

    tensor: int
    window: Window


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shards of a list of tensors.

    Attributes:
        shards: For each rank, its pieces in payload order.
    """

    shards: tuple[tuple[Piece, ...], ...]

    def num_blocks(self, rank: int) -> int:
        """Blocks in one rank's shard."""
        return sum(piece.window.num_blocks for piece in self.shards[rank])

    def payload_bytes(self, codec: BlockwiseCodec, rank: int) -> int:
        """Exact payload size of one rank's shard."""
        return codec.payload_bytes(self.num_blocks(rank))

    def slot_bytes(self, codec: BlockwiseCodec, rank: int) -> int:
        """What the payload takes in a buffer: its size, rounded up to the alignment."""
        return -(-self.payload_bytes(codec, rank) // ALIGNMENT) * ALIGNMENT


@functools.lru_cache(maxsize=1024)
def balanced(numels: tuple[int, ...], block: int, world_size: int) -> Layout:
    """Shards of equal size, to one block, over all tensors together."""
    counts = [-(-numel // block) for numel in numels]
    begins = [0, *itertools.accumulate(counts)]
    total = begins[-1]
    cuts = [total * rank // world_size for rank in range(world_size + 1)]
    shards = []
    for low, high in itertools.pairwise(cuts):
        pieces = []
        for tensor, (begin, end) in enumerate(itertools.pairwise(begins)):
            first, last = max(begin, low), min(end, high)
            if first < last:
                pieces.append(Piece(tensor, Window(first - begin, last - first, first - low)))
        shards.append(tuple(pieces))
    return Layout(tuple(shards))


def share_of(numel: int, block: int, rank: int, world_size: int) -> tuple[int, int]:
    """Elements [begin, end) of one rank's share of a tensor: equal numbers of whole blocks, to one.

    Who owns what depends on the tensor alone, not on what else is in the bucket.
    """
    total = -(-numel // block)
    begin, end = (total * cut // world_size * block for cut in (rank, rank + 1))
    return min(begin, numel), min(end, numel)


@functools.lru_cache(maxsize=1024)
def split_each(numels: tuple[int, ...], block: int, world_size: int) -> Layout:
    """Shards of one :func:`share_of` each tensor; of no blocks where there are too few."""
    shards = []
    for rank in range(world_size):
        pieces, at = [], 0
        for tensor, numel in enumerate(numels):
            begin, end = share_of(numel, block, rank, world_size)
            num_blocks = -(-(end - begin) // block)
            pieces.append(Piece(tensor, Window(begin // block, num_blocks, at)))
            at += num_blocks
        shards.append(tuple(pieces))
    return Layout(tuple(shards))


@functools.lru_cache(maxsize=1024)
def owned(numels: tuple[int, ...], owners: tuple[int, ...], block: int, world_size: int) -> Layout:
    """Each tensor belongs to one rank as a whole; a rank may own none, or many."""
    shards: list[list[Piece]] = [[] for _ in range(world_size)]
    blocks = [0] * world_size
    for tensor, (numel, owner) in enumerate(zip(numels, owners, strict=True)):
        num_blocks = -(-numel // block)
        if num_blocks:
            shards[owner].append(Piece(tensor, Window(0, num_blocks, blocks[owner])))
            blocks[owner] += num_blocks
    return Layout(tuple(map(tuple, shards)))


def one_each(numels: Sequence[int], block: int) -> Layout:
    """Tensor r is the shard of rank r, whatever its size."""
    return owned(tuple(numels), tuple(range(len(numels))), block, len(numels))
