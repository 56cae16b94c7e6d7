"""block_encode: payloads are bit-identical on every path; nothing may differ."""

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
from tests.native.cases import (
    blocks,
    decode,
    empty_payload,
    encode_everywhere,
    floats,
    format_id,
    unpack,
)

BLOCK4 = BlockFormat(bits=4, block=32)

# 32 elements with scale exactly 1 at each width, and their codes packed by hand.
BY_HAND = [
    (BlockFormat(bits=1, block=32, levels="mean"), [1.0, -1.0, -1.0, 1.0] * 8, "66666666"),
    (BlockFormat(bits=2, block=32), [1.0, -1.0, 0.0, 0.25] * 8, "0d" * 8),
    (
        BLOCK4,
        [7.0, -7.0, 1.5, 2.5, -0.5, -1.0, 0.0, 6.0] * 2 + [1, 2, 3, 4, 5, 6, -6, -1] * 2,
        "17293242506fa0f6" * 2,
    ),
    (BlockFormat(bits=8, block=32), [127.0, -127.0, -1.0, 0.5] * 8, "7f81ff00" * 8),
]


@pytest.mark.parametrize("fmt", cases.formats(), ids=format_id)
def test_every_path_equals_the_specification(fmt: BlockFormat) -> None:
    """Payload: bit-identical for every dtype, size and rounding."""
    for index, numel in enumerate(cases.sizes(fmt.block)):
        for dtype in FLOAT_DTYPES:
            encode_everywhere(cases.sample(numel, fmt.block, dtype, seed=index), fmt)
        if fmt.bits > 1:
            dtype = FLOAT_DTYPES[index % 3]
            encode_everywhere(
                cases.sample(numel, fmt.block, dtype, seed=index), fmt, seed=2**62 + 7
            )


@settings(max_examples=50)
@given(flat=floats(), kind=st.sampled_from(cases.KINDS), seed=st.none() | st.integers(0, 2**63 - 1))
def test_every_path_equals_the_specification_on_any_floats(
    flat: Tensor, kind: tuple[int, str], seed: int | None
) -> None:
    """Payload: bit-identical."""
    bits, levels = kind
    encode_everywhere(
        flat, BlockFormat(bits=bits, block=32, levels=levels), None if bits == 1 else seed
    )


@pytest.mark.parametrize("fmt", cases.formats((64,)), ids=format_id)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_window_is_encoded_and_nothing_else_is_touched(
    fmt: BlockFormat, dtype: torch.dtype
) -> None:
    """Payload: the window's blocks are those of the whole tensor's payload; other bytes stay."""
    flat = cases.sample(7 * 64 - 9, 64, dtype, seed=2)
    seed = None if fmt.bits == 1 else 5
    whole_codes, whole_scale = unpack(encode_everywhere(flat, fmt, seed), fmt)
    for first, count, at, total in ((2, 3, 1, 5), (5, 2, 0, 2), (0, 7, 2, 9), (4, 0, 3, 3)):
        payload = empty_payload(fmt, total)
        expected_codes, expected_scale = unpack(payload.clone(), fmt)
        expected_codes[at : at + count] = whole_codes[first : first + count]
        expected_scale[at : at + count] = whole_scale[first : first + count]
        cases.run_everywhere(
            ops.block_encode,
            flat,
            payload,
            fmt,
            seed=seed,
            first_block=first,
            num_blocks=count,
            at_block=at,
        )
        codes, scale = unpack(payload, fmt)
        assert torch.equal(codes, expected_codes)
        cases.assert_same_bits(scale, expected_scale)


@pytest.mark.parametrize("fmt", cases.formats((32, 1024)), ids=format_id)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_unaligned_pointers(fmt: BlockFormat, dtype: torch.dtype) -> None:
    """Payload: bit-identical to the aligned one, where neither address is aligned."""
    flat = cases.sample(3001, fmt.block, dtype, seed=1)
    expected = encode_everywhere(flat, fmt)
    payload = cases.unaligned(torch.zeros_like(expected))
    cases.run_everywhere(ops.block_encode, cases.unaligned(flat), payload, fmt)
    assert torch.equal(payload, expected)


@pytest.mark.parametrize(("fmt", "values", "codes"), BY_HAND)
def test_layout_by_hand(fmt: BlockFormat, values: list[float], codes: str) -> None:
    """Payload: these bytes, on every path; the second block is zero."""
    payload = encode_everywhere(torch.tensor(values + [0.0] * 32), fmt).numpy().tobytes()
    assert payload.hex() == codes + "00" * fmt.code_bytes + "803f" + "0000"


