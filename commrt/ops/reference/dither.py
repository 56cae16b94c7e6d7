"""Subtractive dither, rows of tables and linear combination; :mod:`commrt.ops.dither` tells them.

Shapes: N elements, B points of E8, 8 coordinates a point.
"""

import torch
from torch import Tensor

from commrt.ops.dither import NAN_CODE, PHASES
from commrt.ops.reference.blocks import philox

STREAM_DITHER = 4
MAX_CODE = 32767
# The largest coordinate whose nearest point has codes of 16 bits, whatever else is in the block.
MAX_E8 = 16382


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
    difference = values if predicted is None else values - predicted
    inverse_step = 1.0 / torch.tensor(step, dtype=torch.float32)
    dithered = difference * inverse_step + _dither(codes, seed, first_index, lattice)
    if lattice == "z":
        nearest = dithered.clamp(-MAX_CODE, MAX_CODE).round()
    else:
        nearest = nearest_e8(dithered.clamp(-MAX_E8, MAX_E8).view(-1, 8)).view(-1)
    codes.copy_(torch.where(nearest.isnan(), NAN_CODE, nearest))


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
    point = codes.float() if lattice == "z" else codes.float() * 0.5
    offset = point - _dither(codes, seed, first_index, lattice)
    start = torch.zeros_like(values) if predicted is None else predicted
    decoded = fma(torch.tensor(step, dtype=torch.float32), offset, start)
    values.copy_(torch.where(codes == NAN_CODE, torch.nan, decoded))


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
    energy = torch.zeros(rows.numel(), device=rows.device) if energies is None else energies
    half_octave = (energy.view(torch.int32) & 0x7FFFFFFF) >> 22  # a NaN may have a sign
    index = (half_octave - base).clamp(0, rows_of_class.shape[1] - 1)
    phase = _phase(rows, seed, first_index, lattice)
    rows.copy_(rows_of_class[groups_of(rows, ends), index] + phase)
    if contexts is not None:
        contexts.copy_(PHASES * index + phase)


def lmmse_combine(stack: Tensor, weights: Tensor, out: Tensor) -> None:
    """See :func:`commrt.ops.lmmse_combine`."""
    total = torch.zeros_like(out)
    for weight, row in zip(weights, stack, strict=True):
        total = fma(weight, row, total)
    out.copy_(total)


def nearest_e8(x_B8: Tensor) -> Tensor:
    """Twice the point of E8 that is nearest to each row of eight fp32 coordinates.

    By Conway and Sloane (1982): the nearest point of D8, whose sums are even, and the nearest one
    of D8 moved by 1/2, of which the nearer one is taken. Either is found by rounding each
    coordinate; if that makes the sum odd, the one that was rounded the furthest goes to its other
    side.

    With d the distance of a coordinate to the integer nearest to it (the even one of two), the one
    to the nearest half is 1/2 - d, on the side of the coordinate itself. So rounding to halves
    costs 1/4 - d more in squared distance, going to the other side 1 - 2 d more for integers and
    2 d more for halves. Of coordinates that are as far, the first one goes to its other side; a
    coordinate that is an integer counts as rounded down; of two points that are as near, the one
    of integers is taken. Sums are of fp32, of neighbours first. NaN in one coordinate is NaN in
    all of them.
    """
    integer_B8 = x_B8.round()
    offset_B8 = x_B8 - integer_B8
    distance_B8 = offset_B8.abs()
    side_B8 = torch.where(offset_B8 < 0, -1.0, 1.0)
    saved_B = _sum_pairwise(distance_B8 - 0.25)
    furthest_B1 = distance_B8.argmax(dim=1, keepdim=True)
    nearest_B1 = distance_B8.argmin(dim=1, keepdim=True)
    sum_B = integer_B8.sum(dim=1)
    is_odd_B = sum_B.remainder(2) == 1
    is_odd_half_B = (sum_B - (side_B8 < 0).sum(dim=1)).remainder(2) == 1

    most_B = distance_B8.gather(1, furthest_B1)[:, 0]
    least_B = distance_B8.gather(1, nearest_B1)[:, 0]
    cost_B = torch.where(is_odd_B, 1.0 - 2.0 * most_B, 0.0)
    half_cost_B = torch.where(is_odd_half_B, 2.0 * least_B, 0.0) - saved_B

    place = torch.arange(8, device=x_B8.device)
    is_moved_B8 = is_odd_B[:, None] & (place == furthest_B1)
    is_moved_half_B8 = is_odd_half_B[:, None] & (place == nearest_B1)
    integers_B8 = 2.0 * integer_B8 + torch.where(is_moved_B8, 2.0 * side_B8, 0.0)
    halves_B8 = 2.0 * integer_B8 + torch.where(is_moved_half_B8, -side_B8, side_B8)
    twice_B8 = torch.where((half_cost_B < cost_B)[:, None], halves_B8, integers_B8)
    return torch.where(x_B8.isnan().any(dim=1, keepdim=True), torch.nan, twice_B8)


def _sum_pairwise(x_B8: Tensor) -> Tensor:
    while x_B8.shape[1] > 1:
        x_B8 = x_B8[:, 0::2] + x_B8[:, 1::2]
    return x_B8[:, 0]


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The fp32 numbers a * b + c, rounded once.

    In fp64 the product is exact. The sum is rounded to odd, which keeps what the second rounding,
    to fp32, has to know of the rest (Boldo and Melquiond, "Emulation of a FMA and correctly rounded
    sums: proved algorithms using rounding to odd", IEEE Trans. Comput. 57(4), 2008).
    """
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + addend
    taken = total - product
    rest = (product - (total - taken)) + (addend - taken)
    bits = total.view(torch.int64)
    is_rounded = total.isfinite() & (rest != 0) & (bits % 2 == 0)
    away = torch.where((rest > 0) == (total > 0), 1, -1)
    return torch.where(is_rounded, bits + away, bits).view(torch.float64).float()


def groups_of(like: Tensor, ends: Tensor) -> Tensor:
    """Of each element the group that it is of, int64."""
    places = torch.arange(like.numel(), device=like.device)
    return torch.searchsorted(ends, places, right=True).clamp(max=ends.numel() - 1)


def _dither(like: Tensor, seed: int, first_index: int, lattice: str) -> Tensor:
    """Of as many elements as ``like`` has: exact, in units of the cell."""
    uniform = _uniform(like, seed, first_index)
    if lattice == "z":
        return uniform - 0.5
    in_cube_B8 = 2.0 * uniform.view(-1, 8)
    return (in_cube_B8 - 0.5 * nearest_e8(in_cube_B8)).view(-1)


def _phase(like: Tensor, seed: int, first_index: int, lattice: str) -> Tensor:
    dither = _dither(like, seed, first_index, lattice)
    scaled = 16.0 * (dither + 0.5) if lattice == "z" else 8.0 * (dither + 1.0)
    return scaled.floor().clamp(max=PHASES - 1).to(torch.int16)


def _uniform(like: Tensor, seed: int, first_index: int) -> Tensor:
    """On [0, 1), for elements first_index, first_index + 1, ..."""
    end = first_index + like.numel()
    counter = torch.arange(first_index // 4, -(-end // 4), device=like.device)
    words = philox(seed, STREAM_DITHER, counter).view(-1)[first_index % 4 :][: like.numel()]
    return (words >> 8).float() * 2.0**-24
