"""Several federated updates at once: the ops of sources and dither on each; see :mod:`commrt.ops`.

K updates, each with a source ``own`` of its own beside the one, ``previous``, that all share, and a
dither of its own. What comes out for an update is what the ops that are named give, one after the
other; done in one call, an update of a small model takes a tenth of the time.

Small updates are shared out to threads, large ones done by all threads one after the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.checks import check_device, check_matrix, check_vector
from commrt.ops.dither import DIMENSION, MAX_CLASSES, check_dither, check_step
from commrt.ops.sources import NUM_PRODUCTS, SOURCE_DTYPES, check_ends, check_matrices

Own = Sequence[Tensor | None]


def update_products(
    updates: Tensor, previous: Tensor | None, own: Own, ends: Tensor, products: Tensor
) -> None:
    """:func:`commrt.ops.source_products` of each.

    Args:
        updates: fp32 (K, N).
        previous: As there; of all.
        own: As there; K of them.
        ends: As there.
        products: fp64 (K, 6 * G), overwritten; G groups.

    Raises:
        ConfigError: A tensor is not as above.
    """
    count, numel = _check_rows("updates", updates, torch.float32, len(own))
    _check_sources(updates, numel, previous, own)
    check_ends(updates, "updates", ends)
    check_matrix("products", products, torch.float64, count, NUM_PRODUCTS * ends.numel())
    check_device("products", products, "updates", updates)
    torch.ops.commrt.update_products(products, updates, previous, own, ends)


def update_rows(
    previous: Tensor | None,
    own: Own,
    weights: Sequence[float],
    shapes: Sequence[tuple[int, int]],
    previous_weight: float,
    ends: Tensor,
    tables: Sequence[Tensor],
    bases: Sequence[int],
    seeds: Sequence[int],
    predicted: Tensor,
    contexts: Tensor,
    rows: Tensor,
) -> None:
    """:func:`commrt.ops.source_prediction`, ``source_energies`` and ``scale_rows`` of each.

    Where an update has no source its energies are zeros; the phases are those of the integers.

    Args:
        previous: As there; of all.
        own: As there; K of them.
        weights: As there, for each group, of each update; flat: 2 * G * K numbers.
        shapes: As there, of all; N elements.
        previous_weight: As there, of all.
        ends: As there, of all.
        tables: ``rows_of_class`` of each, all with as many classes.
        bases: Of each.
        seeds: Of each dither.
        predicted: fp32 (K, N), overwritten.
        contexts: int16 (K, N), overwritten.
        rows: int16 (K, N), overwritten.

    Raises:
        ConfigError: A tensor or an argument is not as above.

    Cost: scratch of 4 bytes an element for each thread, or for all of a large update.
    """
    count, numel = _check_rows("predicted", predicted, torch.float32, len(own))
    _check_sources(predicted, numel, previous, own)
    for name, matrix in (("contexts", contexts), ("rows", rows)):
        check_matrix(name, matrix, torch.int16, count, numel)
        check_device(name, matrix, "predicted", predicted)
    check_ends(predicted, "predicted", ends)
    if len(weights) != 2 * ends.numel() * count:
        raise ConfigError(f"{len(weights)} weights: must be {2 * ends.numel() * count}")
    check_matrices(shapes, previous_weight, numel, "predicted")
    _check_tables(tables, ends, predicted)
    if not (len(tables) == len(bases) == count):
        raise ConfigError(f"{len(tables)} tables and {len(bases)} bases: must be {count}")
    if not all(0 <= base < 512 for base in bases):
        raise ConfigError(f"bases={list(bases)}: must be in [0, 512)")
    _check_dithers(numel, seeds, "z", count)
    flat = [number for shape in shapes for number in shape]
    torch.ops.commrt.update_rows(
        predicted, contexts, rows, previous, own, weights, flat, previous_weight, ends,
        tables, bases, seeds,
    )  # fmt: skip


def update_codes(
    updates: Tensor,
    predicted: Tensor,
    rows: Tensor,
    shares: Tensor,
    steps: Sequence[float],
    seeds: Sequence[int],
    codes: Tensor,
    kept: Sequence[Tensor],
    *,
    lattice: str = "z",
) -> None:
    """:func:`commrt.ops.dither_quantise` of each, and what is kept of it.

    That is ``dither_dequantise`` of the codes, and ``source_history`` of that.

    Args:
        updates: fp32 (K, P): N elements and as many as fill the last point of the lattice.
        predicted: fp32 (K, P).
        rows: int16 (K, N), at least 0.
        shares: As in ``source_history``; of all.
        steps: Of each quantizer.
        seeds: Of each dither.
        codes: int16 (K, P), overwritten.
        kept: K vectors of bf16, N elements, overwritten; or none.
        lattice: Of all.

    Raises:
        ConfigError: A tensor or an argument is not as above.

    Cost: scratch of 4 bytes an element for each thread, or for all of a large update.
    """
    count, width = _check_rows("codes", codes, torch.int16, len(steps))
    for name, matrix in (("updates", updates), ("predicted", predicted)):
        check_matrix(name, matrix, torch.float32, count, width)
        check_device(name, matrix, "codes", codes)
    _check_rows_of(rows, codes, lattice)
    _check_dithers(width, seeds, lattice, count)
    for step in steps:
        check_step(step)
    _check_kept(kept, shares, rows)
    torch.ops.commrt.update_codes(
        codes, kept, updates, predicted, rows, shares, steps, seeds, lattice
    )


def update_values(
    codes: Tensor,
    predicted: Tensor,
    rows: Tensor,
    shares: Tensor,
    ends: Tensor,
    steps: Sequence[float],
    seeds: Sequence[int],
    values: Tensor,
    residuals: Tensor,
    products: Tensor,
    kept: Sequence[Tensor],
    *,
    lattice: str = "z",
) -> None:
    """:func:`commrt.ops.dither_dequantise` of each, and what the decoder learns of it.

    That is ``values - predicted``; ``source_products`` of the values, with this difference as the
    previous source; and ``source_history``.

    Args:
        codes: int16 (K, P), as of :func:`update_codes`.
        predicted: fp32 (K, N).
        rows: int16 (K, N), at least 0.
        shares: As in ``source_history``; of all.
        ends: Of the G groups.
        steps: Of each quantizer.
        seeds: Of each dither.
        values: fp32 (K, N), overwritten.
        residuals: fp32 (K, N), overwritten with the differences.
        products: fp64 (K, 6 * G), overwritten.
        kept: K vectors of bf16, N elements, overwritten; or none.
        lattice: Of all.

    Raises:
        ConfigError: A tensor or an argument is not as above.
    """
    count, _ = _check_rows("codes", codes, torch.int16, len(steps))
    numel = _check_rows_of(rows, codes, lattice)
    for name, matrix in (("predicted", predicted), ("values", values), ("residuals", residuals)):
        check_matrix(name, matrix, torch.float32, count, numel)
        check_device(name, matrix, "codes", codes)
    check_ends(codes, "codes", ends)
    check_matrix("products", products, torch.float64, count, NUM_PRODUCTS * ends.numel())
    check_device("products", products, "codes", codes)
    _check_dithers(codes.shape[1], seeds, lattice, count)
    for step in steps:
        check_step(step)
    _check_kept(kept, shares, rows)
    torch.ops.commrt.update_values(
        values, residuals, products, kept, codes, predicted, rows, shares, ends,
        steps, seeds, lattice,
    )  # fmt: skip


def update_add_(total: Tensor, updates: Tensor, factors: Sequence[float]) -> None:
    """Add ``round(factors[k] * updates[k])`` of each to whole numbers, which no order changes.

    Args:
        total: fp64, N whole numbers, updated in place. Exact as long as none exceeds 2**53.
        updates: fp32 (K, N).
        factors: K of them. No product is larger than 2**51.

    Raises:
        ConfigError: A tensor is not as above, or there are not as many factors as updates.

    Cost: reads 4 bytes an element of each update, reads and writes 8 of the total.
    """
    check_vector("total", total, torch.float64)
    check_matrix("updates", updates, torch.float32, len(factors), total.numel())
    check_device("updates", updates, "total", total)
    torch.ops.commrt.update_add_(total, updates, factors)


def _check_rows(name: str, matrix: Tensor, dtype: torch.dtype, count: int) -> tuple[int, int]:
    """Its rows and columns."""
    check_matrix(name, matrix, dtype, count)
    return count, matrix.shape[1]


def _check_rows_of(rows: Tensor, codes: Tensor, lattice: str) -> int:
    """The elements of an update, of which there are as many codes but for the last point."""
    _, numel = _check_rows("rows", rows, torch.int16, codes.shape[0])
    check_device("rows", rows, "codes", codes)
    width = numel + -numel % DIMENSION.get(lattice, 1)
    if codes.shape[1] != width:
        raise ConfigError(f"codes has {codes.shape[1]} columns: must have {width}")
    return numel


def _check_sources(first: Tensor, numel: int, previous: Tensor | None, own: Own) -> None:
    for name, source in (("previous", previous), *(("own", each) for each in own)):
        if source is None:
            continue
        check_vector(name, source, *SOURCE_DTYPES)
        if source.numel() != numel:
            raise ConfigError(f"{name} has {source.numel()} elements: must have {numel}")
        check_device(name, source, "the first", first)


def _check_dithers(width: int, seeds: Sequence[int], lattice: str, count: int) -> None:
    if len(seeds) != count:
        raise ConfigError(f"{len(seeds)} seeds: must be {count}")
    for seed in seeds:
        check_dither(width, seed, 0, lattice)


def _check_tables(tables: Sequence[Tensor], ends: Tensor, first: Tensor) -> None:
    seen: Tensor | None = None
    for table in tables:
        if table is seen:
            continue
        check_matrix("tables", table, torch.int16, ends.numel())
        check_device("tables", table, "predicted", first)
        if not 1 <= table.shape[1] <= MAX_CLASSES or table.shape[1] != tables[0].shape[1]:
            raise ConfigError(
                f"tables have {table.shape[1]} and {tables[0].shape[1]} classes: must all have as "
                f"many, 1 to {MAX_CLASSES}"
            )
        seen = table


def _check_kept(kept: Sequence[Tensor], shares: Tensor, rows: Tensor) -> None:
    check_vector("shares", shares, torch.float32)
    check_device("shares", shares, "rows", rows)
    if shares.numel().bit_count() != 1:
        raise ConfigError(f"shares has {shares.numel()} elements: must have a power of two")
    if kept and len(kept) != rows.shape[0]:
        raise ConfigError(f"{len(kept)} to keep: must be {rows.shape[0]}, or none")
    for each in kept:
        check_vector("kept", each, torch.bfloat16)
        if each.numel() != rows.shape[1]:
            raise ConfigError(f"kept has {each.numel()} elements: must have {rows.shape[1]}")
        check_device("kept", each, "rows", rows)
