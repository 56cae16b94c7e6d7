"""The operators of rANS, by the native module."""

from collections.abc import Callable

from torch import Tensor

from commrt.ops.native.module import native, where

SCHEMAS = (
    "rans_encode(Tensor codes, Tensor rows, Tensor starts, int lanes, Tensor checks, "
    "Tensor(a!) words, Tensor(b!) lengths) -> ()",
    "rans_decode(Tensor words, Tensor lengths, Tensor rows, Tensor starts, int lanes, "
    "Tensor(a!) codes, Tensor(b!) checks, Tensor(c!) used) -> ()",
)


def rans_encode(
    codes: Tensor,
    rows: Tensor,
    starts: Tensor,
    lanes: int,
    checks: Tensor,
    words: Tensor,
    lengths: Tensor,
) -> None:
    """See :func:`commrt.ops.rans_encode`."""
    native.rans_encode(
        codes.data_ptr(),
        rows.data_ptr(),
        codes.numel(),
        starts.data_ptr(),
        starts.shape[0],
        lanes,
        checks.data_ptr(),
        words.data_ptr(),
        words.shape[1],
        lengths.data_ptr(),
        where(codes),
    )


def rans_decode(
    words: Tensor,
    lengths: Tensor,
    rows: Tensor,
    starts: Tensor,
    lanes: int,
    codes: Tensor,
    checks: Tensor,
    used: Tensor,
) -> None:
    """See :func:`commrt.ops.rans_decode`."""
    native.rans_decode(
        words.data_ptr(),
        words.shape[1],
        lengths.data_ptr(),
        rows.data_ptr(),
        codes.numel(),
        starts.data_ptr(),
        starts.shape[0],
        lanes,
        codes.data_ptr(),
        checks.data_ptr(),
        used.data_ptr(),
        where(words),
    )


KERNELS: tuple[Callable[..., None], ...] = (rans_encode, rans_decode)
