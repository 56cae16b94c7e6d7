"""The operators of the optimizer steps, by the native module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from commrt.ops.lists import StepTensor, unflatten
from commrt.ops.native.module import DTYPE_CODE, native, where

STEPS = ("adam_mini_", "adamw_", "adan_", "lion_", "mofo_")
SCHEMAS = (
    *(
        f"{step}(Tensor(a!)[] weights, Tensor(b!)[] extras, Tensor[] grads, Tensor(c!)[] moments, "
        "Tensor(d!)[] scales, Tensor(e!)[] seconds, int[] places, float[] options, "
        "Tensor? grad_factor) -> ()"
        for step in STEPS
    ),
    "square_sums(Tensor[] grads, Tensor(a!)[] sums, int[] places) -> ()",
)


def square_sums(grads: list[Tensor], sums: list[Tensor], places: list[int]) -> None:
    """See :func:`commrt.ops.square_sums`."""
    tensors = [
        native.SquaresTensor(
            grad.data_ptr(), DTYPE_CODE[grad.dtype], *places[3 * i : 3 * i + 2],
            output.data_ptr(), bool(places[3 * i + 2]),
        )
        for i, (grad, output) in enumerate(zip(grads, sums, strict=True))
    ]  # fmt: skip
    native.square_sums(tensors, where(grads[0]))


def _step(name: str) -> Callable[..., None]:
    def run(weights: list[Tensor], *lists: Any) -> None:
        *rest, options, grad_factor = lists
        address = 0 if grad_factor is None else grad_factor.data_ptr()
        tensors = [native.StepTensor(*_fields(t)) for t in unflatten(weights, *rest)]
        kernel = getattr(native, name.rstrip("_"))
        kernel(tensors, native.StepOptions(options, address), where(weights[0]))

    run.__name__ = name
    return run


def _fields(t: StepTensor) -> tuple[Any, ...]:
    """As csrc/bindings.cpp takes them."""
    first = t.moments[0].dtype
    weight_format = (
        0 if t.weights.dtype == torch.float32
        else 3 if t.extra is None
        else 1 if t.extra.dtype == torch.float32 else 2
    )  # fmt: skip
    return (
        t.grad.data_ptr(),
        DTYPE_CODE[t.grad.dtype],
        t.weights.data_ptr(),
        DTYPE_CODE[t.weights.dtype],
        0 if t.extra is None else t.extra.data_ptr(),
        weight_format,
        t.rows,
        t.cols,
        [
            (moment.data_ptr(), scale.data_ptr())
            for moment, scale in zip(t.moments, t.scales, strict=True)
        ],
        {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}[first],
        t.stochastic,
        t.seed,
        t.first_index,
        t.index_stride,
        0 if t.second is None else t.second.data_ptr(),
        int(t.second_from),
        t.block_rows,
    )


KERNELS: tuple[Callable[..., None], ...] = (*map(_step, STEPS), square_sums)
