"""What both ends of a federated update work out from the vectors they share; see :mod:`commrt.ops`.

A source is a vector that the encoder and the decoder of an update both have to the bit, such as the
update before: an update is predicted from its sources, and how far the prediction is off is guessed
from them. Both ends must come to the same bits, so every addition and multiplication is rounded on
its own, and what is summed over many elements is integers.

There are at most two sources here, ``previous`` and ``own``: flat, of N finite elements, fp32 or
bf16; None is one of zeros. They are worked on in groups, as in :func:`commrt.ops.scale_rows`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.arrays import takes_arrays
from commrt.ops.checks import check_device, check_like, check_matrix, check_vector

SOURCE_DTYPES = (torch.float32, torch.bfloat16)
# Energies are summed in so many bits, so that 2**29 of them fit an integer.
ENERGY_BITS = 34
# Of an element: what the least leaves out, some machines take for zero.
LEAST_ENERGY, MOST_ENERGY = 2.0**-100, 2.0**100
# So that a client whose updates grow and grow comes to an end.
MOST_PREDICTED = 2.0**64
# Sums that a group's inner products are made of.
PRODUCT_LANES = 16
NUM_PRODUCTS = 6


@takes_arrays("energies")
def source_energies(
    previous: Tensor | None,
    own: Tensor | None,
    previous_weight: float,
    shapes: Sequence[tuple[int, int]],
    energies: Tensor,
) -> None:
    """Write how large each element's error is likely to be, squared and up to a factor.

    The energy of what there is at the element itself, v = own**2 + previous_weight * previous**2
    within ``LEAST_ENERGY`` and ``MOST_ENERGY``, and as much again of what the rows and columns of
    its matrix would have there if they were independent: the product of their sums over the sum of
    all. With one row or one column that is v itself.

    Sums are of integers: of v in units of 2**(e - 34), rounded down, where the largest v of the
    matrix is below 2**e, from half of that on. The row's share of all, as fp64 and in that unit, is
    rounded to fp32, and so is the column's sum; then their product, and the sum with v.

    Args:
        previous: A source.
        own: A source.
        previous_weight: At least 0; rounded to fp32.
        shapes: Rows and columns of the matrices that the N elements are, one after the other.
        energies: fp32, N elements, overwritten.

    Raises:
        ConfigError: A tensor or an argument is not as above.

    Cost: reads the sources, writes 4 bytes an element, and goes over these again twice. Scratch of
    8 bytes for each row of a matrix and 12 for each column. Matrices are shared out to threads.
    """
    check_vector("energies", energies, torch.float32)
    _check_sources(energies, "energies", previous, own)
    check_matrices(shapes, previous_weight, energies.numel(), "energies")
    places = [number for shape in shapes for number in shape]
    torch.ops.commrt.source_energies(energies, previous, own, previous_weight, places)


@takes_arrays("predicted")
def source_prediction(
    previous: Tensor | None,
    own: Tensor | None,
    weights: Sequence[tuple[float, float]],
    ends: Tensor,
    predicted: Tensor,
) -> None:
    """Write ``weights[g][0] * previous + weights[g][1] * own``, with the weights of each group g.

    Each product and the sum is rounded to fp32; within ``MOST_PREDICTED``, and never minus zero.

    Args:
        previous: A source.
        own: A source.
        weights: Of each of the G groups; rounded to fp32.
        ends: int64, G elements: see :func:`commrt.ops.scale_rows`.
        predicted: fp32, N elements, overwritten.

    Raises:
        ConfigError: A tensor is not as above, or there are not as many weights as groups.

    Cost: reads the sources, writes 4 bytes an element.
    """
    check_vector("predicted", predicted, torch.float32)
    _check_sources(predicted, "predicted", previous, own)
    check_ends(predicted, "predicted", ends)
    if len(weights) != ends.numel():
        raise ConfigError(f"weights of {len(weights)} groups: must be of {ends.numel()}")
    flat = [weight for pair in weights for weight in pair]
    torch.ops.commrt.source_prediction(predicted, previous, own, flat, ends)


@takes_arrays("products")
def source_products(
    update: Tensor, previous: Tensor | None, own: Tensor | None, ends: Tensor, products: Tensor
) -> None:
    """Write the inner products of each group: what least squares need.

    In fp64. Element i of a group is added to sum i % 16; sum k then to sum k + 8, these to those
    four, two and one apart.

    Args:
        update: fp32, N elements, finite.
        previous: A source.
        own: A source.
        ends: int64, G elements: see :func:`commrt.ops.scale_rows`.
        products: fp64 (G, 6), overwritten: previous * previous, previous * own, own * own,
            previous * update, own * update, update * update.

    Raises:
        ConfigError: A tensor is not as above.

    Cost: reads the update and the sources. Groups are shared out to threads.
    """
    check_vector("update", update, torch.float32)
    _check_sources(update, "update", previous, own)
    check_ends(update, "update", ends)
    check_matrix("products", products, torch.float64, ends.numel(), NUM_PRODUCTS)
    check_device("products", products, "update", update)
    torch.ops.commrt.source_products(products, update, previous, own, ends)


@takes_arrays("kept")
def source_history(
    decoded: Tensor, predicted: Tensor, rows: Tensor, shares: Tensor, kept: Tensor
) -> None:
    """Write ``predicted + share * (decoded - predicted)``, the source that an update becomes.

    Each operation is rounded to fp32, the last one to bf16 after that. The share is what of the
    difference is signal and not the quantizer's noise: ``shares[row // 16 % S]`` for an element of
    that row.

    Args:
        decoded: fp32, N elements.
        predicted: fp32, N elements.
        rows: int16, N elements, at least 0: those of :func:`commrt.ops.scale_rows`.
        shares: fp32, S elements, a power of two: see above.
        kept: bf16, N elements, overwritten.

    Raises:
        ConfigError: A tensor is not as above.

    Cost: reads 10 bytes an element, writes 2.
    """
    check_vector("kept", kept, torch.bfloat16)
    check_like(
        kept,
        "kept",
        decoded=(decoded, torch.float32),
        predicted=(predicted, torch.float32),
        rows=(rows, torch.int16),
    )
    check_vector("shares", shares, torch.float32)
    check_device("shares", shares, "kept", kept)
    if shares.numel().bit_count() != 1:
        raise ConfigError(f"shares has {shares.numel()} elements: must have a power of two")
    torch.ops.commrt.source_history(kept, decoded, predicted, rows, shares)


def _check_sources(first: Tensor, of: str, previous: Tensor | None, own: Tensor | None) -> None:
    for name, source in (("previous", previous), ("own", own)):
        if source is not None and source.dtype not in SOURCE_DTYPES:
            raise ConfigError(f"{name} is {source.dtype}: must be one of {SOURCE_DTYPES}")
    check_like(
        first,
        of,
        previous=(previous, torch.float32 if previous is None else previous.dtype),
        own=(own, torch.float32 if own is None else own.dtype),
    )


def check_matrices(
    shapes: Sequence[tuple[int, int]], previous_weight: float, numel: int, of: str
) -> None:
    """That energies can be worked out of these, for as many elements as ``of`` has."""
    if not 0 <= previous_weight <= torch.finfo(torch.float32).max:
        raise ConfigError(f"previous_weight={previous_weight!r}: must be in [0, 3.4e38]")
    if any(min(shape) < 0 for shape in shapes):
        raise ConfigError(f"shapes={shapes!r}: must have no negative number")
    if sum(rows * cols for rows, cols in shapes) != numel:
        raise ConfigError(f"shapes={shapes!r}: must have {numel} elements, as {of}")


def check_ends(first: Tensor, of: str, ends: Tensor) -> None:
    """That there is an end for each of some groups, where the first tensor is."""
    check_vector("ends", ends, torch.int64)
    check_device("ends", ends, of, first)
    if ends.numel() < 1:
        raise ConfigError("ends has no elements: must have one for each group")
