"""The operators on payloads, by the native module."""

from collections.abc import Callable

from torch import Tensor

from commrt.ops.format import SCALE_BYTES
from commrt.ops.native.module import DTYPE_CODE, native, where

SCHEMAS = (
    "block_encode(Tensor input, Tensor(a!) payload, int bits, int block, bool mean_levels, "
    "int? seed, int first_block, int num_blocks, int at_block) -> ()",
    "block_decode(Tensor payload, Tensor(a!) output, int bits, int block, int first_block, "
    "int num_blocks, int at_block) -> ()",
    "loco_encode(Tensor grad, Tensor(a!) residual, Tensor(b!) payload, int bits, int block, "
    "bool mean_levels, float beta, int residual_bits, bool stochastic, int seed, int first_block, "
    "int num_blocks, int at_block) -> ()",
    "decode_average(Tensor payloads, Tensor(a!) output, int bits, int block, int first_block, "
    "int num_blocks) -> ()",
    "decode_average_encode(Tensor payloads, Tensor(a!) output, int bits, int block, "
    "int output_bits, bool output_mean_levels, int num_blocks) -> ()",
    "rescale_(Tensor(a!) payload, Tensor ratio, int bits, int block) -> ()",
)


def _window(flat: Tensor, block: int, first_block: int) -> object:
    first = first_block * block
    address = flat.data_ptr() + first * flat.element_size()
    return native.Window(address, DTYPE_CODE[flat.dtype], flat.numel() - first, first)


def _payload(data: Tensor, bits: int, block: int, at_block: int) -> object:
    block_bytes = block * bits // 8 + SCALE_BYTES
    return native.Payload(data.data_ptr(), data.numel() // block_bytes, at_block)


def block_encode(
    input: Tensor,
    output: Tensor,
    bits: int,
    block: int,
    mean_levels: bool,
    seed: int | None,
    first_block: int,
    num_blocks: int,
    at_block: int,
) -> None:
    """See :func:`commrt.ops.block_encode`."""
    native.block_encode(
        _window(input, block, first_block),
        _payload(output, bits, block, at_block),
        native.BlockFormat(bits, block, mean_levels),
        native.Rounding(seed is not None, seed or 0),
        num_blocks,
        where(input),
    )


def block_decode(
    data: Tensor,
    output: Tensor,
    bits: int,
    block: int,
    first_block: int,
    num_blocks: int,
    at_block: int,
) -> None:
    """See :func:`commrt.ops.block_decode`."""
    native.block_decode(
        _payload(data, bits, block, at_block),
        _window(output, block, first_block),
        native.BlockFormat(bits, block, False),
        num_blocks,
        where(data),
    )


def loco_encode(
    grad: Tensor,
    residual: Tensor,
    output: Tensor,
    bits: int,
    block: int,
    mean_levels: bool,
    beta: float,
    residual_bits: int,
    stochastic: bool,
    seed: int,
    first_block: int,
    num_blocks: int,
    at_block: int,
) -> None:
    """See :func:`commrt.ops.loco_encode`."""
    native.loco_encode(
        _window(grad, block, first_block),
        _payload(residual, residual_bits, block, first_block),
        _payload(output, bits, block, at_block),
        native.BlockFormat(bits, block, mean_levels),
        native.Rounding(stochastic, seed),
        beta,
        residual_bits,
        num_blocks,
        where(grad),
    )


def decode_average(
    payloads: Tensor, output: Tensor, bits: int, block: int, first_block: int, num_blocks: int
) -> None:
    """See :func:`commrt.ops.decode_average`."""
    native.decode_average(
        native.Payload(payloads.data_ptr(), num_blocks, 0),
        payloads.stride(0),
        payloads.shape[0],
        _window(output, block, first_block),
        native.BlockFormat(bits, block, False),
        num_blocks,
        where(payloads),
    )


def decode_average_encode(
    payloads: Tensor,
    output: Tensor,
    bits: int,
    block: int,
    output_bits: int,
    output_mean_levels: bool,
    num_blocks: int,
) -> None:
    """See :func:`commrt.ops.decode_average_encode`."""
    native.decode_average_encode(
        native.Payload(payloads.data_ptr(), num_blocks, 0),
        payloads.stride(0),
        payloads.shape[0],
        native.BlockFormat(bits, block, False),
        _payload(output, output_bits, block, 0),
        native.BlockFormat(output_bits, block, output_mean_levels),
        num_blocks,
        where(payloads),
    )


def rescale_(data: Tensor, ratio: Tensor, bits: int, block: int) -> None:
    """See :func:`commrt.ops.rescale_`."""
    native.rescale(
        _payload(data, bits, block, 0),
        ratio.data_ptr(),
        native.BlockFormat(bits, block, False),
        where(data),
    )


KERNELS: tuple[Callable[..., None], ...] = (
    block_encode,
    block_decode,
    loco_encode,
    decode_average,
    decode_average_encode,
    rescale_,
)
