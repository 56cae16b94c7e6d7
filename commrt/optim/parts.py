"""What a rank has of a tensor, with gradient and state, as the operators take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commrt.ops import StepTensor
from commrt.optim.sections import Layout
from commrt.optim.shards import Piece

State = dict[str, Any]


def flat(value: Tensor) -> Tensor:
    """What this rank has of a state, as a view of one dimension."""
    return (value.to_local() if isinstance(value, DTensor) else value).view(-1)


class Part:
    """A tensor's weights, gradient and state on this rank.

    Args:
        layout: Of the tensor.
        parameter: That it is, or is in; with a gradient.
        state: Of the tensor.
        step: Number of the step, from 1.
        stochastic: Whether the first moment is rounded stochastically, if it has 8 bits.
        seed: Of the random numbers.
    """

    def __init__(
        self,
        layout: Layout,
        parameter: nn.Parameter,
        state: Mapping[str, Any],
        *,
        step: int,
        stochastic: bool,
        seed: int,
    ) -> None:
        assert parameter.grad is not None
        self.layout, self.step = layout, step
        self.grad = layout.shard.local(parameter.grad).contiguous().view(-1)
        self._weights = layout.shard.local(parameter)
        self._stepped = self._weights.contiguous()
        self._state = {name: flat(value) for name, value in state.items() if name != "step"}
        self._extra = self._state.get("master", self._state.get("weight_residual"))
        self._stochastic, self._seed = stochastic, seed

    def state(self, name: str) -> Tensor:
        """Flat."""
        return self._state[name]

    def tensor(self, piece: Piece, moments: Sequence[str], **rule: Any) -> StepTensor:
        """Rows of it.

        Args:
            piece: Which.
            moments: Names of their states.
            **rule: What else the rule needs.
        """

        def part(value: Tensor) -> Tensor:
            return value[piece.start : piece.start + piece.rows * piece.cols]

        scales = [
            self._state[f"{name}_scale"] for name in moments if f"{name}_scale" in self._state
        ]
        segments = slice(piece.segment, piece.segment + piece.rows * piece.segments_per_row)
        cols = self.layout.blocks.cols
        is_line = self.layout.blocks.axis == "element"
        return StepTensor(
            weights=part(self._stepped.view(-1)),
            grad=part(self.grad),
            moments=tuple(part(self._state[name]) for name in moments),
            rows=1 if is_line else piece.rows,
            cols=piece.rows if is_line else piece.cols,
            scales=tuple(scale[segments] for scale in scales),
            extra=None if self._extra is None else part(self._extra),
            stochastic=self._stochastic,
            seed=self._seed,
            first_index=piece.row * cols + piece.col,
            index_stride=cols,
            **rule,
        )

    def tensors(self, moments: Sequence[str], **rule: Any) -> Iterator[StepTensor]:
        """All of its rows."""
        for piece in self.layout.pieces:
            yield self.tensor(piece, moments, **rule)

    def write_back(self) -> None:
        """What is not contiguous was stepped as a copy."""
        if self._stepped.data_ptr() != self._weights.data_ptr():
            self._weights.copy_(self._stepped)


def zeros(layout: Layout, dtype: torch.dtype, name: str, device: torch.device) -> State:
    """A moment, with its scales if it has 8 bits."""
    state = {name: layout.shard.elements(dtype, device)}
    if dtype == torch.int8:
        state[f"{name}_scale"] = layout.shard.scales(layout.blocks, device)
    return state
