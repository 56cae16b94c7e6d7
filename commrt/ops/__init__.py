"""Tensors in, tensors out, with the same bits on every device.

Gradients to payloads and back, in this file; the steps of optimizers, which work on lists of
:class:`StepTensor`, in :mod:`commrt.ops.steps`; what changed of weights, in
:mod:`commrt.ops.patches`; subtractive dither, in :mod:`commrt.ops.dither`; integers by their
probabilities, in :mod:`commrt.ops.rans`; polar codes and cosets, in :mod:`commrt.ops.polar`; what
both ends of an update know before it is sent, in :mod:`commrt.ops.sources`; all of that for several
updates at once, in :mod:`commrt.ops.updates`.

Ops write into tensors the caller allocated, never allocate or synchronise, and work on windows of
whole blocks: blocks ``[first_block, first_block + num_blocks)`` of a flat tensor lie at blocks
``[at_block, at_block + num_blocks)`` of a payload. The payload layout is in
:mod:`commrt.ops.format`, the specification of each op in :mod:`commrt.ops.reference`.

Flat tensors are 1-D, contiguous, fp32, bf16 or fp16; payloads 1-D contiguous uint8. Arithmetic is
fp32. Anything else raises ``ConfigError`` (a ``ValueError``). Arrays of numpy, cupy and other
libraries that speak DLPack serve as well; their memory is shared, not copied.
"""

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.arrays import takes_arrays
from commrt.ops.batch import StepBatch
from commrt.ops.dither import dither_dequantise, dither_quantise, lmmse_combine, scale_rows
from commrt.ops.format import FLOAT_DTYPES, MAX_BETA, BlockFormat
from commrt.ops.lists import SEGMENT, Second, StepOptions, StepTensor
from commrt.ops.native import status
from commrt.ops.patches import patch_apply_, patch_bytes, patch_capacity, patch_encode
from commrt.ops.polar import (
    coset_decode,
    coset_llr,
    polar_decode,
    polar_scratch,
    polar_transform_,
)
from commrt.ops.rans import (
    rans_capacity,
    rans_count_,
    rans_decode,
    rans_encode,
    rans_segments,
)
from commrt.ops.reference.moments import MomentMap, decode_moment, encode_moment
from commrt.ops.sources import (
    source_energies,
    source_history,
    source_prediction,
    source_products,
)
from commrt.ops.steps import adam_mini_, adamw_, adan_, lion_, mofo_, square_sums
from commrt.ops.updates import (
    update_add_,
    update_codes,
    update_products,
    update_rows,
    update_values,
)

__all__ = [
    "SEGMENT",
    "BlockFormat",
    "MomentMap",
    "Second",
    "StepBatch",
    "StepOptions",
    "StepTensor",
    "adam_mini_",
    "adamw_",
    "adan_",
    "block_decode",
    "block_encode",
    "coset_decode",
    "coset_llr",
    "decode_average",
    "decode_average_encode",
    "decode_moment",
    "dither_dequantise",
    "dither_quantise",
    "encode_moment",
    "lion_",
    "lmmse_combine",
    "loco_encode",
    "mofo_",
    "patch_apply_",
    "patch_bytes",
    "patch_capacity",
    "patch_encode",
    "polar_decode",
    "polar_scratch",
    "polar_transform_",
    "rans_capacity",
    "rans_count_",
    "rans_decode",
    "rans_encode",
    "rans_segments",
    "rescale_",
    "scale_rows",
    "source_energies",
    "source_history",
    "source_prediction",
    "source_products",
    "square_sums",
    "status",
    "update_add_",
    "update_codes",
    "update_products",
    "update_rows",
    "update_values",
]


