"""decode_average_encode: payloads are bit-identical on every path; nothing may differ."""

import itertools
from typing import Any

import pytest
import torch

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import BlockFormat
from tests.native import cases
from tests.native.cases import empty_payload, encode, format_id
from tests.native.test_decode_average import average, stack

BLOCK4 = BlockFormat(bits=4, block=32)


@pytest.mark.parametrize("fmt", cases.formats(), ids=format_id)
def test_every_path_equals_decode_average_then_block_encode(fmt: BlockFormat) -> None:
    """Payload: bit-identical to the two ops, for every output format and 1 to 5 ranks."""
    spares, ranks = itertools.cycle((0, 1, 64)), itertools.cycle(range(1, 6))
    for num_blocks, output_fmt in itertools.product((0, 1, 5, 37), cases.formats((fmt.block,))):
        numel = num_blocks * fmt.block
        if numel > 10_000:
            continue
        payloads = stack(next(ranks), numel, fmt, next(spares))
        expected = encode(average(payloads, fmt, numel), output_fmt)
        output = empty_payload(output_fmt, num_blocks)
        cases.run_everywhere(ops.decode_average_encode, payloads, output, fmt, output_fmt)
        assert torch.equal(output, expected)


def test_unaligned_pointers() -> None:
    """Payload: bit-identical where neither rows nor output are aligned."""
    payloads = stack(3, 320, BLOCK4, spare=1)
    for output_fmt in cases.formats((32,)):
        expected = encode(average(payloads, BLOCK4, 320), output_fmt)
        output = cases.unaligned(torch.zeros_like(expected))
        cases.run_everywhere(ops.decode_average_encode, payloads, output, BLOCK4, output_fmt)
        assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payloads": torch.zeros(36, dtype=torch.uint8)}, r"\(36,\).*must be uint8 \(ranks, byt"),
        ({"payloads": torch.zeros(2, 35, dtype=torch.uint8)}, "35 bytes.*multiple of 18"),
        ({"payloads": torch.zeros(2, 54, dtype=torch.uint8)}, "68 bytes: must be 102"),
        ({"output": torch.zeros(34, dtype=torch.uint8)}, "34 bytes: must be 68"),
        ({"output": torch.zeros(67, dtype=torch.uint8)}, "67 bytes.*multiple of 34"),
        ({"output": torch.zeros(68)}, r"float32 \(68,\).*must be 1-D uint8"),
        ({"output_fmt": BlockFormat(bits=8, block=64)}, "68 bytes.*multiple of 66"),
        (
            {
                "output_fmt": BlockFormat(bits=8, block=64),
                "output": torch.zeros(66, dtype=torch.uint8),
            },
            "block=64 of the output: must be 32",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    """A ConfigError with the value and what is allowed."""
    arguments: dict[str, Any] = {
        "payloads": torch.zeros(2, 36, dtype=torch.uint8),
        "output": torch.zeros(68, dtype=torch.uint8),
        "fmt": BLOCK4,
        "output_fmt": BlockFormat(bits=8, block=32),
    }
    with pytest.raises(ConfigError, match=message):
        ops.decode_average_encode(**(arguments | change))
