"""rans_count_: how often each row has each symbol, in parts of the codes."""

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from tests.native import cases
from tests.native.test_threads import threads


def sample(numel: int, num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(numel)
    codes = (8 * torch.randn(numel, generator=generator)).round().short()
    codes[::31] = torch.arange(numel)[::31].short() * 257 - 32768
    return codes, torch.randint(num_rows, (numel,), generator=generator).short()


@pytest.mark.parametrize("ends", [[0], [700], [699], [0, 0, 700], [33, 600, 601, 650]])
def test_every_path_equals_the_specification(ends: list[int]) -> None:
    """Added to what was there; what is behind the last end is not counted."""
    codes, rows = sample(700, 9)
    counts = torch.arange(len(ends) * 9 * 64).view(-1, 9, 64)
    cases.run_everywhere(ops.rans_count_, counts, cases.unaligned(codes), rows, ends)
    for count in (2, 16):
        more = torch.zeros_like(counts)
        with threads(count):
            ops.rans_count_(more, codes, rows, ends)
        assert torch.equal(more + torch.arange(counts.numel()).view_as(counts), counts)


def test_of_several_vectors() -> None:
    codes, rows = (flat.view(4, 175) for flat in sample(700, 9))
    counts, apart = torch.zeros(2, 9, 64, dtype=torch.int64), torch.zeros(2, 9, 64).long()
    cases.run_everywhere(ops.rans_count_, counts, codes, rows, [30, 170])
    for code, row in zip(codes, rows, strict=True):
        ops.rans_count_(apart, code, row, [30, 170])
    assert torch.equal(counts, apart)


def test_by_hand() -> None:
    codes = torch.tensor([0, 0, -31, 31, 32, -32768, 1], dtype=torch.int16)
    rows = torch.tensor([0, 0, 1, 1, 1, 0, 2], dtype=torch.int16)
    counts = torch.zeros(2, 3, 64, dtype=torch.int64)
    ops.rans_count_(counts, codes, rows, [5, 7])
    found = {tuple(index): int(counts[tuple(index)]) for index in counts.nonzero().tolist()}
    first = {(0, 0, 31): 2, (0, 1, 0): 1, (0, 1, 62): 1, (0, 1, 63): 1}
    assert found == {**first, (1, 0, 63): 1, (1, 2, 32): 1}


@pytest.mark.parametrize("row", [-1, 9, 32767, -32768])
def test_a_row_that_there_is_none_of(row: int) -> None:
    codes, rows = sample(700, 9)
    for where in (0, 699):
        others = rows.index_fill(0, torch.tensor(where), row)
        for use in (cases.using_specification(), *cases.paths().values()):
            with use, pytest.raises(ConfigError, match=r"rows are -?\d+ to \d+: must be 0 to 8"):
                ops.rans_count_(torch.zeros(1, 9, 64, dtype=torch.int64), codes, others, [700])


def test_tensors_that_do_not_serve() -> None:
    codes, rows = sample(700, 9)
    counts = torch.zeros(1, 9, 64, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"counts is torch\.int32 \(1, 9, 64\): must be int64"):
        ops.rans_count_(counts.int(), codes, rows, [700])
    with pytest.raises(ConfigError, match=r"counts is torch\.int64 \(9, 64\): must be int64"):
        ops.rans_count_(counts[0], codes, rows, [700])
    with pytest.raises(ConfigError, match=r"counts has strides .*: must be contiguous"):
        ops.rans_count_(torch.zeros(1, 18, 64).long()[:, ::2], codes, rows, [700])
    with pytest.raises(ConfigError, match="rows has 699 elements: must have 700"):
        ops.rans_count_(counts, codes, rows[1:], [700])
    for ends in ([701], [-1], [350, 700], []):
        with pytest.raises(ConfigError, match="must be 1 that do not fall, from 0 to 700"):
            ops.rans_count_(counts, codes, rows, ends)
    with pytest.raises(ConfigError, match="must be 2 that do not fall, from 0 to 700"):
        ops.rans_count_(counts.repeat(2, 1, 1), codes, rows, [600, 500])
