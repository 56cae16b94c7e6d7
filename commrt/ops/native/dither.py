"""The operators of the dither, by the native module."""

from collections.abc import Callable

from torch import Tensor

from commrt.ops.native.module import native, where

SCHEMAS = (
    "dither_quantise(Tensor values, Tensor? predicted, Tensor(a!) codes, float step, int seed, "
    "int first_index, str lattice) -> ()",
    "dither_dequantise(Tensor codes, Tensor? predicted, Tensor(a!) values, float step, int seed, "
    "int first_index, str lattice) -> ()",
    "scale_rows(Tensor(a!) rows, Tensor(b!)? contexts, Tensor? energies, Tensor rows_of_class, "
    "Tensor ends, int base, int seed, int first_index, str lattice) -> ()",
    "lmmse_combine(Tensor stack, Tensor weights, Tensor(a!) out) -> ()",
)

LATTICE_CODE = {"z": 0, "e8": 1}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dither_quantise(
    values: Tensor,
    predicted: Tensor | None,
    codes: Tensor,
    step: float,
    seed: int,
    first_index: int,
    lattice: str,
) -> None:
    """See :func:`commrt.ops.dither_quantise`."""
    native.dither_quantise(
        values.data_ptr(),
        _address(predicted),
        codes.data_ptr(),
        values.numel(),
        step,
        native.Dither(LATTICE_CODE[lattice], seed, first_index),
        where(values),
    )


def dither_dequantise(
    codes: Tensor,
    predicted: Tensor | None,
    values: Tensor,
    step: float,
    seed: int,
    first_index: int,
    lattice: str,
) -> None:
    """See :func:`commrt.ops.dither_dequantise`."""
    native.dither_dequantise(
        codes.data_ptr(),
        _address(predicted),
        values.data_ptr(),
        codes.numel(),
        step,
        native.Dither(LATTICE_CODE[lattice], seed, first_index),
        where(codes),
    )


def scale_rows(
    rows: Tensor,
    contexts: Tensor | None,
    energies: Tensor | None,
    rows_of_class: Tensor,
    ends: Tensor,
    base: int,
    seed: int,
    first_index: int,
    lattice: str,
) -> None:
    """See :func:`commrt.ops.scale_rows`."""
    native.scale_rows(
        _address(energies),
        rows_of_class.data_ptr(),
        rows_of_class.shape[1],
        ends.data_ptr(),
        ends.numel(),
        base,
        _address(contexts),
        rows.data_ptr(),
        rows.numel(),
        native.Dither(LATTICE_CODE[lattice], seed, first_index),
        where(rows),
    )


def lmmse_combine(stack: Tensor, weights: Tensor, out: Tensor) -> None:
    """See :func:`commrt.ops.lmmse_combine`."""
    native.lmmse_combine(
        stack.data_ptr(),
        stack.stride(0),
        stack.shape[0],
        weights.data_ptr(),
        out.data_ptr(),
        out.numel(),
        where(stack),
    )


KERNELS: tuple[Callable[..., None], ...] = (
    dither_quantise,
    dither_dequantise,
    scale_rows,
    lmmse_combine,
)
