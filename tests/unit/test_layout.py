"""How tensors are cut into shards: every block once, evenly, for any world size and any lengths."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commrt.codecs import Codec, Window, parse
from commrt.collectives.layout import (
    ALIGNMENT,
    Layout,
    Piece,
    balanced,
    one_each,
    owned,
    share_of,
    split_each,
)

NUMELS = st.lists(st.sampled_from([0, 1, 5, 31, 32, 33, 128, 1000, 4099]), max_size=8)
BLOCKS = st.sampled_from([32, 128, 1024])
WORLD_SIZES = st.integers(1, 9)


def blocks_of(numels: list[int], block: int) -> Counter[tuple[int, int]]:
    """Every block of every tensor, once."""
    counts = [-(-numel // block) for numel in numels]
    return Counter((tensor, index) for tensor, count in enumerate(counts) for index in range(count))


def blocks_in(layout: Layout) -> Counter[tuple[int, int]]:
    """Every block that lies in a shard, as often as it does."""
    return Counter(
        (tensor, window.first_block + index)
        for pieces in layout.shards
        for tensor, window in pieces
        for index in range(window.num_blocks)
    )


def assert_payloads_are_dense(layout: Layout) -> None:
    """Each shard's windows follow one another in its payload, from its first block on."""
    for rank, pieces in enumerate(layout.shards):
        at_block = 0
        for _, window in pieces:
            assert window.at_block == at_block
            assert window.num_blocks > 0
            at_block += window.num_blocks
        assert layout.num_blocks(rank) == at_block


@given(NUMELS, BLOCKS, WORLD_SIZES)
def test_balanced_shards_hold_every_block_once(
    numels: list[int], block: int, world_size: int
) -> None:
    layout = balanced(tuple(numels), block, world_size)
    assert len(layout.shards) == world_size
    assert blocks_in(layout) == blocks_of(numels, block)
    assert_payloads_are_dense(layout)


@given(NUMELS, BLOCKS, WORLD_SIZES)
def test_balanced_shards_differ_by_one_block_at_most(
    numels: list[int], block: int, world_size: int
) -> None:
    layout = balanced(tuple(numels), block, world_size)
    counts = [layout.num_blocks(rank) for rank in range(world_size)]
    assert max(counts) - min(counts) <= 1


def test_a_block_never_holds_two_tensors() -> None:
    """Tensors of 1 and 129 elements take one and two blocks of 128, not two together."""
    layout = balanced((1, 129), 128, 1)
    assert layout.shards == ((Piece(0, Window(0, 1, 0)), Piece(1, Window(0, 2, 1))),)


def test_more_ranks_than_blocks_leave_some_shards_empty() -> None:
    layout = balanced((0, 5, 0), 128, 3)
    assert sorted(layout.shards) == [(), (), (Piece(1, Window(0, 1, 0)),)]


@given(NUMELS, BLOCKS, WORLD_SIZES)
def test_shares_of_each_tensor_hold_every_block_once(
    numels: list[int], block: int, world_size: int
) -> None:
    """Each rank has a piece of every tensor, if an empty one, so indices need no bookkeeping."""
    layout = split_each(tuple(numels), block, world_size)
    assert len(layout.shards) == world_size
    assert blocks_in(layout) == blocks_of(numels, block)
    for rank, pieces in enumerate(layout.shards):
        assert [piece.tensor for piece in pieces] == list(range(len(numels)))
        at_block = 0
        for tensor, window in pieces:
            begin, end = share_of(numels[tensor], block, rank, world_size)
            assert window.at_block == at_block
            assert window.num_blocks == -(-(end - begin) // block)
            assert window.first_block * block == begin or begin == end
            at_block += window.num_blocks
        assert layout.num_blocks(rank) == at_block


@given(st.integers(0, 5000), BLOCKS, WORLD_SIZES)
def test_shares_of_a_tensor_follow_one_another_and_differ_by_one_block(
    numel: int, block: int, world_size: int
) -> None:
    """In whole blocks, but for the end of the tensor."""
    shares = [share_of(numel, block, rank, world_size) for rank in range(world_size)]
    cuts = [begin for begin, _ in shares]
    assert [0, *(end for _, end in shares)] == [*cuts, numel]
    assert all(cut % block == 0 or cut == numel for cut in cuts)
    counts = [-(-(end - begin) // block) for begin, end in shares]
    assert max(counts) - min(counts) <= 1


def test_who_owns_a_block_does_not_depend_on_the_other_tensors() -> None:
    """As it does where shards are balanced over all of them."""
    alone, behind = split_each((1000,), 128, 2), split_each((500, 1000), 128, 2)
    for shard, other in zip(alone.shards, behind.shards, strict=True):
        assert shard[0].window[:2] == other[1].window[:2]
    balanced_one = balanced((500, 1000), 128, 2).shards[1][-1]
    assert balanced_one.window[:2] != alone.shards[1][0].window[:2]


@given(NUMELS.filter(len), BLOCKS)
def test_one_each_gives_rank_r_all_of_tensor_r(numels: list[int], block: int) -> None:
    layout = one_each(numels, block)
    assert blocks_in(layout) == blocks_of(numels, block)
    assert_payloads_are_dense(layout)
    for rank, pieces in enumerate(layout.shards):
        assert {piece.tensor for piece in pieces} <= {rank}


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2))), BLOCKS)
def test_owned_gives_every_rank_its_tensors(given: list[tuple[int, int]], block: int) -> None:
    numels, owners = tuple(numel for numel, _ in given), tuple(owner for _, owner in given)
    layout = owned(numels, owners, block, 3)
    assert blocks_in(layout) == blocks_of(list(numels), block)
    assert_payloads_are_dense(layout)
    for rank, pieces in enumerate(layout.shards):
        assert all(owners[piece.tensor] == rank for piece in pieces)
        assert [piece.tensor for piece in pieces] == sorted(piece.tensor for piece in pieces)


@pytest.mark.parametrize("codec", ["none", "block8", "loco4", "loco2", "loco1:block=32"])
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_slots_are_payloads_rounded_up_to_the_alignment(codec: str, world_size: int) -> None:
    parsed: Codec = parse(codec)
    layout = balanced((1, 5, 1000, 4099), parsed.block, world_size)
    for rank in range(world_size):
        payload = layout.payload_bytes(parsed, rank)
        slot = layout.slot_bytes(parsed, rank)
        assert payload == parsed.payload_bytes(layout.num_blocks(rank))
        assert slot % ALIGNMENT == 0
        assert 0 <= slot - payload < ALIGNMENT