@takes_arrays("payload")
def block_encode(
    input: Tensor,
    payload: Tensor,
    fmt: BlockFormat,
    *,
    seed: int | None = None,
    first_block: int = 0,
    num_blocks: int | None = None,
    at_block: int = 0,
) -> None:
    """Quantise a window of ``input`` into ``payload``.

    Deterministic. Zero maps to zero (at 1 bit: a block of zeros does). With ``levels="absmax"``
    the error of an element is at most half a scale, or less than one when stochastic, and then its
    expectation is zero.

    Args:
        input: Flat tensor of N elements.
        payload: uint8, a whole number of blocks of ``fmt``.
        fmt: Width, block and level rule.
        seed: None rounds to nearest even; an integer in [0, 2**63) rounds stochastically with
            Philox numbers of (seed, element index).
        first_block: First block of ``input``.
        num_blocks: Blocks to encode; default, to the end of ``input``.
        at_block: Where in ``payload`` the first of them goes.

    Cost: reads N elements, writes N * bits / 8 + 2 bytes a block; no extra memory.
    """
    _check_devices(input=input, payload=payload)
    num_blocks = _window(input, payload, fmt, first_block, num_blocks, at_block)
    _check_seed(seed or 0)
    if seed is not None and fmt.bits == 1:
        raise ConfigError("stochastic rounding at bits=1: needs 2, 4 or 8 bits")
    torch.ops.commrt.block_encode(
        input,
        payload,
        fmt.bits,
        fmt.block,
        fmt.mean_levels,
        seed,
        first_block,
        num_blocks,
        at_block,
    )


@takes_arrays("output")
def block_decode(
    payload: Tensor,
    output: Tensor,
    fmt: BlockFormat,
    *,
    first_block: int = 0,
    num_blocks: int | None = None,
    at_block: int = 0,
) -> None:
    """Write code * scale of a payload's blocks into a window of ``output``.

    Args:
        payload: uint8, a whole number of blocks of ``fmt``.
        output: Flat tensor of N elements, overwritten; rounded to nearest even if 16 bit.
        fmt: What the payload was encoded with.
        first_block: First block of ``output``.
        num_blocks: Blocks to decode; default, to the end of ``output``.
        at_block: First block of ``payload``.
    """
    _check_devices(payload=payload, output=output)
    num_blocks = _window(output, payload, fmt, first_block, num_blocks, at_block)
    torch.ops.commrt.block_decode(
        payload, output, fmt.bits, fmt.block, first_block, num_blocks, at_block
    )


@takes_arrays("residual", "payload")
def loco_encode(
    grad: Tensor,
    residual: Tensor,
    payload: Tensor,
    fmt: BlockFormat,
    *,
    beta: float = 0.8,
    residual_bits: int = 8,
    stochastic: bool = False,
    seed: int = 0,
    first_block: int = 0,
    num_blocks: int | None = None,
    at_block: int = 0,
) -> None:
    """Compensate, quantise, pack and update the residual in one pass over memory.

    With g the gradient, e the residual and Q the block quantizer::

        h = g + e;   payload <- Q(h);   e <- beta * e + (1 - beta) * (h - Q(h))

    Over any number of steps, sum of Q(h) + e / (1 - beta) = sum of g, up to the rounding of e: the
    error is delayed, never dropped. A block of h that is not finite is sent as NaN and leaves its
    residual as it was.

    Args:
        grad: Flat tensor of N elements, not changed.
        residual: Payload of ``BlockFormat(bits=residual_bits, block=fmt.block)`` for all N
            elements, updated in place. Zeros are the empty residual.
        payload: uint8, a whole number of blocks of ``fmt``.
        fmt: Width, block and level rule of what is sent.
        beta: Weight of the old residual, in [0, 1). 0 is classic error feedback.
        residual_bits: 8, rounded to nearest even, or 4, rounded stochastically.
        stochastic: Round the codes stochastically too.
        seed: Of the stochastic rounding, in [0, 2**63); change it every step.
        first_block: First block of ``grad`` and ``residual``.
        num_blocks: Blocks to encode; default, to the end of ``grad``.
        at_block: Where in ``payload`` the first of them goes.

    Cost: per fp32 element at 4 bits, 4 + 1 bytes read and 1 + 0.5 written.

    Source: Xie et al., "LoCo: Low-Bit Communication Adaptor for Large-scale Model Training",
    TPAMI 2025 (arXiv 2407.04480), algorithm 1, with a scale per block instead of one constant.
    """
    _check_devices(grad=grad, residual=residual, payload=payload)
    num_blocks = _window(grad, payload, fmt, first_block, num_blocks, at_block)
    _check_seed(seed)
    if residual_bits not in (4, 8):
        raise ConfigError(f"residual_bits={residual_bits}: must be 4 or 8")
    if not 0.0 <= beta <= MAX_BETA:
        raise ConfigError(f"beta={beta!r}: must be in [0, 1), at most {MAX_BETA}")
    if stochastic and fmt.bits == 1:
        raise ConfigError("stochastic rounding at bits=1: needs 2, 4 or 8 bits")
    residual_fmt = BlockFormat(bits=residual_bits, block=fmt.block)
    expected = residual_fmt.payload_bytes(fmt.num_blocks(grad.numel()))
    if residual.numel() != expected:
        raise ConfigError(f"residual has {residual.numel()} bytes: must be {expected}")
    _check_payload("residual", residual, residual_fmt)
    torch.ops.commrt.loco_encode(
        grad,
        residual,
        payload,
        fmt.bits,
        fmt.block,
        fmt.mean_levels,
        beta,
        residual_bits,
        stochastic,
        seed,
        first_block,
        num_blocks,
        at_block,
    )


