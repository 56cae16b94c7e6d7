"""Blocks of elements to payloads and back.

Shapes: N elements, B blocks, K elements a block.
"""

import torch
from torch import Tensor

from commrt.ops.format import SCALE_BYTES, BlockFormat

LANES = 16
GROUP = 32
STREAM_CODES = 0
STREAM_RESIDUAL = 1


def block_encode(
    input: Tensor,
    payload: Tensor,
    bits: int,
    block: int,
    mean_levels: bool,
    seed: int | None,
    first_block: int,
    num_blocks: int,
    at_block: int,
) -> None:
    """See :func:`commrt.ops.block_encode`."""
    fmt = _format(bits, block, mean_levels)
    value_BK, valid_B = _blocks(input, block, first_block, num_blocks)
    scale_B = _choose_scale(value_BK, valid_B, fmt)
    uniform_BK = None
    if seed is not None:
        uniform_BK = _uniform(seed, STREAM_CODES, first_block * block, value_BK.shape)
    _write(payload, fmt, at_block, _quantise(value_BK, scale_B, fmt, uniform_BK), scale_B)


def block_decode(
    payload: Tensor,
    output: Tensor,
    bits: int,
    block: int,
    first_block: int,
    num_blocks: int,
    at_block: int,
) -> None:
    """See :func:`commrt.ops.block_decode`."""
    fmt = _format(bits, block, mean_levels=bits == 1)
    _store(output, block, first_block, _decode(payload, fmt, at_block, num_blocks))


