"""The ops are good citizens of torch.library: schema, fake tensors, torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.ops import BlockFormat
from tests.native import cases, test_rans

FMT = BlockFormat(bits=4, block=32)
RESIDUAL_FMT = BlockFormat(bits=8, block=32)


def arguments(name: str) -> tuple[Any, ...]:
    """Of the operator itself, for 100 elements and two ranks."""
    flat = torch.linspace(-3, 5, 100)
    payloads = torch.stack([cases.encode(flat, FMT), cases.encode(-flat, FMT)])
    empty, residual = cases.empty_payload(FMT, 4), cases.empty_residual(8, 32, 100)
    patch = torch.zeros(ops.patch_capacity(100, torch.float32), dtype=torch.uint8)
    ops.patch_encode(flat, -flat, patch)
    codes = torch.arange(100, dtype=torch.int16)
    small = torch.ones(100, dtype=torch.int16)
    firsts, ends = codes[:18].clone().view(2, 9), torch.tensor([30, 100])
    products = torch.zeros(2, 6, dtype=torch.float64)
    coded, table, check = test_rans.sample(100, seed=0), test_rans.table(), test_rans.checks_of(1)
    words, length = torch.zeros(1, 108, dtype=torch.uint16), torch.tensor([108], dtype=torch.int32)
    return {
        "block_encode": (flat, empty, 4, 32, False, 7, 0, 4, 0),
        "block_decode": (payloads[0].clone(), torch.zeros(100), 4, 32, 0, 4, 0),
        "loco_encode": (flat, residual, empty, 4, 32, False, 0.8, 8, False, 0, 0, 4, 0),
        "decode_average": (payloads, torch.zeros(100), 4, 32, 0, 4),
        "decode_average_encode": (payloads, empty, 4, 32, 4, False, 4),
        "rescale_": (payloads[0].clone(), torch.tensor(0.5), 4, 32),
        "patch_encode": (flat, -flat, patch),
        "patch_apply_": (-flat, patch),
        "dither_quantise": (flat, -flat, codes, 0.5, 7, 3, "z"),
        "dither_dequantise": (codes, None, flat, 0.5, 7, 3, "z"),
        "scale_rows": (codes, small, flat.abs(), firsts, ends, 240, 7, 3, "z"),
        "lmmse_combine": (flat.repeat(3, 1), torch.ones(3), flat.clone()),
        "polar_transform_": (torch.ones(2, 256, dtype=torch.uint8),),
        "polar_decode": polar_arguments(),
        "coset_llr": (flat, small, 1, torch.linspace(2, -2, 64), torch.zeros(100)),
        "coset_decode": (flat, small, 4, torch.zeros_like(small)),
        "source_energies": (torch.zeros(100), flat, -flat, 0.3, [9, 10, 1, 10]),
        "source_prediction": (torch.zeros(100), flat, None, [1.0, 0.5, 0.0, 2.0], ends),
        "source_products": (products, flat, flat.bfloat16(), -flat, ends),
        "source_history": (flat.bfloat16(), flat, -flat, small, torch.ones(4)),
        **update_arguments(flat, ends),
        "rans_encode": (*coded, table, 4, check, words, length, codes, length.clone()),
        "rans_decode": (words, length, coded[1], table, 4, coded[0], check, length.clone()),
        "rans_count_": (torch.zeros(2, 40, 64, dtype=torch.int64), *coded, [30, 100]),
    }[name]


def update_arguments(flat: Tensor, ends: Tensor) -> dict[str, tuple[Any, ...]]:
    """Of two updates of 100 elements in two groups."""
    updates, own = torch.stack([flat, -flat]), [flat.bfloat16(), None]
    shorts, products = torch.ones(2, 100, dtype=torch.int16), torch.zeros(2, 12).double()
    kept, tables = [flat.bfloat16(), flat.bfloat16()], 2 * [torch.zeros(2, 9).short()]
    of_each = [0.5, 0.25], [7, 8]
    return {
        "update_products": (products, updates, flat, own, ends),
        "update_rows": (
            updates, shorts, shorts.clone(), flat, own, [0.5] * 8, [9, 10, 1, 10], 0.3, ends,
            tables, [240, 230], [7, 8],
        ),
        "update_codes": (
            shorts, kept, updates, -updates, shorts.clone(), torch.ones(4), *of_each, "z",
        ),
        "update_values": (
            updates, -updates, products, kept, shorts, 2 * updates, shorts.clone(), torch.ones(4),
            ends, *of_each, "z",
        ),
        "update_add_": (flat.double(), updates, [1.0, 3.0]),
    }  # fmt: skip


def polar_arguments() -> tuple[Any, ...]:
    """Two blocks whose u are known but for every other."""
    llr, values = torch.linspace(-3, 5, 512).view(2, 256), torch.ones(2, 256, dtype=torch.uint8)
    known = torch.arange(256, dtype=torch.uint8) % 2
    return llr, known, values, torch.zeros_like(values), torch.zeros(ops.polar_scratch(2, 8, 2)), 2


@pytest.mark.parametrize("name", cases.OPS)
def test_opcheck(name: str) -> None:
    """What is written is what the schema says, also on fake tensors and under AOT autograd."""
    torch.library.opcheck(getattr(torch.ops.commrt, name).default, arguments(name))


def step(
    grad: Tensor, residual: Tensor, payloads: Tensor, mean: Tensor, recoded: Tensor, patch: Tensor
) -> Tensor:
    """Every op once, through its public wrapper."""
    ops.block_encode(grad, payloads[0], FMT, seed=5)
    ops.loco_encode(grad, residual, payloads[1], FMT)
    ops.decode_average(payloads, mean, FMT)
    ops.decode_average_encode(payloads, recoded, FMT, RESIDUAL_FMT)
    ops.rescale_(recoded, torch.tensor(0.5), RESIDUAL_FMT)
    ops.block_decode(recoded, grad, RESIDUAL_FMT)
    ops.patch_encode(mean, grad, patch)
    ops.patch_apply_(grad, patch)
    return grad + mean


def test_torch_compile() -> None:
    """Everything: bit-identical to eager, in one graph."""

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        tensors = [
            torch.linspace(-3, 5, 100),
            cases.empty_residual(8, 32, 100),
            torch.zeros(2, FMT.payload_bytes(4), dtype=torch.uint8),
            torch.zeros(100),
            cases.empty_payload(RESIDUAL_FMT, 4),
            torch.zeros(ops.patch_capacity(100, torch.float32), dtype=torch.uint8),
        ]
        return [function(*tensors), *tensors]

    compiled = run(torch.compile(step, backend="eager", fullgraph=True))
    for actual, expected in zip(compiled, run(step), strict=True):
        assert torch.equal(actual, expected)


def test_torch_compile_of_integers() -> None:
    """rANS: bit-identical to eager, in one graph."""

    def coded(codes: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        words, lengths = torch.zeros(1, 108, dtype=torch.uint16), torch.zeros(1, dtype=torch.int32)
        found, checks, used = torch.zeros_like(codes), test_rans.checks_of(1), lengths.clone()
        ops.rans_encode(codes, rows, table, checks, words, lengths, lanes=4)
        ops.rans_decode(words, lengths, rows, table, found, checks, used, lanes=4)
        return found, used

    table, sample = test_rans.table(), test_rans.sample(100, seed=0)
    found, used = torch.compile(coded, backend="eager", fullgraph=True)(*sample)
    assert torch.equal(found, sample[0])
    assert torch.equal(used, coded(*sample)[1])


def test_fake_tensors_pass_without_a_kernel() -> None:
    with torch.device("meta"):
        payload = torch.empty(72, dtype=torch.uint8)
        ops.block_encode(torch.empty(100), payload, FMT)
    assert payload.is_meta
