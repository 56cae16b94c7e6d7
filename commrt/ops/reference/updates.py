"""Several updates, one after the other; :mod:`commrt.ops.updates` tells what of each.

Shapes: K updates of N elements, P with what fills the last point of the lattice, G groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from commrt.ops.reference.dither import dither_dequantise, dither_quantise, scale_rows
from commrt.ops.reference.sources import (
    source_energies,
    source_history,
    source_prediction,
    source_products,
)
from commrt.ops.sources import NUM_PRODUCTS

Own = Sequence[Tensor | None]


def update_products(
    products: Tensor, updates: Tensor, previous: Tensor | None, own: Own, ends: Tensor
) -> None:
    """See :func:`commrt.ops.update_products`."""
    for row, update, each in zip(products, updates, own, strict=True):
        source_products(row.view(-1, NUM_PRODUCTS), update, previous, each, ends)


def update_rows(
    predicted: Tensor,
    contexts: Tensor,
    rows: Tensor,
    previous: Tensor | None,
    own: Own,
    weights: Sequence[float],
    shapes: Sequence[int],
    previous_weight: float,
    ends: Tensor,
    tables: Sequence[Tensor],
    bases: Sequence[int],
    seeds: Sequence[int],
) -> None:
    """See :func:`commrt.ops.update_rows`."""
    each = 2 * ends.numel()
    for k, table in enumerate(tables):
        of_groups = weights[k * each : (k + 1) * each]
        source_prediction(predicted[k], previous, own[k], of_groups, ends)
        energies = torch.zeros_like(predicted[k])
        if previous is not None or own[k] is not None:
            source_energies(energies, previous, own[k], previous_weight, shapes)
        scale_rows(rows[k], contexts[k], energies, table, ends, bases[k], seeds[k], 0, "z")


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
    numel = rows.shape[1]
    for k, (step, seed) in enumerate(zip(steps, seeds, strict=True)):
        dither_quantise(updates[k], predicted[k], codes[k], step, seed, 0, lattice)
        if kept:
            decoded_P = torch.empty_like(predicted[k])
            dither_dequantise(codes[k], predicted[k], decoded_P, step, seed, 0, lattice)
            source_history(kept[k], decoded_P[:numel], predicted[k, :numel], rows[k], shares)


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
    numel = rows.shape[1]
    for k, (step, seed) in enumerate(zip(steps, seeds, strict=True)):
        predicted_P = torch.nn.functional.pad(predicted[k], (0, codes.shape[1] - numel))
        decoded_P = torch.empty_like(predicted_P)
        dither_dequantise(codes[k], predicted_P, decoded_P, step, seed, 0, lattice)
        values[k] = decoded_P[:numel]
        residuals[k] = values[k] - predicted[k]
        source_products(products[k].view(-1, NUM_PRODUCTS), values[k], residuals[k], None, ends)
        if kept:
            source_history(kept[k], values[k], predicted[k], rows[k], shares)


def update_add_(total: Tensor, updates: Tensor, factors: Sequence[float]) -> None:
    """See :func:`commrt.ops.update_add_`."""
    for update, factor in zip(updates, factors, strict=True):
        total += (update.double() * factor).round()
