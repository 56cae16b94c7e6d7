"""Polar codes for what the other end nearly knows: Slepian-Wolf coding of one bit plane.

A block of N = 2**m bits x is ``u G`` over GF(2), where G is the m-th Kronecker power of
``[[1, 0], [1, 1]]`` in natural order, not bit-reversed, and its own inverse. The sender names some
of the u; the receiver, who has an LLR of each x, decides the others one after the other. An LLR is
``log P(x = 0) - log P(x = 1)``, in nats. Bits are bytes of which the lowest bit counts.

Cosets do the same for a whole integer at once: one that is known modulo M is the one of its coset
that is nearest to a position.

Source: Arikan, "Channel polarization", 2009 (arXiv 0807.3917), for the code and its decoder, and
"Source polarization", 2010 (arXiv 1001.3087), for its use here; Tal and Vardy, "List decoding of
polar codes", 2015 (arXiv 1206.0050), and Sarkis et al., "Fast list decoders for polar codes", 2016
(arXiv 1505.01466), for lists.
"""

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.arrays import takes_arrays

LEAST_LOG2, MOST_LOG2 = 8, 16
PATHS = (1, 2, 4, 8)
MOST_TABLE = 1 << 16
MOST_MODULUS = 1 << 15


def polar_scratch(num_blocks: int, log2_size: int, paths: int = 1) -> int:
    """The fp32 elements of scratch that :func:`polar_decode` takes: 1 + 1.5 * paths a bit, or 2."""
    _check_log2("log2_size", 1 << log2_size)
    _check_paths(paths)
    return num_blocks * (1 + paths + paths // 2) << log2_size


@takes_arrays("bits")
def polar_transform_(bits: Tensor) -> None:
    """Multiply blocks of bits by G, in place: u to x, and x to u.

    Args:
        bits: uint8 (B, N), contiguous, N a power of two from 2**8 to 2**16.

    Cost: reads and writes B * N bytes.
    """
    _check_blocks("bits", bits, torch.uint8)
    torch.ops.commrt.polar_transform_(bits)


@takes_arrays("bits", "scratch")
def polar_decode(
    llr: Tensor, known: Tensor, values: Tensor, bits: Tensor, scratch: Tensor, *, paths: int = 1
) -> None:
    """Decide blocks of x from LLRs and from those u that are known.

    Successive cancellation by the binary tree of the code. A node whose u are all known is
    computed from them, one of which none is known is decided at once: where its LLR is below zero,
    the bit is 1. All others combine the LLRs of their halves for two smaller nodes.

    With several paths a node of which nothing is known splits each: into the bits decided, and
    those with one or both of the two weakest turned over. The likeliest paths remain, and in the
    end the likeliest. ``bench/results/polar.json`` has what more paths are worth.

    Args:
        llr: fp32 (B, N), contiguous, N a power of two from 2**8 to 2**16. NaN counts as 0, and
            magnitudes are cut to 2**20.
        known: uint8 (N) for all blocks, or (B, N): whether a u is known, which any but 0 means.
        values: uint8 (B, N), contiguous: the u that are known.
        bits: uint8 (B, N), contiguous. Overwritten with x.
        scratch: fp32, flat, at least ``polar_scratch(B, m, paths)`` elements. Overwritten.
        paths: 1, 2, 4 or 8.

    Cost: the time is about proportional to ``paths``.
    """
    _check_blocks("llr", llr, torch.float32)
    _check_paths(paths)
    for name, tensor in (("values", values), ("bits", bits)):
        _check_like(name, tensor, llr, torch.uint8)
    if known.dtype != torch.uint8 or known.shape not in (llr.shape, llr.shape[1:]):
        raise ConfigError(
            f"known is {known.dtype} {tuple(known.shape)}: "
            f"must be uint8 {tuple(llr.shape)} or {tuple(llr.shape[1:])}"
        )
    if not known.is_contiguous():
        raise ConfigError("known is strided: must be contiguous")
    num_blocks, size = llr.shape
    least = polar_scratch(num_blocks, size.bit_length() - 1, paths)
    if scratch.dtype != torch.float32 or scratch.dim() != 1 or not scratch.is_contiguous():
        raise ConfigError(f"scratch is {scratch.dtype} {tuple(scratch.shape)}: must be 1-D float32")
    if scratch.numel() < least:
        raise ConfigError(f"scratch has {scratch.numel()} elements: must be at least {least}")
    _check_devices(llr=llr, known=known, values=values, bits=bits, scratch=scratch)
    torch.ops.commrt.polar_decode(llr, known, values, bits, scratch, paths)


@takes_arrays("llr")
def coset_llr(position: Tensor, known: Tensor, plane: int, table: Tensor, llr: Tensor) -> None:
    """LLRs of one bit of integers whose lower bits are known, and that lie near positions.

    With t = (position - known) / 2**plane, the distance in places of that bit, reduced to [0, 2),
    the LLR is element ``int(t * T / 2)`` of the table. Where the position is not finite, it is 0.

    Args:
        position: fp32, flat: N estimates z of the integers.
        known: int16 (N): their bits below ``plane``, as a number of at least 0.
        plane: The bit, from 0, the lowest, to 15.
        table: fp32 (T), T a power of two from 2 to 2**16: what :func:`plane_table` of
            :mod:`commrt.codecs.polar` makes.
        llr: fp32 (N). Overwritten.
    """
    _check_flat("position", position, torch.float32)
    _check_like("known", known, position, torch.int16)
    _check_like("llr", llr, position, torch.float32)
    _check_flat("table", table, torch.float32)
    if not 0 <= plane < 16:
        raise ConfigError(f"plane={plane}: must be from 0 to 15")
    length = table.numel()
    if not 2 <= length <= MOST_TABLE or length & (length - 1):
        raise ConfigError(f"table has {length} elements: must be a power of two up to {MOST_TABLE}")
    _check_devices(position=position, known=known, table=table, llr=llr)
    torch.ops.commrt.coset_llr(position, known, plane, table, llr)


@takes_arrays("codes")
def coset_decode(position: Tensor, residues: Tensor, modulus: int, codes: Tensor) -> None:
    """The integers that have these residues modulo ``modulus`` and are nearest to the positions.

    In fp32: m + M * rint((z - m) * (1 / M)), with 1 / M rounded to fp32 and ties to even, clamped
    to int16; 0 where the position is NaN.

    Args:
        position: fp32, flat: N estimates z.
        residues: int16 (N): m.
        modulus: M, from 1 to 2**15.
        codes: int16 (N). Overwritten.
    """
    _check_flat("position", position, torch.float32)
    _check_like("residues", residues, position, torch.int16)
    _check_like("codes", codes, position, torch.int16)
    if not 1 <= modulus <= MOST_MODULUS:
        raise ConfigError(f"modulus={modulus}: must be from 1 to {MOST_MODULUS}")
    _check_devices(position=position, residues=residues, codes=codes)
    torch.ops.commrt.coset_decode(position, residues, modulus, codes)


def _check_log2(name: str, size: int) -> None:
    if size & (size - 1) or not 1 << LEAST_LOG2 <= size <= 1 << MOST_LOG2:
        raise ConfigError(
            f"{name} makes blocks of {size} bits: "
            f"must be a power of two from 2**{LEAST_LOG2} to 2**{MOST_LOG2}"
        )


def _check_blocks(name: str, blocks: Tensor, dtype: torch.dtype) -> None:
    if blocks.dtype != dtype or blocks.dim() != 2 or not blocks.is_contiguous():
        raise ConfigError(
            f"{name} is {blocks.dtype} {tuple(blocks.shape)}: must be {dtype}, 2-D and contiguous"
        )
    _check_log2(name, blocks.shape[1])


def _check_paths(paths: int) -> None:
    if paths not in PATHS:
        raise ConfigError(f"paths={paths}: must be one of {PATHS}")


def _check_flat(name: str, flat: Tensor, dtype: torch.dtype) -> None:
    if flat.dtype != dtype or flat.dim() != 1 or not flat.is_contiguous():
        raise ConfigError(
            f"{name} is {flat.dtype} {tuple(flat.shape)}: must be {dtype}, 1-D and contiguous"
        )


def _check_like(name: str, tensor: Tensor, first: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.shape != first.shape or not tensor.is_contiguous():
        raise ConfigError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}: "
            f"must be {dtype} {tuple(first.shape)} and contiguous"
        )


def _check_devices(**tensors: Tensor) -> None:
    (first, expected), *others = ((name, tensor.device) for name, tensor in tensors.items())
    for name, device in others:
        if device != expected:
            raise ConfigError(f"{name} is on {device}: must be on {expected}, as {first} is")
