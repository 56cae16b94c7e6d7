"""The operators of polar codes, by the native module."""

from collections.abc import Callable

from torch import Tensor

from commrt.ops.native.module import native, where

SCHEMAS = (
    "polar_transform_(Tensor(a!) bits) -> ()",
    "polar_decode(Tensor llr, Tensor known, Tensor values, Tensor(a!) bits, Tensor(b!) scratch,"
    " int paths) -> ()",
    "coset_llr(Tensor position, Tensor known, int plane, Tensor table, Tensor(a!) llr) -> ()",
    "coset_decode(Tensor position, Tensor residues, int modulus, Tensor(a!) codes) -> ()",
)


def polar_transform_(bits: Tensor) -> None:
    """See :func:`commrt.ops.polar_transform_`."""
    num_blocks, size = bits.shape
    native.polar_transform(bits.data_ptr(), num_blocks, size.bit_length() - 1, where(bits))


def polar_decode(
    llr: Tensor, known: Tensor, values: Tensor, bits: Tensor, scratch: Tensor, paths: int
) -> None:
    """See :func:`commrt.ops.polar_decode`."""
    num_blocks, size = llr.shape
    native.polar_decode(
        llr.data_ptr(),
        known.data_ptr(),
        size if known.dim() == 2 else 0,
        values.data_ptr(),
        bits.data_ptr(),
        scratch.data_ptr(),
        num_blocks,
        size.bit_length() - 1,
        paths,
        where(llr),
    )


def coset_llr(position: Tensor, known: Tensor, plane: int, table: Tensor, llr: Tensor) -> None:
    """See :func:`commrt.ops.coset_llr`."""
    native.coset_llr(
        position.data_ptr(),
        known.data_ptr(),
        2.0**-plane,
        table.data_ptr(),
        table.numel(),
        llr.data_ptr(),
        position.numel(),
        where(position),
    )


def coset_decode(position: Tensor, residues: Tensor, modulus: int, codes: Tensor) -> None:
    """See :func:`commrt.ops.coset_decode`."""
    native.coset_decode(
        position.data_ptr(),
        residues.data_ptr(),
        modulus,
        codes.data_ptr(),
        position.numel(),
        where(position),
    )


KERNELS: tuple[Callable[..., None], ...] = (
    polar_transform_,
    polar_decode,
    coset_llr,
    coset_decode,
)
