"""Joint decoding of a group: each client's cosets by what the others' residuals say of its own."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from commrt import ops
from commrt.federated.covariance import side_information
from commrt.federated.gaussian import Array, factored
from commrt.federated.layout import Group
from commrt.federated.mbtc.planes import Blocks

if TYPE_CHECKING:
    from commrt.federated.mbtc.received import Received


class Piece(NamedTuple):
    """Of an update, what some blocks of a group are decoded with.

    Attributes:
        step: Of the quantizer.
        noise: Variance of its error.
        seed: Of the dither.
        flat: fp32, the blocks' elements: what was predicted, or, of codes that were sent as they
            are, the residuals.
        blocks: The cosets; None of codes that were sent as they are.
    """

    step: float
    noise: float
    seed: int
    flat: Tensor
    blocks: Blocks | None


def piece_of(update: "Received", index: int, elements: Group, which: range) -> Piece:
    """What blocks of group ``index``, which have these elements, are decoded with."""
    how, blocks = update.how, update.blocks.get(index)
    predicted = elements.of(how.predicted)
    if blocks is not None:
        return Piece(how.step, how.noise, how.seed, predicted, blocks.part(which))
    decoded, codes = torch.empty(elements.numel), elements.of(update.codes)
    ops.dither_dequantise(codes, predicted, decoded, how.step, how.seed, first_index=elements.begin)
    return Piece(how.step, how.noise, how.seed, decoded.sub_(predicted), None)


class JointGroup:
    """The residuals of some blocks of a group, as far as they are decoded.

    Args:
        elements: Those of the blocks.
        block: Elements in a block.
        covariance: Of the residuals of the K clients asked, by their places.
        order: Places, the first to be decoded first.

    Attributes:
        pieces: Of the updates that came, by place, until they are of no more use.
        failed: Blocks that could not be decided when they were first tried.
    """

    def __init__(
        self, elements: Group, block: int, covariance: Array, order: Sequence[int]
    ) -> None:
        self._first, self._block, self._order = elements.begin, block, order
        self._model = factored(covariance)
        clients, count = len(self._model.unique), elements.numel // block
        self._residuals = torch.zeros(clients, count * block)
        self._has = np.zeros((clients, count), dtype=bool)
        self._noise = np.full(clients, np.inf)
        self._tried = set[int]()
        self.pieces: dict[int, Piece] = {}
        self.failed = 0

    def decode(self) -> dict[int, list[int]]:
        """Decide what can be of the updates that came; which blocks of each cosets now are."""
        decided = {}
        for place in self._order:
            piece = self.pieces.get(place)
            if piece is None:
                continue
            if piece.blocks is None:
                self._add_alone(place, self.pieces.pop(place))
                continue
            decided[place] = self._decide(place, piece, piece.blocks)
            if place not in self._tried:
                self._tried.add(place)
                self.failed += int((~piece.blocks.is_whole).sum())
        return decided

    def _add_alone(self, place: int, piece: Piece) -> None:
        self._noise[place], self._has[place] = piece.noise, True
        self._residuals[place] = piece.flat

    def _decide(self, place: int, piece: Piece, blocks: Blocks) -> list[int]:
        """Decide what can be of a client's blocks."""
        pending = (~blocks.is_whole).nonzero()[:, 0].tolist()
        by_others: dict[bytes, list[int]] = {}
        for index in pending:
            by_others.setdefault(self._has[:, index].tobytes(), []).append(index)
        for key, which in by_others.items():
            others = np.frombuffer(key, dtype=bool).nonzero()[0].tolist()
            told, variance = side_information(self._model, self._noise, place, others)
            weights = torch.from_numpy(told).float()
            position = torch.stack([self._position(index, piece, weights) for index in which])
            blocks.decide(which, position, math.sqrt(variance) / piece.step)
        decided = [each for each in pending if blocks.is_whole[each]]
        self._noise[place] = piece.noise
        for index in decided:
            self._add(place, index, piece, blocks.codes[index])
        return decided

    def _add(self, place: int, index: int, piece: Piece, codes: Tensor) -> None:
        """Take a block of a client's codes (N,), which are right."""
        columns = self._columns(index)
        decoded, predicted = torch.empty(self._block), piece.flat[columns]
        first = self._first + columns.start
        ops.dither_dequantise(codes, predicted, decoded, piece.step, piece.seed, first_index=first)
        torch.sub(decoded, predicted, out=self._residuals[place, columns])
        self._has[place, index] = True

    def _columns(self, index: int) -> slice:
        return slice(index * self._block, (index + 1) * self._block)

    def _position(self, index: int, piece: Piece, weights: Tensor) -> Tensor:
        """Where the codes of a block are likely to be: the estimate in steps, with the dither."""
        estimate, undithered = torch.empty(self._block), torch.empty(self._block)
        columns = self._columns(index)
        ops.lmmse_combine(self._residuals[:, columns], weights, estimate)
        zeros = torch.zeros(self._block, dtype=torch.int16)
        first = self._first + columns.start
        ops.dither_dequantise(zeros, None, undithered, 1.0, piece.seed, first_index=first)
        return estimate.mul_(1 / piece.step).sub_(undithered)
