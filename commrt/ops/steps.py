"""Optimizer steps over lists of tensors; see :mod:`commrt.ops`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.format import FLOAT_DTYPES
from commrt.ops.lists import Second, StepOptions, StepTensor, flatten, option_values


def adam_mini_(
    tensors: Sequence[StepTensor], options: StepOptions, *, grad_factor: Tensor | None = None
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
    _check(tensors, num_moments=1, signed=(True,), grad_factor=grad_factor)
    for i, t in enumerate(tensors):
        _check_second(i, t, t.cols if t.second_from == Second.OF_COLUMN else t.rows)
        if t.block_rows < 1 or t.rows % t.block_rows:
            raise ConfigError(
                f"block_rows={t.block_rows} of tensor {i}: must divide its {t.rows} rows"
            )
    if tensors:
        torch.ops.commrt.adam_mini_(*flatten(tensors), option_values(options), grad_factor)


def adamw_(
    tensors: Sequence[StepTensor], options: StepOptions, *, grad_factor: Tensor | None = None
) -> None:
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
    _check(tensors, num_moments=2, signed=(True, False), grad_factor=grad_factor)
    if tensors:
        torch.ops.commrt.adamw_(*flatten(tensors), option_values(options), grad_factor)


def mofo_(
    tensors: Sequence[StepTensor], options: StepOptions, *, grad_factor: Tensor | None = None
) -> None:
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
    _check(tensors, num_moments=2, signed=(True, False), grad_factor=grad_factor)
    for i, t in enumerate(tensors):
        _check_second(i, t, 1)
    if tensors:
        torch.ops.commrt.mofo_(*flatten(tensors), option_values(options), grad_factor)


def lion_(
    tensors: Sequence[StepTensor], options: StepOptions, *, grad_factor: Tensor | None = None
) -> None:
    """Lion: the sign of the momentum.

    ::

        w <- decay w - step_size sign(beta1 m + (1 - beta1) g);   m <- beta2 m + (1 - beta2) g

    Args:
        tensors: With one moment each.
        options: Uses ``beta1, beta2, decay, step_size, grad_scale``.
        grad_factor: fp32 scalar on the tensors' device: g is multiplied by it as well.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, program 1.
    """
    _check(tensors, num_moments=1, signed=(True,), grad_factor=grad_factor)
    if tensors:
        torch.ops.commrt.lion_(*flatten(tensors), option_values(options), grad_factor)


def adan_(
    tensors: Sequence[StepTensor], options: StepOptions, *, grad_factor: Tensor | None = None
) -> None:
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
    signed = (True, True, False, True)
    _check(tensors, num_moments=4, signed=signed, grad_factor=grad_factor)
    if tensors:
        torch.ops.commrt.adan_(*flatten(tensors), option_values(options), grad_factor)


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


def _check(
    tensors: Sequence[StepTensor],
    *,
    num_moments: int,
    signed: Sequence[bool],
    grad_factor: Tensor | None,
) -> None:
    """A kernel given other tensors than it expects would write where nothing is."""
    for i, t in enumerate(tensors):
        _check_weights(i, t)
        if len(t.moments) != num_moments:
            raise ConfigError(f"tensor {i} has {len(t.moments)} moments: must be {num_moments}")
        _check_moments(i, t, signed)
        if not (0 <= t.seed < 1 << 63 and 0 <= t.first_index < 1 << 63):
            raise ConfigError(f"seed or first_index of tensor {i}: must be in [0, 2**63)")
        everything = (t.grad, *t.moments, *t.scales, t.extra, t.second, grad_factor)
        for other in everything:
            if other is not None and other.device != t.weights.device:
                raise ConfigError(
                    f"tensor {i} is on {other.device} and {t.weights.device}: must be on one"
                )
    if grad_factor is not None and (grad_factor.dtype, grad_factor.numel()) != (torch.float32, 1):
        raise ConfigError(f"grad_factor is {grad_factor.dtype}: must be a float32 scalar")


def _check_weights(i: int, t: StepTensor) -> None:
    numel = t.rows * t.cols
    if t.rows < 0 or t.cols < 1:
        raise ConfigError(f"tensor {i} is {t.rows} x {t.cols}: must have a column")
    for name, value in (("weights", t.weights), ("grad", t.grad)):
        if value.dtype not in FLOAT_DTYPES:
            raise ConfigError(f"{name} of tensor {i}: {value.dtype} must be one of {FLOAT_DTYPES}")
    tensors = {"weights": t.weights, "grad": t.grad}
    if t.extra is not None:
        tensors["extra"] = t.extra
    for k, moment in enumerate(t.moments):
        tensors[f"moment {k}"] = moment
    for name, value in tensors.items():
        if value.numel() != numel or not value.is_contiguous():
            raise ConfigError(f"{name} of tensor {i}: must be contiguous, {t.rows} x {t.cols}")
    kinds = {torch.float32: (None,), torch.bfloat16: (None, torch.float32, torch.int8)}
    allowed = kinds.get(t.weights.dtype, (torch.float32,))
    found = None if t.extra is None else t.extra.dtype
    if found not in allowed:
        raise ConfigError(
            f"extra of tensor {i} is {found}: must be one of {allowed} for {t.weights.dtype}"
        )


def _check_second(i: int, t: StepTensor, expected: int) -> None:
    if t.second is None or t.second.dtype != torch.float32 or t.second.numel() != expected:
        raise ConfigError(f"second of tensor {i}: must be fp32 of {expected} elements")


def _check_moments(i: int, t: StepTensor, signed: Sequence[bool]) -> None:
    first = t.moments[0].dtype
    if first not in (torch.float32, torch.bfloat16, torch.int8):
        raise ConfigError(f"moments of tensor {i} are {first}: must be float32, bfloat16 or int8")
    for moment, has_sign in zip(t.moments, signed, strict=True):
        expected = torch.float32 if first == torch.bfloat16 and not has_sign else first
        if moment.dtype != expected:
            raise ConfigError(f"a moment of tensor {i} is {moment.dtype}: must be {expected}")
    if first != torch.int8:
        return
    segments = t.rows * t.segments_per_row
    if len(t.scales) != len(t.moments) or any(
        scale.dtype != torch.float32 or scale.numel() != segments or not scale.is_contiguous()
        for scale in t.scales
    ):
        raise ConfigError(f"scales of tensor {i}: must be fp32 of {segments} elements a moment")
