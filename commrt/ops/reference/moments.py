"""Moments in 8 bits: a code for each element, and an fp32 scale for each segment of a row.

A code c stands for scale * c ("linear"), scale * c * |c| ("square": finer towards zero) or
scale * (c + 128)^4 ("fourth": no sign, and never rounded to zero). After Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", ICLR 2022, with powers of the code in place of their table.
"""

from typing import Literal

import torch
from torch import Tensor

from commrt.ops.lists import SEGMENT

MomentMap = Literal["linear", "square", "fourth"]

_LEAST_MAGNITUDE = 2.0**-96
_UNSIGNED_BIAS = 128
_TOP = {"linear": 127.0, "square": 127.0**2, "fourth": 255.0**4}


def decode_moment(codes: Tensor, scales: Tensor, rows: int, cols: int, name: MomentMap) -> Tensor:
    """Decode R rows of C elements.

    Args:
        codes: int8, R * C elements.
        scales: fp32, one for each 256 elements of a row, or fewer at its end.
        rows: R.
        cols: C.
        name: What a code stands for.

    Returns:
        fp32 (R * C,).
    """
    code_RSK = _segments(codes, rows, cols).float()
    scale_RS1 = scales.view(rows, -(-cols // SEGMENT), 1)
    if name == "linear":
        value_RSK = code_RSK * scale_RS1
    elif name == "square":
        value_RSK = code_RSK * code_RSK.abs() * scale_RS1
    else:
        square_RSK = (code_RSK + _UNSIGNED_BIAS) * (code_RSK + _UNSIGNED_BIAS)
        value_RSK = square_RSK * square_RSK * scale_RS1
    return value_RSK.flatten(1)[:, :cols].reshape(-1)


def encode_moment(
    value: Tensor, rows: int, cols: int, name: MomentMap, uniform_RC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encode R rows of C elements, rounding to nearest, or by uniform numbers in [0, 1).

    Returns:
        Codes, int8 (R * C,), and scales, fp32, one for each segment; NaN where it is not finite.
    """
    x_RSK = _segments(value, rows, cols)
    absmax_RS1 = x_RSK.abs().amax(dim=2, keepdim=True)
    top = torch.tensor(_TOP[name])
    is_coded_RS1 = absmax_RS1.isfinite() & (absmax_RS1 >= _LEAST_MAGNITUDE)
    scale_RS1 = torch.where(is_coded_RS1, absmax_RS1 / top, 0.0)
    scale_RS1 = torch.where(absmax_RS1.isfinite(), scale_RS1, torch.nan)
    inverse_RS1 = top / torch.where(is_coded_RS1, absmax_RS1, 1.0)
    uniform_RSK = None if uniform_RC is None else _segments(uniform_RC, rows, cols)
    code_RSK = _codes(x_RSK, inverse_RS1, name, uniform_RSK)
    nothing = -_UNSIGNED_BIAS if name == "fourth" else 0
    code_RSK = torch.where(is_coded_RS1, code_RSK, nothing)
    codes = code_RSK.flatten(1)[:, :cols].reshape(-1).to(torch.int8)
    return codes, scale_RS1.reshape(-1)


def root(x: Tensor) -> Tensor:
    """Correctly rounded, as torch's own of fp32 is not on a CPU."""
    return x.double().sqrt().float()


def _segments(value: Tensor, rows: int, cols: int) -> Tensor:
    """(R, segments, 256), padded with zeros."""
    padded = torch.nn.functional.pad(value.reshape(rows, cols), (0, -cols % SEGMENT))
    return padded.view(rows, -(-cols // SEGMENT), SEGMENT)


def _codes(x: Tensor, inverse: Tensor, name: MomentMap, uniform: Tensor | None) -> Tensor:
    if name == "linear":
        level = x * inverse
        if uniform is None:
            return level.round()
        return (level.floor() + (level - level.floor() > uniform)).clamp(-127, 127)
    if name == "square":
        level = x.abs() * inverse
        code = root(level)
        if uniform is None:
            return code.round().copysign(x)
        below = code.floor()
        is_up = level - below * below > uniform * (below + below + 1)
        return (below + is_up).clamp(max=127).copysign(x)
    level = root(root(x * inverse))
    return (torch.where((x > 0) & ~(level > 1), 1.0, level) - _UNSIGNED_BIAS).round()
