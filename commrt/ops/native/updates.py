"""The operators on several updates, by the native module; on the CPU only."""

from collections.abc import Callable, Sequence

from torch import Tensor

from commrt.ops.native.dither import LATTICE_CODE
from commrt.ops.native.module import DTYPE_CODE, native, threads

SCHEMAS = (
    "update_products(Tensor(a!) products, Tensor updates, Tensor? previous, Tensor?[] own, "
    "Tensor ends) -> ()",
    "update_rows(Tensor(a!) predicted, Tensor(b!) contexts, Tensor(c!) rows, Tensor? previous, "
    "Tensor?[] own, float[] weights, int[] shapes, float previous_weight, Tensor ends, "
    "Tensor[] tables, int[] bases, int[] seeds) -> ()",
    "update_codes(Tensor(a!) codes, Tensor(b!)[] kept, Tensor updates, Tensor predicted, "
    "Tensor rows, Tensor shares, float[] steps, int[] seeds, str lattice) -> ()",
    "update_values(Tensor(a!) values, Tensor(b!) residuals, Tensor(c!) products, "
    "Tensor(d!)[] kept, Tensor codes, Tensor predicted, Tensor rows, Tensor shares, Tensor ends, "
    "float[] steps, int[] seeds, str lattice) -> ()",
    "update_add_(Tensor(a!) total, Tensor updates, float[] factors) -> ()",
)


def _sources(previous: Tensor | None, own: Sequence[Tensor | None]) -> object:
    return native.Sources(
        0 if previous is None else previous.data_ptr(),
        0 if previous is None else DTYPE_CODE[previous.dtype],
        [0 if each is None else each.data_ptr() for each in own],
        [0 if each is None else DTYPE_CODE[each.dtype] for each in own],
    )


def _groups(ends: Tensor) -> object:
    return native.Groups(ends.data_ptr(), ends.numel())


def _kept(kept: Sequence[Tensor], shares: Tensor) -> object:
    return native.Kept([each.data_ptr() for each in kept], shares.data_ptr(), shares.numel())


def update_products(
    products: Tensor,
    updates: Tensor,
    previous: Tensor | None,
    own: Sequence[Tensor | None],
    ends: Tensor,
) -> None:
    """See :func:`commrt.ops.update_products`."""
    native.update_products(
        products.data_ptr(),
        updates.data_ptr(),
        native.Updates(*updates.shape, updates.shape[1]),
        _sources(previous, own),
        _groups(ends),
        threads(),
    )


def update_rows(
    predicted: Tensor,
    contexts: Tensor,
    rows: Tensor,
    previous: Tensor | None,
    own: Sequence[Tensor | None],
    weights: Sequence[float],
    shapes: Sequence[int],
    previous_weight: float,
    ends: Tensor,
    tables: Sequence[Tensor],
    bases: Sequence[int],
    seeds: Sequence[int],
) -> None:
    """See :func:`commrt.ops.update_rows`."""
    numel = sum(a * b for a, b in zip(shapes[0::2], shapes[1::2], strict=True))
    native.update_rows(
        predicted.data_ptr(),
        contexts.data_ptr(),
        rows.data_ptr(),
        native.Updates(len(own), numel, rows.shape[1]),
        _sources(previous, own),
        weights,
        native.Matrices(shapes, previous_weight),
        _groups(ends),
        [table.data_ptr() for table in tables],
        tables[0].shape[1] if tables else 1,
        bases,
        native.Lattices(LATTICE_CODE["z"], [], seeds),
        threads(),
    )


def update_codes(
    codes: Tensor,
    kept: Sequence[Tensor],
    updates: Tensor,
    predicted: Tensor,
    rows: Tensor,
    shares: Tensor,
    steps: Sequence[float],
    seeds: Sequence[int],
    lattice: str,
) -> None:
    """See :func:`commrt.ops.update_codes`."""
    native.update_codes(
        codes.data_ptr(),
        updates.data_ptr(),
        predicted.data_ptr(),
        rows.data_ptr(),
        native.Updates(*rows.shape, codes.shape[1]),
        native.Lattices(LATTICE_CODE[lattice], steps, seeds),
        _kept(kept, shares),
        threads(),
    )


def update_values(
    values: Tensor,
    residuals: Tensor,
    products: Tensor,
    kept: Sequence[Tensor],
    codes: Tensor,
    predicted: Tensor,
    rows: Tensor,
    shares: Tensor,
    ends: Tensor,
    steps: Sequence[float],
    seeds: Sequence[int],
    lattice: str,
) -> None:
    """See :func:`commrt.ops.update_values`."""
    native.update_values(
        values.data_ptr(),
        residuals.data_ptr(),
        products.data_ptr(),
        codes.data_ptr(),
        predicted.data_ptr(),
        rows.data_ptr(),
        native.Updates(*rows.shape, codes.shape[1]),
        native.Lattices(LATTICE_CODE[lattice], steps, seeds),
        _groups(ends),
        _kept(kept, shares),
        threads(),
    )


def update_add_(total: Tensor, updates: Tensor, factors: Sequence[float]) -> None:
    """See :func:`commrt.ops.update_add_`."""
    native.update_add(
        total.data_ptr(),
        updates.data_ptr(),
        total.numel(),
        updates.stride(0),
        factors,
        threads(),
    )


KERNELS: tuple[Callable[..., None], ...] = ()
CPU_KERNELS: tuple[Callable[..., None], ...] = (
    update_products,
    update_rows,
    update_codes,
    update_values,
    update_add_,
)
