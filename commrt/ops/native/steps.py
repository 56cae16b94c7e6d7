"""The operators of the optimizer steps, by the native module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from commrt.ops.lists import NUM_PLACES
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


_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


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
        kernel = getattr(native, name.rstrip("_"))
        tensors = _tensors(weights, *rest)
        kernel(tensors, native.StepOptions(options, address), where(weights[0]))

    run.__name__ = name
    return run


def _tensors(
    weights: list[Tensor],
    extras: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    scales: list[Tensor],
    seconds: list[Tensor],
    places: list[int],
) -> list[Any]:
    """As csrc/bindings.cpp takes them; see ``lists.flatten``."""
    each = len(moments) // len(weights)
    pairs = [
        (moment.data_ptr(), scale.data_ptr()) for moment, scale in zip(moments, scales, strict=True)
    ]
    tensors = []
    for i, (weight, extra, grad, second) in enumerate(
        zip(weights, extras, grads, seconds, strict=True)
    ):
        rows, cols, stochastic, seed, index, stride, second_from, block_rows = places[
            i * NUM_PLACES : (i + 1) * NUM_PLACES
        ]
        tensors.append(
            native.StepTensor(
                grad.data_ptr(),
                DTYPE_CODE[grad.dtype],
                weight.data_ptr(),
                DTYPE_CODE[weight.dtype],
                extra.data_ptr(),
                _weight_format(weight, extra),
                rows,
                cols,
                pairs[i * each : (i + 1) * each],
                _STORAGE[moments[i * each].dtype],
                bool(stochastic),
                seed,
                index,
                stride,
                second.data_ptr(),
                second_from,
                block_rows,
            )
        )
    return tensors


def _weight_format(weight: Tensor, extra: Tensor) -> int:
    if weight.dtype == torch.float32:
        return 0
    if not extra.numel():
        return 3
    return 1 if extra.dtype == torch.float32 else 2


KERNELS: tuple[Callable[..., None], ...] = (*map(_step, STEPS), square_sums)
