"""The payload layout: sizes, code ranges, and what is not a format."""

import dataclasses
from typing import Any

import pytest

from commrt.errors import ConfigError
from commrt.ops import BlockFormat
from commrt.ops.format import BITS, BLOCKS


@pytest.mark.parametrize(
    ("bits", "levels", "block_bytes", "max_code"),
    [
        (1, "mean", 18, 1),
        (2, "mean", 34, 1),
        (2, "absmax", 34, 1),
        (4, "absmax", 66, 7),
        (8, "absmax", 130, 127),
    ],
)
def test_sizes(bits: int, levels: str, block_bytes: int, max_code: int) -> None:
    """Blocks of 128: codes and two bytes of scale."""
    fmt = BlockFormat(bits=bits, block=128, levels=levels)
    assert fmt.code_bytes == block_bytes - 2
    assert fmt.block_bytes == block_bytes
    assert fmt.max_code == max_code
    assert fmt.mean_levels == (levels == "mean")
    assert fmt.payload_bytes(0) == 0
    assert fmt.payload_bytes(1000) == 1000 * block_bytes


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_a_payload_has_bits_and_16_over_block_bits_an_element(bits: int, block: int) -> None:
    fmt = BlockFormat(bits=bits, block=block, levels="mean" if bits == 1 else "absmax")
    assert fmt.payload_bytes(8) * 8 == (bits + 16 / block) * 8 * block


@pytest.mark.parametrize(
    ("numel", "num_blocks"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (3001, 94)]
)
def test_the_last_block_may_be_cut_short(numel: int, num_blocks: int) -> None:
    assert BlockFormat(bits=4, block=32).num_blocks(numel) == num_blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, r"bits=3: must be one of \(1, 2, 4, 8\)"),
        ({"bits": 0}, r"bits=0: must be one of"),
        ({"bits": "4"}, r"bits='4': must be one of"),
        ({"block": 100}, r"block=100: must be one of \(32, 64, 128, 256, 512, 1024\)"),
        ({"block": 16}, r"block=16: must be one of"),
        ({"block": 2048}, r"block=2048: must be one of"),
        ({"levels": "median"}, r"levels='median': must be one of \('absmax', 'mean'\)"),
        ({"bits": 4, "levels": "mean"}, r"levels='mean' with bits=4: only 1 and 2"),
        ({"bits": 8, "levels": "mean"}, r"levels='mean' with bits=8: only 1 and 2"),
        ({"bits": 1}, r"levels='absmax' with bits=1: one bit needs levels='mean'"),
    ],
)
def test_what_is_not_a_format_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlockFormat(**{"bits": 2, "block": 128, **options})


def test_a_format_is_a_value() -> None:
    fmt = BlockFormat(bits=4, block=128)
    assert fmt == BlockFormat(bits=4, block=128, levels="absmax")
    assert hash(fmt) == hash(BlockFormat(bits=4, block=128))
    assert fmt != BlockFormat(bits=4, block=64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bits = 8  # type: ignore[misc]
