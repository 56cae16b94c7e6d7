"""Joint decoding of a group: each client's cosets by what the others' residuals say of its own."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from commrt import ops
from commrt.federated.covariance import side_information
from commrt.federated.gaussian import Array, factored
from commrt.federated.layout import Group
from commrt.federated.mbtc.coding import Coding
from commrt.federated.mbtc.planes import Blocks


class JointGroup:
    """The residuals of a group, as far as they are decoded; of its whole blocks.

    Args:
        group: Which elements.
        block: Elements in a block.
        covariance: Of the residuals of the K clients asked, by their places.
    """

    def __init__(self, group: Group, block: int, covariance: Array) -> None:
        self._group, self._block, self._model = group, block, factored(covariance)
        count, clients = group.numel // block, len(self._model.unique)
        self._residuals = torch.zeros(clients, count * block)
        self._has = np.zeros((clients, count), dtype=bool)
        self._noise = np.full(clients, np.inf)

    def add(self, place: int, how: Coding, codes: Tensor, which: Sequence[int]) -> None:
        """Take blocks of a client's codes (B, N), which are right."""
        self._noise[place] = how.noise
        for index in which:
            part = self._part(index)
            decoded = torch.empty(self._block)
            predicted = how.predicted[part]
            ops.dither_dequantise(
                codes[index], predicted, decoded, how.step, how.seed, first_index=part.start
            )
            columns = slice(index * self._block, (index + 1) * self._block)
            torch.sub(decoded, predicted, out=self._residuals[place, columns])
            self._has[place, index] = True

    def add_alone(self, place: int, how: Coding, codes: Tensor) -> None:
        """Take the codes (N,) of a client that sent them as they are."""
        count = self._has.shape[1]
        end = self._group.begin + count * self._block
        self.add(place, how, codes[self._group.begin : end].view(count, -1), range(count))

    def decide(self, place: int, how: Coding, blocks: Blocks) -> None:
        """Decide what can be of a client's blocks."""
        pending = (~blocks.is_whole).nonzero()[:, 0].tolist()
        by_others: dict[bytes, list[int]] = {}
        for index in pending:
            by_others.setdefault(self._has[:, index].tobytes(), []).append(index)
        for key, which in by_others.items():
            others = np.frombuffer(key, dtype=bool).nonzero()[0].tolist()
            told, variance = side_information(self._model, self._noise, place, others)
            weights = torch.from_numpy(told).float()
            position = torch.stack([self._position(index, how, weights) for index in which])
            blocks.decide(which, position, math.sqrt(variance) / how.step)
        self.add(place, how, blocks.codes, [each for each in pending if blocks.is_whole[each]])

    def _part(self, index: int) -> slice:
        begin = self._group.begin + index * self._block
        return slice(begin, begin + self._block)

    def _position(self, index: int, how: Coding, weights: Tensor) -> Tensor:
        """Where the codes of a block are likely to be: the estimate in steps, with the dither."""
        estimate, undithered = torch.empty(self._block), torch.empty(self._block)
        columns = slice(index * self._block, (index + 1) * self._block)
        ops.lmmse_combine(self._residuals[:, columns], weights, estimate)
        zeros = torch.zeros(self._block, dtype=torch.int16)
        first = self._part(index).start
        ops.dither_dequantise(zeros, None, undithered, 1.0, how.seed, first_index=first)
        return estimate.mul_(1 / how.step).sub_(undithered)
