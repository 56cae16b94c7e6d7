"""block_decode: outputs are bit-identical on every path, except for the payload bits of NaNs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import FLOAT_DTYPES, BlockFormat
from tests.native import cases
from tests.native.cases import decode_everywhere, encode, floats, format_id, unpack

BLOCK4 = BlockFormat(bits=4, block=32)

# Packed codes, and what they are, by the layout in commrt/ops/format.py.
BY_HAND = [
    (
        BlockFormat(bits=1, block=32, levels="mean"),
        "0180ff00",
        [-1] + [1] * 14 + [-1] * 9 + [1] * 8,
    ),
    (BlockFormat(bits=2, block=32), "0d" * 8, [1, -1, 0, 0] * 8),
    (
        BLOCK4,
        "17293242506fa0f6" * 2,
        [7, -7, 2, 2, 0, -1, 0, 6] * 2 + [1, 2, 3, 4, 5, 6, -6, -1] * 2,
    ),
    (BlockFormat(bits=8, block=32), "7f81ff00" * 8, [127, -127, -1, 0] * 8),
]


@pytest.mark.parametrize("fmt", cases.formats(), ids=format_id)
def test_every_path_equals_the_specification(fmt: BlockFormat) -> None:
    """Output: bit-identical for every dtype and size, up to the payload bits of NaNs."""
    for index, numel in enumerate(cases.sizes(fmt.block)):
        payload = encode(cases.sample(numel, fmt.block, torch.float32, seed=index), fmt)
        for dtype in FLOAT_DTYPES:
            decode_everywhere(payload, fmt, numel, dtype)


@settings(max_examples=50)
@given(
    raw=st.binary(max_size=200),
    kind=st.sampled_from(cases.KINDS),
    dtype=st.sampled_from(FLOAT_DTYPES),
)
def test_every_path_equals_the_specification_on_any_bytes(
    raw: bytes, kind: tuple[int, str], dtype: torch.dtype
) -> None:
    """Output: bit-identical for payloads no encoder makes: any scale, the codes -2, -8 and -128."""
    bits, levels = kind
    fmt = BlockFormat(bits=bits, block=32, levels=levels)
    num_blocks = len(raw) // fmt.block_bytes
    payload = torch.tensor(list(raw[: num_blocks * fmt.block_bytes]), dtype=torch.uint8)
    decode_everywhere(payload, fmt, num_blocks * 32, dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("fmt", "codes", "values"), BY_HAND)
def test_layout_by_hand(
    fmt: BlockFormat, codes: str, values: list[int], dtype: torch.dtype
) -> None:
    """Output: code * scale, on every path, for scales of 1 and -0.5 and NaN."""
    scales = "803f" + "00bf" + "c07f"
    payload = torch.tensor(list(bytes.fromhex(codes * 3 + scales)), dtype=torch.uint8)
    output = decode_everywhere(payload, fmt, 96, dtype)
    assert output[:32].tolist() == values
    assert output[32:64].tolist() == [value * -0.5 for value in values]
    assert output[64:].isnan().all()


@pytest.mark.parametrize("fmt", cases.formats((64,)), ids=format_id)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_output_is_code_times_scale(fmt: BlockFormat, dtype: torch.dtype) -> None:
    """Output: the exact product, rounded once to the output's dtype."""
    payload = encode(cases.sample(3001, 64, torch.float32, seed=3), fmt)
    codes, scale = unpack(payload, fmt)
    exact = (codes * scale.double()[:, None]).view(-1)[:3001]
    torch.testing.assert_close(
        decode_everywhere(payload, fmt, 3001, dtype),
        exact.to(dtype),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("fmt", cases.formats((64,)), ids=format_id)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_window_is_decoded_and_nothing_else_is_touched(
    fmt: BlockFormat, dtype: torch.dtype
) -> None:
    """Output: the window's elements are those of the whole output; the others stay."""
    numel = 7 * 64 - 9
    payload = encode(cases.sample(numel, 64, torch.float32, seed=2), fmt)
    whole = decode_everywhere(payload, fmt, numel, dtype)
    for first, count, at in ((2, 3, 2), (1, 2, 4), (5, 2, 5), (4, 0, 7)):
        output = torch.full((numel,), 42.0, dtype=dtype)
        expected = output.clone()
        begin, end = first * 64, min((first + count) * 64, numel)
        expected[begin:end] = whole[at * 64 : at * 64 + end - begin]
        cases.run_everywhere(
            ops.block_decode,
            payload,
            output,
            fmt,
            first_block=first,
            num_blocks=count,
            at_block=at,
        )
        cases.assert_same_bits(output, expected)


@pytest.mark.parametrize("fmt", cases.formats((32, 1024)), ids=format_id)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_unaligned_pointers(fmt: BlockFormat, dtype: torch.dtype) -> None:
    """Output: bit-identical to the aligned one, where neither address is aligned."""
    payload = encode(cases.sample(3001, fmt.block, torch.float32, seed=1), fmt)
    output = cases.unaligned(torch.zeros(3001, dtype=dtype))
    cases.run_everywhere(ops.block_decode, cases.unaligned(payload), output, fmt)
    cases.assert_same_bits(output, decode_everywhere(payload, fmt, 3001, dtype))


@settings(max_examples=50)
@given(flat=floats(), kind=st.sampled_from(cases.KINDS), cut=st.integers(0, 4))
def test_two_windows_give_the_output_of_one(flat: Tensor, kind: tuple[int, str], cut: int) -> None:
    """Output: bit-identical, up to the payload bits of NaNs."""
    bits, levels = kind
    fmt = BlockFormat(bits=bits, block=32, levels=levels)
    payload = encode(flat, fmt)
    cut = min(cut, fmt.num_blocks(flat.numel()))
    halves = torch.empty_like(flat)
    ops.block_decode(payload, halves, fmt, first_block=cut, at_block=cut)
    ops.block_decode(payload, halves, fmt, num_blocks=cut)
    cases.assert_same_bits(halves, decode_everywhere(payload, fmt, flat.numel()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(64, dtype=torch.int32)}, r"int32.*must be one of.*bfloat16"),
        ({"output": torch.zeros(64, 1)}, r"\(64, 1\).*must be 1-D and contiguous"),
        ({"output": torch.zeros(128)[::2]}, r"\(64,\).*must be 1-D and contiguous"),
        ({"payload": torch.zeros(36, dtype=torch.int8)}, r"int8 \(36,\).*must be 1-D uint8"),
        ({"payload": torch.zeros(35, dtype=torch.uint8)}, "35 bytes.*multiple of 18"),
        ({"payload": torch.zeros(18, dtype=torch.uint8)}, r"\[0, 2\).*payload of 1 blocks"),
        ({"first_block": 3}, r"\[3, 2\).*tensor of 2 blocks"),
        ({"num_blocks": 3}, r"\[0, 3\).*tensor of 2 blocks"),
        ({"at_block": 1}, r"\[1, 3\).*payload of 2 blocks"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    """A ConfigError with the value and what is allowed; nothing is written."""
    output = torch.full((64,), 42.0)
    payload = torch.zeros(36, dtype=torch.uint8)
    arguments: dict[str, Any] = {"payload": payload, "output": output, "fmt": BLOCK4}
    with pytest.raises(ConfigError, match=message):
        ops.block_decode(**(arguments | change))
    assert output.eq(42).all()