@takes_arrays("payload")
def rescale_(payload: Tensor, ratio: Tensor, fmt: BlockFormat) -> None:
    """Multiply every element of a payload, by multiplying its scales, in place.

    Exact for powers of two; other ratios round each scale to bfloat16 (2**-9 relative).

    Args:
        payload: uint8, a whole number of blocks of ``fmt``, without NaN scales.
        ratio: fp32 scalar above 0, on the payload's device, where it stays.
        fmt: What the payload was encoded with.

    Cost: reads and writes 2 bytes a block.
    """
    _check_payload("payload", payload, fmt)
    _check_devices(payload=payload, ratio=ratio)
    if ratio.dtype != torch.float32 or ratio.numel() != 1:
        raise ConfigError(f"ratio is {ratio.dtype} {tuple(ratio.shape)}: must be a float32 scalar")
    torch.ops.commrt.rescale_(payload, ratio, fmt.bits, fmt.block)


@takes_arrays("output")
def decode_average(
    payloads: Tensor, output: Tensor, fmt: BlockFormat, *, first_block: int = 0
) -> None:
    """Decode one payload of each rank and write their fp32 mean.

    The sum runs in row order in fp32 and is multiplied by the fp32 value of 1 / R.

    Args:
        payloads: uint8 (R, bytes), rows contiguous; each row a payload of the same B blocks.
        output: Flat tensor; blocks ``[first_block, first_block + B)`` are overwritten.
        fmt: What the payloads were encoded with.
        first_block: First block of ``output``.

    Cost: per element, R * bits / 8 bytes read, the output's size written.
    """
    _check_devices(payloads=payloads, output=output)
    num_blocks = _check_stack(payloads, fmt)
    _check_flat("output", output)
    if not 0 <= first_block <= fmt.num_blocks(output.numel()) - num_blocks:
        raise ConfigError(
            f"blocks [{first_block}, {first_block + num_blocks}) do not lie in an output of "
            f"{fmt.num_blocks(output.numel())}"
        )
    torch.ops.commrt.decode_average(payloads, output, fmt.bits, fmt.block, first_block, num_blocks)