@settings(max_examples=50)
@given(flat=floats(finite=True), bits=st.sampled_from((2, 4, 8)))
def test_error_is_at_most_half_a_scale(flat: Tensor, bits: int) -> None:
    """Levels by the maximum, to nearest; a block too small for a normal scale becomes zero."""
    fmt = BlockFormat(bits=bits, block=32)
    codes, scale = unpack(encode_everywhere(flat, fmt), fmt)
    assert codes.abs().amax(dim=1).le(fmt.max_code).all()
    error = (blocks(flat, 32).double() - codes * scale.double()[:, None]).abs()
    tiny = fmt.max_code * torch.finfo(torch.float32).tiny
    bound = torch.where(scale > 0, 0.5 * scale.double(), tiny)
    assert (error <= bound[:, None] * (1 + 2.0**-14)).all()  # value * (1 / scale) rounds twice


@settings(max_examples=50)
@given(flat=floats(finite=True), bits=st.sampled_from((2, 4, 8)), seed=st.integers(0, 2**63 - 1))
def test_stochastic_error_is_less_than_a_scale(flat: Tensor, bits: int, seed: int) -> None:
    """Levels by the maximum."""
    fmt = BlockFormat(bits=bits, block=32)
    codes, scale = unpack(encode_everywhere(flat, fmt, seed), fmt)
    assert codes.abs().amax(dim=1).le(fmt.max_code).all()
    error = (blocks(flat, 32).double() - codes * scale.double()[:, None]).abs()
    tiny = fmt.max_code * torch.finfo(torch.float32).tiny
    bound = torch.where(scale > 0, scale.double(), tiny)
    assert (error <= bound[:, None] * (1 + 2.0**-14)).all()


