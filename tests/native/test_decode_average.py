"""decode_average: outputs are bit-identical on every path, except for the payload bits of NaNs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import FLOAT_DTYPES, BlockFormat
from tests.native import cases
from tests.native.cases import decode, encode, format_id

BLOCK4 = BlockFormat(bits=4, block=32)


def stack(num_ranks: int, numel: int, fmt: BlockFormat, spare: int = 0) -> Tensor:
    """A payload of each rank; rows are ``spare`` bytes longer than their payload."""
    flats = [
        cases.sample(numel, fmt.block, torch.float32, seed=3 * rank) for rank in range(num_ranks)
    ]
    payloads = torch.stack([encode(flat, fmt) for flat in flats])
    wide = torch.full((num_ranks, payloads.shape[1] + spare), cases.FILL, dtype=torch.uint8)
    wide[:, : payloads.shape[1]] = payloads
    return wide[:, : payloads.shape[1]]


def mean_of_decoded(payloads: Tensor, fmt: BlockFormat, numel: int) -> Tensor:
    """In rank order and fp32, times the fp32 value of 1 / R."""
    total = torch.zeros(numel)
    for payload in payloads:
        total += decode(payload.clone(), fmt, numel)
    return total * torch.tensor(1 / payloads.shape[0])


def average(
    payloads: Tensor, fmt: BlockFormat, numel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    output = torch.full((numel,), 42.0, dtype=dtype)
    cases.run_everywhere(ops.decode_average, payloads, output, fmt)
    return output


@pytest.mark.parametrize("fmt", cases.formats(), ids=format_id)
def test_every_path_equals_the_mean_of_the_decoded(fmt: BlockFormat) -> None:
    """Output: bit-identical for 1 to 5 ranks, every size and dtype, rows apart or not."""
    for index, numel in enumerate(cases.sizes(fmt.block)):
        num_ranks = 1 + index % 5
        payloads = stack(num_ranks, numel, fmt, spare=(0, 7, 64)[index % 3])
        expected = mean_of_decoded(payloads, fmt, numel)
        for dtype in FLOAT_DTYPES:
            cases.assert_same_bits(average(payloads, fmt, numel, dtype), expected.to(dtype))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("fmt", cases.formats((32, 64, 128)), ids=format_id)
def test_any_number_of_ranks(fmt: BlockFormat, num_ranks: int) -> None:
    """Output: bit-identical, also from unaligned rows into an unaligned output."""
    numel = 500
    payloads = stack(num_ranks, numel, fmt, spare=1)
    output = cases.unaligned(torch.zeros(numel))
    cases.run_everywhere(ops.decode_average, payloads, output, fmt)
    cases.assert_same_bits(output, mean_of_decoded(payloads, fmt, numel))


@pytest.mark.parametrize("fmt", cases.formats((64,)), ids=format_id)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_window_is_written_and_nothing_else_is_touched(
    fmt: BlockFormat, dtype: torch.dtype
) -> None:
    """Output: the payloads' blocks; elements before and after them stay."""
    payloads = stack(3, 3 * 64, fmt)
    mean = average(payloads, fmt, 3 * 64, dtype)
    for first, numel in ((2, 7 * 64 - 9), (4, 7 * 64 - 9), (0, 3 * 64 - 9)):
        output = torch.full((numel,), 42.0, dtype=dtype)
        expected = output.clone()
        begin, end = first * 64, min((first + 3) * 64, numel)
        expected[begin:end] = mean[: end - begin]
        cases.run_everywhere(ops.decode_average, payloads, output, fmt, first_block=first)
        cases.assert_same_bits(output, expected)


def test_equal_payloads_have_their_own_mean() -> None:
    """Output: bit-identical to the decoded payload for 2 and 4 ranks, whose 1 / R is exact."""
    payload = encode(torch.linspace(-3, 5, 1000), BLOCK4)
    for num_ranks in (1, 2, 4):
        mean = average(payload.expand(num_ranks, -1), BLOCK4, 1000)
        assert torch.equal(mean, decode(payload, BLOCK4, 1000))


def test_a_nan_of_one_rank_reaches_exactly_its_block() -> None:
    """As in plain DDP, at block granularity."""
    flats = torch.ones(3, 96)
    flats[1, 40] = torch.inf
    mean = average(torch.stack([encode(flat, BLOCK4) for flat in flats]), BLOCK4, 96)
    assert mean.isnan().nonzero().flatten().tolist() == list(range(32, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payloads": torch.zeros(36, dtype=torch.uint8)}, r"\(36,\).*must be uint8 \(ranks, byt"),
        ({"payloads": torch.zeros(2, 36)}, r"float32 \(2, 36\).*must be uint8 \(ranks, bytes\)"),
        ({"payloads": torch.zeros(0, 36, dtype=torch.uint8)}, r"\(0, 36\).*must be uint8"),
        ({"payloads": torch.zeros(36, 2, dtype=torch.uint8).T}, "strided rows.*contiguous"),
        ({"payloads": torch.zeros(2, 35, dtype=torch.uint8)}, "35 bytes.*multiple of 18"),
        ({"payloads": torch.zeros(2, 54, dtype=torch.uint8)}, r"\[0, 3\).*output of 2"),
        ({"first_block": 1}, r"\[1, 3\).*output of 2"),
        ({"first_block": -1}, r"\[-1, 1\).*output of 2"),
        ({"output": torch.zeros(64, dtype=torch.float64)}, r"float64.*must be one of.*bfloat16"),
        ({"output": torch.zeros(128)[::2]}, r"\(64,\).*must be 1-D and contiguous"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    """A ConfigError with the value and what is allowed; nothing is written."""
    output = torch.full((64,), 42.0)
    payloads = torch.zeros(2, 36, dtype=torch.uint8)
    arguments: dict[str, Any] = {"payloads": payloads, "output": output, "fmt": BLOCK4}
    with pytest.raises(ConfigError, match=message):
        ops.decode_average(**(arguments | change))
    assert output.eq(42).all()
