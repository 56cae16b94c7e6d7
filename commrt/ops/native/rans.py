"""The operators of rANS, by the native module."""

from collections.abc import Callable

from torch import Tensor

from commrt.ops.native.module import native, threads, where
from commrt.ops.rans import outside

SCHEMAS = (
    "rans_encode(Tensor codes, Tensor rows, Tensor starts, int lanes, Tensor checks, "
    "Tensor(a!) words, Tensor(b!) lengths, Tensor(c!)? escaped, Tensor(d!)? num_escaped) -> ()",
    "rans_decode(Tensor words, Tensor lengths, Tensor rows, Tensor starts, int lanes, "
    "Tensor(a!) codes, Tensor(b!) checks, Tensor(c!) used) -> ()",
    "rans_count_(Tensor(a!) counts, Tensor codes, Tensor rows, int[] ends) -> ()",
)


def _vectors(codes: Tensor) -> tuple[int, int]:
    """How many, and elements of each."""
    return (1, codes.numel()) if codes.dim() == 1 else (codes.shape[0], codes.shape[1])


def rans_encode(
    codes: Tensor,
    rows: Tensor,
    starts: Tensor,
    lanes: int,
    checks: Tensor,
    words: Tensor,
    lengths: Tensor,
    escaped: Tensor | None,
    num_escaped: Tensor | None,
) -> None:
    """See :func:`commrt.ops.rans_encode`."""
    native.rans_encode(
        codes.data_ptr(),
        rows.data_ptr(),
        *_vectors(codes),
        starts.data_ptr(),
        starts.shape[0],
        lanes,
        checks.data_ptr(),
        words.data_ptr(),
        words.shape[1],
        lengths.data_ptr(),
        0 if escaped is None else escaped.data_ptr(),
        0 if num_escaped is None else num_escaped.data_ptr(),
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
        *_vectors(codes),
        starts.data_ptr(),
        starts.shape[0],
        lanes,
        codes.data_ptr(),
        checks.data_ptr(),
        used.data_ptr(),
        where(words),
    )


def rans_count_(counts: Tensor, codes: Tensor, rows: Tensor, ends: list[int]) -> None:
    """See :func:`commrt.ops.rans_count_`."""
    found = native.rans_count(
        codes.data_ptr(),
        rows.data_ptr(),
        *_vectors(codes),
        ends,
        counts.shape[1],
        counts.data_ptr(),
        threads(),
    )
    if not found:
        raise outside(rows, counts.shape[1])


KERNELS: tuple[Callable[..., None], ...] = (rans_encode, rans_decode)
CPU_KERNELS: tuple[Callable[..., None], ...] = (rans_count_,)