def loco_encode(
    grad: Tensor,
    residual: Tensor,
    payload: Tensor,
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
    fmt = _format(bits, block, mean_levels)
    residual_fmt = BlockFormat(bits=residual_bits, block=block)
    first = first_block * block
    grad_BK, valid_B = _blocks(grad, block, first_block, num_blocks)
    error_codes_BK, error_scale_B = _read(residual, residual_fmt, first_block, num_blocks)
    compensated_BK = grad_BK + error_codes_BK * error_scale_B.float()[:, None]
    scale_B = _choose_scale(compensated_BK, valid_B, fmt)
    uniform_BK = _uniform(seed, STREAM_CODES, first, grad_BK.shape) if stochastic else None
    codes_BK = _quantise(compensated_BK, scale_B, fmt, uniform_BK)
    _write(payload, fmt, at_block, codes_BK, scale_B)

    keep = torch.tensor(beta, dtype=torch.float32)
    sent_BK = codes_BK.float() * scale_B.float()[:, None]
    kept_BK = error_codes_BK * (keep * error_scale_B.float())[:, None]
    updated_BK = kept_BK + (1 - keep) * (compensated_BK - sent_BK)
    updated_scale_B = _choose_scale(updated_BK, valid_B, residual_fmt)
    draws_BK = None
    if residual_bits == 4:
        draws_BK = _uniform(seed, STREAM_RESIDUAL, first, grad_BK.shape)
    updated_codes_BK = _quantise(updated_BK, updated_scale_B, residual_fmt, draws_BK)
    is_sent_B = scale_B.isfinite()
    _write(
        residual,
        residual_fmt,
        first_block,
        torch.where(is_sent_B[:, None], updated_codes_BK, error_codes_BK),
        torch.where(is_sent_B, updated_scale_B, error_scale_B),
    )


def rescale_(payload: Tensor, ratio: Tensor, bits: int, block: int) -> None:
    """See :func:`commrt.ops.rescale_`."""
    fmt = BlockFormat(bits=bits, block=block)
    codes_bytes = payload.numel() // fmt.block_bytes * fmt.code_bytes
    scale_B = payload[codes_bytes:].clone().view(torch.bfloat16)
    limits = torch.finfo(torch.bfloat16)
    largest = limits.max / (1 << (bits - 1))  # so that no code times it overflows
    scaled_B = (scale_B.float() * ratio).clamp(max=largest).bfloat16()
    payload[codes_bytes:] = torch.where(scaled_B < limits.tiny, 0, scaled_B).view(torch.uint8)


def decode_average(
    payloads: Tensor, output: Tensor, bits: int, block: int, first_block: int, num_blocks: int
) -> None:
    """See :func:`commrt.ops.decode_average`."""
    fmt = _format(bits, block, mean_levels=bits == 1)
    _store(output, block, first_block, _average(payloads, fmt, num_blocks))


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
    fmt = _format(bits, block, mean_levels=bits == 1)
    output_fmt = _format(output_bits, block, output_mean_levels)
    mean_BK = _average(payloads, fmt, num_blocks)
    valid_B = torch.full((num_blocks,), block, device=mean_BK.device)
    scale_B = _choose_scale(mean_BK, valid_B, output_fmt)
    _write(output, output_fmt, 0, _quantise(mean_BK, scale_B, output_fmt, None), scale_B)


def philox(seed: int, stream: int, counter: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words for each int64 counter.

    Returns:
        int64 tensor of shape ``(*counter.shape, 4)``, each entry in [0, 2**32).
    """
    mask = 0xFFFFFFFF
    x0, x1 = counter & mask, (counter >> 32) & mask
    x2, x3 = torch.full_like(counter, stream), torch.zeros_like(counter)
    key0, key1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (
            ((product1 >> 32) & mask) ^ x1 ^ key0,
            product1 & mask,
            ((product0 >> 32) & mask) ^ x3 ^ key1,
            product0 & mask,
        )
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return torch.stack((x0, x1, x2, x3), dim=-1)


def _format(bits: int, block: int, mean_levels: bool) -> BlockFormat:
    return BlockFormat(bits=bits, block=block, levels="mean" if mean_levels else "absmax")


def _uniform(seed: int, stream: int, first: int, shape: torch.Size) -> Tensor:
    """Uniform on [0, 1) for elements first, first + 1, ...: element i has word i % 4 of i // 4."""
    count = shape.numel()
    counter = torch.arange(first // 4, first // 4 + count // 4, dtype=torch.int64)
    return ((philox(seed, stream, counter) >> 8).float() * 2.0**-24).reshape(shape)


def _blocks(flat: Tensor, block: int, first_block: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Blocks as fp32 (B, K), padded with zeros, and the number of real elements in each."""
    first = first_block * block
    part = flat[first : first + num_blocks * block].float()
    padded = torch.nn.functional.pad(part, (0, num_blocks * block - part.numel()))
    begins = torch.arange(num_blocks, device=flat.device) * block
    return padded.view(num_blocks, block), (part.numel() - begins).clamp(max=block)


def _store(flat: Tensor, block: int, first_block: int, value_BK: Tensor) -> None:
    first = first_block * block
    part = flat[first : first + value_BK.numel()]
    part.copy_(value_BK.reshape(-1)[: part.numel()])


def _sum_lanes(value_BK: Tensor) -> Tensor:
    """Sum of each block in the order of the kernels: 16 lanes, then pairwise."""
    num_blocks, block = value_BK.shape
    lanes_BRL = value_BK.view(num_blocks, block // LANES, LANES)
    total_BL = torch.zeros_like(lanes_BRL[:, 0])
    for row in range(lanes_BRL.shape[1]):
        total_BL = total_BL + lanes_BRL[:, row]
    while total_BL.shape[1] > 1:
        half = total_BL.shape[1] // 2
        total_BL = total_BL[:, :half] + total_BL[:, half:]
    return total_BL[:, 0]


def _mean_level(value_BK: Tensor, valid_B: Tensor, bits: int) -> Tensor:
    magnitude_BK = value_BK.abs()
    mean_B = _sum_lanes(magnitude_BK) / valid_B.float()
    if bits == 1:
        return mean_B
    threshold_B = mean_B * torch.tensor(0.7, dtype=torch.float32)
    is_above_BK = magnitude_BK > threshold_B[:, None]
    above_BK = torch.where(is_above_BK, magnitude_BK, 0.0)
    count_B = is_above_BK.sum(dim=1).float()
    return torch.where(count_B > 0, _sum_lanes(above_BK) / count_B, magnitude_BK.amax(dim=1))


def _choose_scale(value_BK: Tensor, valid_B: Tensor, fmt: BlockFormat) -> Tensor:
    """bfloat16 scale of each block: zero, a normal number, or NaN where it is not finite."""
    absmax_B = value_BK.abs().amax(dim=1)
    if fmt.mean_levels:
        level_bits_B = _mean_level(value_BK, valid_B, fmt.bits).view(torch.int32).long()
        rounded_B = level_bits_B + 0x7FFF + ((level_bits_B >> 16) & 1)
    else:
        quotient_B = absmax_B / fmt.max_code
        rounded_B = quotient_B.view(torch.int32).long() + 0xFFFF
    largest = torch.tensor(torch.finfo(torch.float32).max) / fmt.max_code
    limit = int(largest.view(torch.int32)) >> 16
    scale_B = (rounded_B >> 16).clamp(max=limit)
    scale_B = torch.where(scale_B < 0x0080, 0, scale_B)
    scale_B = torch.where(absmax_B.isfinite(), scale_B, 0x7FC0)
    return scale_B.to(torch.int16).view(torch.bfloat16)


def _quantise(
    value_BK: Tensor, scale_B: Tensor, fmt: BlockFormat, uniform: Tensor | None
) -> Tensor:
    """Integer codes (B, K); zero where the scale is zero or NaN (at 1 bit: the code +1)."""
    is_codable_B = (scale_B > 0)[:, None]
    if fmt.bits == 1:
        return torch.where(is_codable_B & (value_BK < 0), -1, 1)
    inverse_B = 1.0 / scale_B.float()
    level_BK = (value_BK * inverse_B[:, None]).clamp(-fmt.max_code, fmt.max_code)
    if uniform is None:
        code_BK = level_BK.round()
    else:
        below_BK = level_BK.floor()
        code_BK = below_BK + (level_BK - below_BK > uniform.to(level_BK.device))
    return torch.where(is_codable_B, code_BK, 0.0).long()


def _by_byte(raw_BK: Tensor, fmt: BlockFormat) -> Tensor:
    """Codes with those that share a byte in the last dimension, lowest bits first."""
    if fmt.bits == 4:
        return raw_BK.view(-1, 2, GROUP // 2).transpose(1, 2)
    return raw_BK.view(-1, 8 // fmt.bits)


def _write(payload: Tensor, fmt: BlockFormat, at: int, codes_BK: Tensor, scale_B: Tensor) -> None:
    total = payload.numel() // fmt.block_bytes
    num_blocks = scale_B.numel()
    raw_BK = (codes_BK < 0).long() if fmt.bits == 1 else codes_BK & ((1 << fmt.bits) - 1)
    place = torch.arange(0, 8, fmt.bits, device=raw_BK.device)
    packed = (_by_byte(raw_BK, fmt) << place).sum(dim=-1).to(torch.uint8)
    packed = packed.view(num_blocks, fmt.code_bytes)
    code_region = payload[: total * fmt.code_bytes].view(total, fmt.code_bytes)
    scale_region = payload[total * fmt.code_bytes :].view(total, SCALE_BYTES)
    code_region[at : at + num_blocks] = packed
    scale_region[at : at + num_blocks] = scale_B.view(torch.uint8).view(num_blocks, SCALE_BYTES)


def _read(payload: Tensor, fmt: BlockFormat, at: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Codes (B, K) and bfloat16 scales (B) of blocks [at, at + num_blocks)."""
    total = payload.numel() // fmt.block_bytes
    code_region = payload[: total * fmt.code_bytes].view(total, fmt.code_bytes)
    scale_region = payload[total * fmt.code_bytes :].view(total, SCALE_BYTES)
    scale_B = scale_region[at : at + num_blocks].clone().view(torch.bfloat16).view(num_blocks)
    packed = code_region[at : at + num_blocks].long()
    place = torch.arange(0, 8, fmt.bits, device=packed.device)
    raw = (packed[..., None] >> place) & ((1 << fmt.bits) - 1)
    if fmt.bits == 4:
        raw = raw.view(-1, GROUP // 2, 2).transpose(1, 2)
    raw_BK = raw.reshape(num_blocks, fmt.block)
    if fmt.bits == 1:
        return 1 - 2 * raw_BK, scale_B
    sign = 1 << (fmt.bits - 1)
    return (raw_BK ^ sign) - sign, scale_B


def _decode(payload: Tensor, fmt: BlockFormat, at: int, num_blocks: int) -> Tensor:
    codes_BK, scale_B = _read(payload, fmt, at, num_blocks)
    return codes_BK.float() * scale_B.float()[:, None]


def _average(payloads: Tensor, fmt: BlockFormat, num_blocks: int) -> Tensor:
    total_BK = torch.zeros(num_blocks, fmt.block, device=payloads.device)
    for payload in payloads:
        total_BK = total_BK + _decode(payload, fmt, 0, num_blocks)
    return total_BK * (torch.tensor(1.0) / payloads.shape[0])
