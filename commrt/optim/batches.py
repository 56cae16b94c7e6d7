"""The ops of a step, whose tensors are looked up once for as long as they stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from commrt import ops
from commrt.ops import StepOptions, StepTensor
from commrt.optim.parts import Part, State
from commrt.optim.sections import Layout
from commrt.optim.shards import Piece

Rows = Iterator[tuple[str, Piece, StepTensor]]
# Which parameters have gradients may change from step to step.
_MOST_LISTS = 16


@dataclass(frozen=True)
class _Call:
    """An op with its tensors, and whose rows they are."""

    name: str
    tensors: ops.StepBatch
    rows: list[tuple[Part, Piece]]
    is_drawn: bool


class Batches:
    """Parts of an optimizer's tensors, and the ops that update them.

    Args:
        rows_of: The rows of a part, with the name of the op that updates them.
        seed_of: Of a tensor's random numbers in a step.
        is_stochastic: Whether the first moment of a tensor is rounded stochastically.
        is_drawn: Whether all weights are rounded stochastically.
    """

    def __init__(
        self,
        rows_of: Callable[[Part], Rows],
        seed_of: Callable[[Layout, int], int],
        is_stochastic: Callable[[Layout], bool],
        *,
        is_drawn: bool,
    ) -> None:
        self._rows_of, self._seed_of, self._is_drawn = rows_of, seed_of, is_drawn
        self._is_stochastic = is_stochastic
        self._parts: dict[Layout, Part] = {}
        self._calls: dict[tuple[int, ...], list[_Call]] = {}

    def part(self, layout: Layout, parameter: nn.Parameter, state: State) -> Part:
        """The part of a tensor, the same one as before if nothing has moved."""
        part = self._parts.get(layout)
        if part is None or not part.is_of(parameter, state):
            part = Part(layout, parameter, state, stochastic=self._is_stochastic(layout))
            self._parts[layout] = part
            self._calls.clear()
        return part

    def run(
        self, parts: Sequence[Part], step: int, options: StepOptions, grad_factor: Tensor | None
    ) -> None:
        """Update parts by the gradients that they have taken."""
        key = tuple(map(id, parts))
        if key not in self._calls:
            if len(self._calls) >= _MOST_LISTS:
                self._calls.clear()
            self._calls[key] = list(self._make(parts))
        for call in self._calls[key]:
            grads = [part.grad_of(piece) for part, piece in call.rows]
            seeds = None
            if call.is_drawn:
                seeds = [self._seed_of(part.layout, step) for part, _ in call.rows]
            call.tensors.renew(grads, seeds)
            getattr(ops, call.name)(call.tensors, options, grad_factor=grad_factor)
        for part in parts:
            part.write_back()

    def _make(self, parts: Sequence[Part]) -> Iterator[_Call]:
        found: dict[str, list[tuple[Part, Piece, StepTensor]]] = {}
        for part in parts:
            for name, piece, tensor in self._rows_of(part):
                found.setdefault(name, []).append((part, piece, tensor))
        for name, rows in found.items():
            yield _Call(
                name,
                ops.StepBatch(name, [tensor for _, _, tensor in rows]),
                [(part, piece) for part, piece, _ in rows],
                self._is_drawn or any(part.stochastic for part, _, _ in rows),
            )