@takes_arrays("output")
def decode_average_encode(
    payloads: Tensor, output: Tensor, fmt: BlockFormat, output_fmt: BlockFormat
) -> None:
    """Decode one payload of each rank, average in fp32 and encode the mean: the return leg.

    Equal to :func:`decode_average` into fp32 followed by :func:`block_encode`, without the fp32
    tensor in between.

    Args:
        payloads: uint8 (R, bytes), rows contiguous; each row a payload of the same B blocks.
        output: Payload of B blocks of ``output_fmt``, overwritten.
        fmt: What the payloads were encoded with.
        output_fmt: What to encode the mean with; same block size.
    """
    _check_devices(payloads=payloads, output=output)
    num_blocks = _check_stack(payloads, fmt)
    _check_payload("output", output, output_fmt)
    if output_fmt.block != fmt.block:
        raise ConfigError(f"block={output_fmt.block} of the output: must be {fmt.block} as well")
    if output.numel() != output_fmt.payload_bytes(num_blocks):
        raise ConfigError(
            f"output has {output.numel()} bytes: must be {output_fmt.payload_bytes(num_blocks)}"
        )
    torch.ops.commrt.decode_average_encode(
        payloads,
        output,
        fmt.bits,
        fmt.block,
        output_fmt.bits,
        output_fmt.mean_levels,
        num_blocks,
    )


def _window(
    flat: Tensor,
    payload: Tensor,
    fmt: BlockFormat,
    first_block: int,
    num_blocks: int | None,
    at_block: int,
) -> int:
    """Check a window on both sides and return its number of blocks."""
    _check_flat("tensor", flat)
    _check_payload("payload", payload, fmt)
    in_tensor, in_payload = fmt.num_blocks(flat.numel()), payload.numel() // fmt.block_bytes
    count = in_tensor - first_block if num_blocks is None else num_blocks
    for name, first, total in (
        ("tensor", first_block, in_tensor),
        ("payload", at_block, in_payload),
    ):
        if not 0 <= first <= first + count <= total:
            raise ConfigError(
                f"blocks [{first}, {first + count}) do not lie in a {name} of {total} blocks"
            )
    return count


def _check_devices(**tensors: Tensor) -> None:
    """A kernel given addresses of two devices would end the process."""
    (first, expected), *others = ((name, tensor.device) for name, tensor in tensors.items())
    for name, device in others:
        if device != expected:
            raise ConfigError(f"{name} is on {device}: must be on {expected}, as {first} is")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed={seed}: must be in [0, 2**63)")


def _check_flat(name: str, flat: Tensor) -> None:
    if flat.dtype not in FLOAT_DTYPES:
        raise ConfigError(f"{name} is {flat.dtype}: must be one of {FLOAT_DTYPES}")
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ConfigError(f"{name} has shape {tuple(flat.shape)}: must be 1-D and contiguous")


def _check_payload(name: str, payload: Tensor, fmt: BlockFormat) -> None:
    if payload.dtype != torch.uint8 or payload.dim() != 1 or not payload.is_contiguous():
        raise ConfigError(f"{name} is {payload.dtype} {tuple(payload.shape)}: must be 1-D uint8")
    if payload.numel() % fmt.block_bytes:
        raise ConfigError(
            f"{name} has {payload.numel()} bytes: must be a multiple of {fmt.block_bytes}"
        )


def _check_stack(payloads: Tensor, fmt: BlockFormat) -> int:
    if payloads.dtype != torch.uint8 or payloads.dim() != 2 or payloads.shape[0] == 0:
        raise ConfigError(
            f"payloads is {payloads.dtype} {tuple(payloads.shape)}: must be uint8 (ranks, bytes)"
        )
    if payloads.numel() and payloads.stride(1) != 1:
        raise ConfigError("payloads has strided rows: each row must be contiguous")
    if payloads.shape[1] % fmt.block_bytes:
        raise ConfigError(
            f"payloads has rows of {payloads.shape[1]} bytes: "
            f"must be a multiple of {fmt.block_bytes}"
        )
    return payloads.shape[1] // fmt.block_bytes
