"""What both ends know before an update is coded; :mod:`commrt.ops.sources` tells what it is.

Shapes: R rows and C columns of a matrix, L lanes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from commrt.ops.dither import PHASES
from commrt.ops.reference.dither import groups_of
from commrt.ops.sources import (
    ENERGY_BITS,
    LEAST_ENERGY,
    MOST_ENERGY,
    MOST_PREDICTED,
    PRODUCT_LANES,
)


def source_energies(
    energies: Tensor,
    previous: Tensor | None,
    own: Tensor | None,
    previous_weight: float,
    shapes: Sequence[int],
) -> None:
    """See :func:`commrt.ops.source_energies`."""
    theirs, mine = _values(previous, energies), _values(own, energies)
    weight = torch.tensor(previous_weight, dtype=torch.float32)
    energies.copy_(mine * mine + weight * (theirs * theirs)).clamp_(LEAST_ENERGY, MOST_ENERGY)
    begin = 0
    for rows, cols in zip(shapes[0::2], shapes[1::2], strict=True):
        part = energies[begin : begin + rows * cols]
        if rows > 1 and cols > 1:
            part += _spread(part.view(rows, cols)).view(-1)
        else:
            part *= 2
        begin += rows * cols


def _spread(energy_RC: Tensor) -> Tensor:
    """The product of each row's and each column's share, with the sum of ``energy``."""
    largest = energy_RC.amax().double()
    unit = torch.ldexp(torch.ones_like(largest), ENERGY_BITS - torch.frexp(largest).exponent)
    whole_RC = (energy_RC.double() * unit).to(torch.int64)
    row_R1, col_1C = whole_RC.sum(dim=1, keepdim=True), whole_RC.sum(dim=0, keepdim=True)
    total = row_R1.sum().clamp(min=1)
    return (row_R1.double() / total.double() / unit).float() * col_1C.float()


def source_prediction(
    predicted: Tensor,
    previous: Tensor | None,
    own: Tensor | None,
    weights: Sequence[float],
    ends: Tensor,
) -> None:
    """See :func:`commrt.ops.source_prediction`."""
    weights_G2 = torch.tensor(weights, dtype=torch.float32, device=predicted.device).view(-1, 2)
    weights_N2 = weights_G2[groups_of(predicted, ends)]
    total = torch.zeros_like(predicted)
    for index, source in enumerate((previous, own)):
        total = total + weights_N2[:, index] * _values(source, predicted)
    predicted.copy_(total.clamp(-MOST_PREDICTED, MOST_PREDICTED))


def source_products(
    products: Tensor, update: Tensor, previous: Tensor | None, own: Tensor | None, ends: Tensor
) -> None:
    """See :func:`commrt.ops.source_products`."""
    theirs, mine = _values(previous, update), _values(own, update)
    pairs = ((theirs, theirs), (theirs, mine), (mine, mine),
             (theirs, update), (mine, update), (update, update))  # fmt: skip
    group = groups_of(update, ends)
    for row, output in enumerate(products):
        for column, pair in enumerate(pairs):
            x, y = (vector[group == row].double() for vector in pair)
            output[column] = _sum(x * y)


def _sum(values: Tensor) -> Tensor:
    """Of every sixteenth one after the other, then of neighbours eight, four, two and one apart."""
    padding = values.new_zeros(-values.numel() % PRODUCT_LANES)
    total_L = values.new_zeros(PRODUCT_LANES)
    for value_L in torch.cat((values, padding)).view(-1, PRODUCT_LANES):
        total_L = total_L + value_L
    while total_L.numel() > 1:
        half = total_L.numel() // 2
        total_L = total_L[:half] + total_L[half:]
    return total_L[0]


def source_history(
    kept: Tensor, decoded: Tensor, predicted: Tensor, rows: Tensor, shares: Tensor
) -> None:
    """See :func:`commrt.ops.source_history`."""
    share = shares[(rows.long() // PHASES) % shares.numel()]
    kept.copy_((decoded - predicted) * share + predicted)


def _values(source: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros(like.shape, device=like.device) if source is None else source.float()
