"""What a rank has of a tensor, with gradient and state, as the operators take it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from commrt.errors import ConfigError
from commrt.ops import StepTensor
from commrt.ops.format import FLOAT_DTYPES
from commrt.optim.sections import Layout
from commrt.optim.shards import Piece

State = dict[str, Any]


def flat(value: Tensor) -> Tensor:
    """What this rank has of a state, as a view of one dimension."""
    return (value.to_local() if isinstance(value, DTensor) else value).view(-1)


class Part:
    """A tensor's weights, gradient and state on this rank, for as long as they stay where they are.

    Args:
        layout: Of the tensor.
        weights: What this rank has of it.
        state: Of the tensor.
        stochastic: Whether the first moment is rounded stochastically, if it has 8 bits.

    Attributes:
        given: Its state.
        grad: Flat; see :meth:`take`.
        step: Number of the step, from 1.
    """

    grad: Tensor
    step: int

    def __init__(self, layout: Layout, weights: Tensor, state: State, *, stochastic: bool) -> None:
        self.layout, self.stochastic = layout, stochastic
        self.given = state
        self._given = tuple(state.values())
        self._weights = weights
        self._is_copied = not self._weights.is_contiguous()
        self._stepped = self._weights.contiguous()
        self._state = {name: flat(value) for name, value in state.items() if name != "step"}
        self._extra = self._state.get("master", self._state.get("weight_residual"))

    def is_of(self, weights: Tensor, state: State) -> bool:
        """Whether weights and state are still what this was made of."""
        return weights.data_ptr() == self._weights.data_ptr() and all(
            map(operator.is_, self._given, state.values())
        )

    def take(self, grad: Tensor, step: int) -> None:
        """Take the gradient of the parameter for the next step, until :meth:`let_go`."""
        if grad.dtype not in FLOAT_DTYPES or grad.layout != torch.strided:
            raise ConfigError(
                f"gradient of {self.layout.shard.name!r} of shape {self.layout.shard.shape} is "
                f"{grad.dtype}, {grad.layout}: must be dense, one of {FLOAT_DTYPES}"
            )
        self.grad = self.layout.shard.local(grad).contiguous().view(-1)
        self.step = step
        if self._is_copied:
            self._stepped.copy_(self._weights)

    def grad_of(self, piece: Piece) -> Tensor:
        """Of some rows, flat."""
        is_all = piece.rows * piece.cols == self.grad.numel()
        return self.grad if is_all else piece.elements_of(self.grad)

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
        part = piece.elements_of
        scales = [
            self._state[f"{name}_scale"] for name in moments if f"{name}_scale" in self._state
        ]
        cols = self.layout.blocks.cols
        is_line = self.layout.blocks.axis == "element" and cols == 1
        return StepTensor(
            weights=part(self._stepped.view(-1)),
            grad=self.grad_of(piece),
            moments=tuple(part(self._state[name]) for name in moments),
            rows=1 if is_line else piece.rows,
            cols=piece.rows if is_line else piece.cols,
            scales=tuple(map(piece.segments_of, scales)),
            extra=None if self._extra is None else part(self._extra),
            stochastic=self.stochastic,
            first_index=piece.row * cols + piece.col,
            index_stride=cols,
            **rule,
        )

    @property
    def weights(self) -> Tensor:
        """That are stepped, flat."""
        return self._stepped.view(-1)

    @property
    def version(self) -> int:
        """How often torch's operators have changed the weights."""
        return -1 if self._weights.is_inference() else self._weights._version

    def write_back(self) -> None:
        """What is not contiguous was stepped as a copy."""
        if self._is_copied:
            self._weights.data.copy_(self._stepped)

    def let_go(self) -> None:
        """Free the gradient's memory, if nobody else has it."""
        del self.grad


def zeros(layout: Layout, dtype: torch.dtype, name: str, device: torch.device) -> State:
    """A moment, with its scales if it has 8 bits."""
    state = {name: layout.shard.elements(dtype, device)}
    if dtype == torch.int8:
        state[f"{name}_scale"] = layout.shard.scales(layout.blocks, device)
    return state
