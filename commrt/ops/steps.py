"""Optimizer steps over lists of tensors; see :mod:`commrt.ops`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.batch import StepBatch
from commrt.ops.format import FLOAT_DTYPES
from commrt.ops.lists import StepOptions, StepTensor

Tensors = Sequence[StepTensor] | StepBatch


def adam_mini_(
    tensors: Tensors, options: StepOptions, *, grad_factor: Tensor | None = None
) -> None:
    """Adam-mini: one second moment for each block of rows, or for each row or column.

    With S the sum of the squares of the gradient g over a block of n elements::

        v <- beta2 v + (1 - beta2) S / n            (``Second.UPDATED`` only)
        m <- beta1 m + (1 - beta1) g
        w <- decay w - step_size m / (sqrt(v) / root_correction + eps)

    Deterministic, but for what is rounded stochastically.

    Args:
        tensors: With one moment each, and ``second``.
        options: Uses ``beta1, beta2, eps, decay, step_size, root_correction, grad_scale``.
        grad_factor: fp32 scalar on the tensors' device: g is multiplied by it as well.

    Cost: per element, with fp32: 12 bytes read and 8 written on a CPU, where the second reading of
    the gradient comes from the caches; 16 and 8 on a GPU.

    Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", ICLR 2025 (arXiv
    2406.16793), algorithm 1.
    """
    _run("adam_mini_", tensors, options, grad_factor)


def adamw_(tensors: Tensors, options: StepOptions, *, grad_factor: Tensor | None = None) -> None:
    """AdamW, a second moment for each element.

    ::

        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        w <- decay w - step_size m / (sqrt(v) / root_correction + eps)

    Args:
        tensors: With two moments each.
        options: Uses ``beta1, beta2, eps, decay, step_size, root_correction, grad_scale``.
        grad_factor: fp32 scalar on the tensors' device: g is multiplied by it as well.

    Cost: per element, with fp32, 16 bytes read and 12 written; with 8 bits, 10 and 6.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2;
    8 bits after Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, with
    powers of the code in place of their table.
    """
    _run("adamw_", tensors, options, grad_factor)


def mofo_(tensors: Tensors, options: StepOptions, *, grad_factor: Tensor | None = None) -> None:
    """MoFO: AdamW where the momentum is large; other weights stay as they are.

    ::

        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        w <- decay w - step_size m / (sqrt(v) / root_correction + eps)     unless |m| < threshold

    m is compared in fp32, before it is stored. Where it is NaN, w becomes NaN. A finite weight that
    stays keeps its bits, also those in ``extra``; it is rounded from a master copy as ever.

    Args:
        tensors: With two moments each, and the threshold as ``second``.
        options: Uses ``beta1, beta2, eps, decay, step_size, root_correction, grad_scale``.
        grad_factor: fp32 scalar on the tensors' device: g is multiplied by it as well.

    Cost: that of :func:`adamw_`.

    Source: Chen et al., "MoFO: Momentum-Filtered Optimizer for Mitigating Forgetting in LLM
    Fine-Tuning", 2024 (arXiv 2407.20999), algorithm 1, with AdamW's decay.
    """
    _run("mofo_", tensors, options, grad_factor)


def lion_(tensors: Tensors, options: StepOptions, *, grad_factor: Tensor | None = None) -> None:
    """Lion: the sign of the momentum.

    ::

        w <- decay w - step_size sign(beta1 m + (1 - beta1) g);   m <- beta2 m + (1 - beta2) g

    Args:
        tensors: With one moment each.
        options: Uses ``beta1, beta2, decay, step_size, grad_scale``.
        grad_factor: fp32 scalar on the tensors' device: g is multiplied by it as well.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, program 1.
    """
    _run("lion_", tensors, options, grad_factor)


def adan_(tensors: Tensors, options: StepOptions, *, grad_factor: Tensor | None = None) -> None:
    """Adan: Nesterov momentum from differences of gradients.

    With d = g - the gradient before, times ``has_before``::

        m <- beta1 m + (1 - beta1) g;   n <- beta2 n + (1 - beta2) d
        v <- beta3 v + (1 - beta3) (g + beta2 d)^2
        w <- decay (w - (step_size m + difference_size n) / (sqrt(v) / root_correction + eps))

    Args:
        tensors: With four moments each: m, n, v and the gradient before.
        options: Uses all.
        grad_factor: fp32 scalar on the tensors' device: g is multiplied by it as well.

    Source: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models", TPAMI 2024, algorithm 1, with 1 - beta for its beta.
    """
    _run("adan_", tensors, options, grad_factor)


def square_sums(
    grads: Sequence[Tensor],
    sums: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    *,
    by_column: Sequence[bool] | None = None,
) -> None:
    """Sum the squares of each row, or of each column, of some matrices.

    Args:
        grads: Contiguous; fp32, bf16 or fp16.
        sums: fp64, an element for each row (or column), overwritten.
        shapes: Rows and columns of each.
        by_column: Whether columns are summed, for each; default, rows everywhere.
    """
    by_column = by_column or [False] * len(grads)
    for i, (grad, output, (rows, cols), is_column) in enumerate(
        zip(grads, sums, shapes, by_column, strict=True)
    ):
        if grad.dtype not in FLOAT_DTYPES or not grad.is_contiguous():
            raise ConfigError(f"gradient {i} is {grad.dtype}: must be contiguous {FLOAT_DTYPES}")
        if grad.numel() != rows * cols:
            raise ConfigError(f"gradient {i} has {grad.numel()} elements: must be {rows} x {cols}")
        expected = cols if is_column else rows
        if output.dtype != torch.float64 or output.numel() != expected:
            raise ConfigError(f"sums {i}: must be fp64 of {expected} elements")
    places = [
        int(value)
        for shape, is_column in zip(shapes, by_column, strict=True)
        for value in (*shape, is_column)
    ]
    if not grads:
        return
    torch.ops.commrt.square_sums(list(grads), list(sums), places)


def _run(name: str, tensors: Tensors, options: StepOptions, grad_factor: Tensor | None) -> None:
    batch = tensors if isinstance(tensors, StepBatch) else StepBatch(name, tensors)
    batch.run(name, options, grad_factor)
