"""The optimizers' steps, on lists of tensors of R rows and C columns.

g is the gradient times ``grad_scale`` and ``grad_factor``, where a coefficient takes the factors:
(1 - beta1) g is ((1 - beta1) factor) times the gradient as it is.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from commrt.ops.lists import SEGMENT, Second, StepOptions, StepTensor, unflatten
from commrt.ops.reference.blocks import philox
from commrt.ops.reference.moments import MomentMap, decode_moment, encode_moment, root

STREAM_MOMENT = 2
STREAM_WEIGHTS = 3
SUM_LANES = 32

Rule = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


def adam_mini_(*arguments: Any) -> None:
    """See :func:`commrt.ops.adam_mini_`."""
    tensors, o, grad = _unpack(*arguments)
    keep, share = o.beta1, (1 - o.beta1) * grad
    for t in tensors:
        assert t.second is not None
        if t.second_from == Second.UPDATED:
            _update_second(t, o.beta2, grad)
        factor = o.step_size / (root(t.second) / o.root_correction + o.eps)
        factor_RC = factor[None, :] if t.second_from == Second.OF_COLUMN else factor[:, None]

        def rule(g: Tensor, w: Tensor, m: list[Tensor], factor_RC: Tensor = factor_RC) -> Tensor:
            m[0] = keep * m[0] + share * g
            return o.decay * w - factor_RC * m[0]

        _step(t, rule, ("linear",))


def adamw_(*arguments: Any) -> None:
    """See :func:`commrt.ops.adamw_`."""
    tensors, o, grad = _unpack(*arguments)
    for t in tensors:
        _step(t, _adamw_rule(o, grad), ("square", "fourth"))


def mofo_(*arguments: Any) -> None:
    """See :func:`commrt.ops.mofo_`."""
    tensors, o, grad = _unpack(*arguments)
    adamw = _adamw_rule(o, grad)
    for t in tensors:
        assert t.second is not None

        def rule(g: Tensor, w: Tensor, m: list[Tensor], threshold: Tensor = t.second) -> Tensor:
            stepped = adamw(g, w, m)
            return torch.where(m[0].abs() < threshold, w, stepped)

        _step(t, rule, ("square", "fourth"))


def _adamw_rule(o: "_Coefficients", grad: Tensor) -> Rule:
    share, share_square = (1 - o.beta1) * grad, (1 - o.beta2) * (grad * grad)

    def rule(g: Tensor, w: Tensor, m: list[Tensor]) -> Tensor:
        m[0] = o.beta1 * m[0] + share * g
        m[1] = o.beta2 * m[1] + share_square * (g * g)
        divisor = root(m[1]) / o.root_correction + o.eps
        return o.decay * w - o.step_size * m[0] / divisor

    return rule


def lion_(*arguments: Any) -> None:
    """See :func:`commrt.ops.lion_`."""
    tensors, o, grad = _unpack(*arguments)
    share, share_after = (1 - o.beta1) * grad, (1 - o.beta2) * grad

    def rule(g: Tensor, w: Tensor, m: list[Tensor]) -> Tensor:
        mixed = o.beta1 * m[0] + share * g
        m[0] = o.beta2 * m[0] + share_after * g
        up, down = (torch.where(sign * mixed > 0, o.step_size, 0.0) for sign in (1, -1))
        return o.decay * w - (up - down)

    for t in tensors:
        _step(t, rule, ("square",))


def adan_(*arguments: Any) -> None:
    """See :func:`commrt.ops.adan_`."""
    tensors, o, grad = _unpack(*arguments)

    def rule(g: Tensor, w: Tensor, m: list[Tensor]) -> Tensor:
        g = grad * g
        difference = o.has_before * (g - m[3])
        m[0] = o.beta1 * m[0] + (1 - o.beta1) * g
        m[1] = o.beta2 * m[1] + (1 - o.beta2) * difference
        ahead = g + o.beta2 * difference
        m[2] = o.beta3 * m[2] + (1 - o.beta3) * (ahead * ahead)
        m[3] = g
        divisor = root(m[2]) / o.root_correction + o.eps
        return o.decay * (w - (o.step_size * m[0] + o.difference_size * m[1]) / divisor)

    for t in tensors:
        _step(t, rule, ("square", "square", "fourth", "square"))


def square_sums(grads: Sequence[Tensor], sums: Sequence[Tensor], places: Sequence[int]) -> None:
    """See :func:`commrt.ops.square_sums`."""
    for i, (grad, output) in enumerate(zip(grads, sums, strict=True)):
        rows, cols, by_column = places[3 * i : 3 * i + 3]
        grad_RC = grad.view(rows, cols)
        if by_column:
            total_C = torch.zeros(cols, dtype=torch.float64, device=grad.device)
            for row_C in grad_RC.double():
                total_C = total_C + row_C * row_C
            output.copy_(total_C)
        else:
            output.copy_(_row_squares(grad_RC[:, None]))


# -- coefficients ---------------------------------------------------------------------------------


class _Coefficients:
    """The options as fp32 scalars."""

    beta1: Tensor
    beta2: Tensor
    beta3: Tensor
    eps: Tensor
    decay: Tensor
    step_size: Tensor
    difference_size: Tensor
    has_before: Tensor
    root_correction: Tensor
    grad_scale: Tensor

    def __init__(self, options: Sequence[float]) -> None:
        for field, value in zip(dataclasses.fields(StepOptions), options, strict=True):
            setattr(self, field.name, torch.tensor(value, dtype=torch.float32))


def _unpack(*arguments: Any) -> tuple[Iterator[StepTensor], _Coefficients, Tensor]:
    """The tensors, the options, and what the gradient is multiplied by."""
    *lists, options, grad_factor = arguments
    o = _Coefficients(options)
    grad = o.grad_scale if grad_factor is None else o.grad_scale * grad_factor
    return unflatten(*lists), o, grad


# -- second moments -------------------------------------------------------------------------------


def _update_second(t: StepTensor, beta2: Tensor, grad: Tensor) -> None:
    assert t.second is not None
    blocks_BRC = t.grad.view(t.rows // t.block_rows, t.block_rows, t.cols)
    sums_B = _row_squares(blocks_BRC)
    mean_B = (grad.double() * grad.double() * sums_B / (t.block_rows * t.cols)).float()
    mean_R = mean_B.repeat_interleave(t.block_rows)
    t.second.copy_(beta2 * t.second + (1 - beta2) * mean_R)


def _row_squares(rows_BRC: Tensor) -> Tensor:
    """Sum of squares of each of B blocks of R rows, fp64, in the order of the kernels."""
    num_blocks, _, cols = rows_BRC.shape
    padded = torch.nn.functional.pad(rows_BRC.float(), (0, -cols % SEGMENT))
    lanes_BSRL = padded.flatten(1).unflatten(1, (-1, 16, 16))
    square_BSRL = lanes_BSRL * lanes_BSRL
    for width in (8, 4, 2, 1):
        square_BSRL = square_BSRL[:, :, :width] + square_BSRL[:, :, width : 2 * width]
    sum_BSL = square_BSRL[:, :, 0]
    for width in (8, 4, 2, 1):
        sum_BSL = sum_BSL[..., :width] + sum_BSL[..., width : 2 * width]
    sum_BS = sum_BSL[..., 0].double()
    sum_BS = torch.nn.functional.pad(sum_BS, (0, -sum_BS.shape[1] % SUM_LANES))
    total_BL = torch.zeros(num_blocks, SUM_LANES, dtype=torch.float64, device=sum_BS.device)
    for some_BL in sum_BS.split(SUM_LANES, dim=1):
        total_BL = total_BL + some_BL
    for width in (16, 8, 4, 2, 1):
        total_BL = total_BL[:, :width] + total_BL[:, width : 2 * width]
    return total_BL[:, 0]


# -- one tensor -----------------------------------------------------------------------------------


def _step(t: StepTensor, rule: Rule, maps: Sequence[MomentMap]) -> None:
    shape = t.rows, t.cols
    weights = _load_weights(t).view(shape)
    moments = [_load_moment(t, k, name).view(shape) for k, name in enumerate(maps)]
    updated = rule(t.grad.float().view(shape), weights, moments)
    for k, name in enumerate(maps):
        _store_moment(t, k, name, moments[k])
    _store_weights(t, updated)


def _load_weights(t: StepTensor) -> Tensor:
    if t.extra is None:
        return t.weights.float()
    if t.extra.dtype == torch.float32:
        return t.extra.clone()
    high = t.weights.view(torch.int16).int() & 0xFFFF
    return (((high << 8) + t.extra.int()) << 8).view(torch.float32)


def _store_weights(t: StepTensor, value_RC: Tensor) -> None:
    value = value_RC.reshape(t.weights.shape)
    if t.weights.dtype == torch.float32:
        t.weights.copy_(value)
    elif t.extra is None:
        uniform = _uniform(t, STREAM_WEIGHTS).reshape(value.shape)
        bits = value.contiguous().view(torch.int32).long()
        rounded = (bits + (uniform * 65536).long()) >> 16
        rounded = torch.where(rounded > 0x7FFF, rounded - 0x10000, rounded)
        kept = rounded.to(torch.int16).view(torch.bfloat16)
        t.weights.copy_(torch.where(value.isfinite(), kept, value.bfloat16()))
    elif t.extra.dtype == torch.float32:
        t.extra.copy_(value.view_as(t.extra))
        t.weights.copy_(value)
    else:
        bits = value.contiguous().view(torch.int32).long() & 0xFFFFFFFF
        rounded = (bits >> 8) + ((bits >> 7) & 1)
        high = (rounded + 0x80) >> 8
        low = torch.where(value.isfinite(), rounded - (high << 8), 0)
        signed = torch.where(high > 0x7FFF, high - 0x10000, high)
        kept = signed.to(torch.int16).view(torch.bfloat16)
        t.weights.copy_(torch.where(value.isfinite(), kept, value.bfloat16()))
        t.extra.copy_(low.view_as(t.extra))


def _load_moment(t: StepTensor, k: int, name: MomentMap) -> Tensor:
    moment = t.moments[k]
    if moment.is_floating_point():
        return moment.float()
    return decode_moment(moment, t.scales[k], t.rows, t.cols, name)


def _store_moment(t: StepTensor, k: int, name: MomentMap, value_RC: Tensor) -> None:
    moment = t.moments[k]
    if moment.is_floating_point():
        moment.copy_(value_RC.reshape(moment.shape))
        return
    uniform_RC = _uniform(t, STREAM_MOMENT) if t.stochastic and k == 0 else None
    codes, scales = encode_moment(value_RC, t.rows, t.cols, name, uniform_RC)
    moment.copy_(codes.view_as(moment))
    t.scales[k].copy_(scales.view_as(t.scales[k]))


def _uniform(t: StepTensor, stream: int) -> Tensor:
    """Uniform on [0, 1), (R, C)."""
    row = torch.arange(t.rows, dtype=torch.int64)[:, None]
    index = t.first_index + row * t.index_stride + torch.arange(t.cols, dtype=torch.int64)
    words = philox(t.seed, stream, index // 4)
    word = words.gather(-1, (index % 4)[..., None])[..., 0]
    return ((word >> 8).float() * 2.0**-24).to(t.weights.device)