@settings(max_examples=50)
@given(flat=floats(), kind=st.sampled_from(cases.KINDS), seed=st.none() | st.integers(0, 2**63 - 1))
def test_zero_maps_to_zero(flat: Tensor, kind: tuple[int, str], seed: int | None) -> None:
    """Each zero, in a block with a finite scale; at 1 bit a block of zeros."""
    bits, levels = kind
    fmt = BlockFormat(bits=bits, block=32, levels=levels)
    payload = encode_everywhere(flat, fmt, None if bits == 1 else seed)
    assert payload.numel() == fmt.payload_bytes(-(-flat.numel() // 32))
    is_zero = blocks(flat, 32) == 0
    if bits == 1:
        is_zero &= is_zero.all(dim=1, keepdim=True)
    codes, scale = unpack(payload, fmt)
    decoded = codes * scale[:, None]
    assert decoded[is_zero & scale.isfinite()[:, None]].eq(0).all()


@settings(max_examples=50)
@given(flat=floats(), kind=st.sampled_from(cases.KINDS))
def test_exactly_the_blocks_with_a_non_finite_element_become_nan(
    flat: Tensor, kind: tuple[int, str]
) -> None:
    """Where an element is NaN or infinite its block decodes to NaN, every other one to numbers."""
    bits, levels = kind
    fmt = BlockFormat(bits=bits, block=32, levels=levels)
    decoded = decode(encode_everywhere(flat, fmt), fmt, flat.numel())
    is_finite = blocks(flat, 32).isfinite().all(dim=1, keepdim=True)
    expected = is_finite.expand(-1, 32).reshape(-1)[: flat.numel()]
    assert torch.equal(decoded.isfinite(), expected)
    assert decoded[~expected].isnan().all()


@settings(max_examples=50)
@given(
    flat=floats(),
    kind=st.sampled_from(cases.KINDS),
    seed=st.none() | st.integers(0, 2**63 - 1),
    cut=st.integers(0, 4),
)
def test_two_windows_give_the_payload_of_one(
    flat: Tensor, kind: tuple[int, str], seed: int | None, cut: int
) -> None:
    """Payload: bit-identical, stochastic rounding included: draws go by element, not by call."""
    bits, levels = kind
    fmt = BlockFormat(bits=bits, block=32, levels=levels)
    seed = None if bits == 1 else seed
    cut = min(cut, fmt.num_blocks(flat.numel()))
    halves = empty_payload(fmt, fmt.num_blocks(flat.numel()))
    ops.block_encode(flat, halves, fmt, seed=seed, first_block=cut, at_block=cut)
    ops.block_encode(flat, halves, fmt, seed=seed, num_blocks=cut)
    assert torch.equal(halves, encode_everywhere(flat, fmt, seed))


@settings(max_examples=50)
@given(flat=floats(finite=True), kind=st.sampled_from(cases.KINDS))
def test_negated_elements_have_negated_codes(flat: Tensor, kind: tuple[int, str]) -> None:
    """To nearest. One bit has no code for zero, so there zeros are left out."""
    bits, levels = kind
    fmt = BlockFormat(bits=bits, block=32, levels=levels)
    codes, scale = unpack(encode_everywhere(flat, fmt), fmt)
    negated, same_scale = unpack(encode_everywhere(-flat, fmt), fmt)
    assert torch.equal(scale, same_scale)
    compared = torch.ones_like(codes, dtype=torch.bool)
    if bits == 1:
        compared = (blocks(flat, 32) != 0) & (scale > 0)[:, None]
    assert torch.equal(negated[compared], -codes[compared])


@settings(max_examples=50)
@given(flat=floats(), kind=st.sampled_from(cases.KINDS))
def test_encoding_what_was_decoded_changes_nothing(flat: Tensor, kind: tuple[int, str]) -> None:
    """Payload: bit-identical; at 8 bits only in blocks that use the largest code.

    The scale is rounded up to 8 significant bits, so 8-bit codes may end at 126 and the second
    scale be smaller. Huge blocks are left out: their mean may overflow only the second time.
    """
    bits, levels = kind
    fmt = BlockFormat(bits=bits, block=32, levels=levels)
    flat = torch.where(flat.abs() > 1e30, flat * 1e-8, flat)
    payload = encode_everywhere(flat, fmt)
    codes, scale = unpack(payload, fmt)
    again_codes, again_scale = unpack(
        encode_everywhere(decode(payload, fmt, flat.numel()), fmt), fmt
    )
    stable = (codes.abs().amax(dim=1) == fmt.max_code) | scale.isnan() | (scale == 0)
    assert stable.all() or bits == 8
    kept = codes != 0 if bits == 1 else torch.ones_like(codes, dtype=torch.bool)
    kept = kept & stable[:, None]
    assert torch.equal(again_codes[kept], codes[kept])
    cases.assert_same_bits(again_scale[stable], scale[stable])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    """The mean over 2,000 seeds is within five standard errors of each of 64 elements."""
    fmt, num_seeds = BlockFormat(bits=bits, block=64), 2000
    flat = cases.sample(64, 64, torch.float32, seed=0)
    payloads = torch.empty(num_seeds, fmt.payload_bytes(1), dtype=torch.uint8)
    for seed in range(num_seeds):
        ops.block_encode(flat, payloads[seed], fmt, seed=seed)
    decoded = torch.stack([torch.empty(64)] * num_seeds)
    for payload, output in zip(payloads, decoded, strict=True):
        ops.block_decode(payload, output, fmt)
    _, scale = unpack(payloads[0], fmt)
    level = flat.double() / scale.double()
    fraction = level - level.floor()
    deviation = scale.double() * (fraction * (1 - fraction) / num_seeds).sqrt()
    bias = (decoded.double().mean(dim=0) - flat.double()).abs()
    assert (bias <= 5 * deviation + 1e-6 * scale.double()).all()
    assert (bias > deviation).sum() < 40  # about a third are, where the draws are uniform


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(64, dtype=torch.float64)}, r"float64.*must be one of.*bfloat16"),
        ({"input": torch.zeros(2, 32)}, r"\(2, 32\).*must be 1-D and contiguous"),
        ({"input": torch.zeros(128)[::2]}, r"\(64,\).*must be 1-D and contiguous"),
        ({"input": torch.tensor(0.0)}, r"\(\).*must be 1-D and contiguous"),
        ({"payload": torch.zeros(36)}, r"payload is torch.float32 \(36,\).*must be 1-D uint8"),
        ({"payload": torch.zeros(72, dtype=torch.uint8)[::2]}, "must be 1-D uint8"),
        ({"payload": torch.zeros(37, dtype=torch.uint8)}, "37 bytes.*multiple of 18"),
        ({"payload": torch.zeros(18, dtype=torch.uint8)}, r"\[0, 2\).*payload of 1 blocks"),
        ({"first_block": 3}, r"\[3, 2\).*tensor of 2 blocks"),
        ({"first_block": -1}, r"\[-1, 2\).*tensor of 2 blocks"),
        ({"num_blocks": 3}, r"\[0, 3\).*tensor of 2 blocks"),
        ({"num_blocks": -1}, r"\[0, -1\).*tensor of 2 blocks"),
        ({"at_block": 1}, r"\[1, 3\).*payload of 2 blocks"),
        ({"at_block": -1}, r"\[-1, 1\).*payload of 2 blocks"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    """A ConfigError with the value and what is allowed; nothing is written."""
    payload = empty_payload(BLOCK4, 2)
    arguments: dict[str, Any] = {"input": torch.zeros(64), "payload": payload, "fmt": BLOCK4}
    with pytest.raises(ConfigError, match=message):
        ops.block_encode(**(arguments | change))
    assert payload.eq(cases.FILL).all()


def test_one_bit_cannot_be_stochastic() -> None:
    fmt = BlockFormat(bits=1, block=32, levels="mean")
    with pytest.raises(ConfigError, match="bits=1: needs 2, 4 or 8"):
        ops.block_encode(torch.zeros(32), empty_payload(fmt, 1), fmt, seed=0)
