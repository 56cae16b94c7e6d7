"""The ops of a step, whose tensors are looked up once for as long as they stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from commrt import ops
from commrt.ops import StepOptions, StepTensor
from commrt.optim.parts import Part, State
from commrt.optim.sections import Layout
from commrt.optim.shards import Piece

Rows = Iterator[tuple[str, Piece, StepTensor]]
SeedOf = Callable[[Layout, int], int]
# Which parameters have gradients may change from step to step.
_MOST_LISTS = 16


@dataclass(frozen=True)
class Call:
    """An op with its tensors.

    Attributes:
        name: Of the op.
        tensors: What it is given.
        rows: What each of them is of.
        is_drawn: Whether anything is rounded stochastically.
    """

    name: str
    tensors: ops.StepBatch
    rows: Sequence[tuple[Part, Piece]]
    is_drawn: bool

    def bind(
        self,
        options: StepOptions,
        grad_factor: Tensor | None,
        seed_of: SeedOf,
        grad_of: Callable[[Part, Piece], Tensor] = Part.grad_of,
    ) -> Callable[[], None]:
        """What updates the rows by the gradients that their parts have taken, or others."""
        grads = [grad_of(part, piece) for part, piece in self.rows]
        seeds = (
            [seed_of(part.layout, part.step) for part, _ in self.rows] if self.is_drawn else None
        )

        def run() -> None:
            self.tensors.renew(grads, seeds)
            getattr(ops, self.name)(self.tensors, options, grad_factor=grad_factor)
            self.tensors.forget_grads()

        return run


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
        seed_of: SeedOf,
        is_stochastic: Callable[[Layout], bool],
        *,
        is_drawn: bool,
    ) -> None:
        self.rows_of, self.seed_of, self._is_drawn = rows_of, seed_of, is_drawn
        self._is_stochastic = is_stochastic
        self._parts: dict[Layout, Part] = {}
        self._calls: dict[tuple[int, ...], list[Call]] = {}

    def part(self, layout: Layout, weights: Tensor, state: State) -> Part:
        """The part of a tensor, the same one as before if nothing has moved."""
        part = self._parts.get(layout)
        if part is None or not part.is_of(weights, state):
            part = Part(layout, weights, state, stochastic=self._is_stochastic(layout))
            self._parts[layout] = part
            self._calls.clear()
        return part

    def run(self, parts: Sequence[Part], options: StepOptions, grad_factor: Tensor | None) -> None:
        """Update parts by the gradients that they have taken."""
        key = tuple(map(id, parts))
        if key not in self._calls:
            if len(self._calls) >= _MOST_LISTS:
                self._calls.clear()
            rows = ((part, *row) for part in parts for row in self.rows_of(part))
            self._calls[key] = self.calls(rows)
        for call in self._calls[key]:
            call.bind(options, grad_factor, self.seed_of)()
        for part in parts:
            part.write_back()
            part.let_go()

    def calls(self, rows: Iterable[tuple[Part, str, Piece, StepTensor]]) -> list[Call]:
        """What updates some rows."""
        found: dict[str, list[tuple[Part, Piece, StepTensor]]] = {}
        for part, name, piece, tensor in rows:
            found.setdefault(name, []).append((part, piece, tensor))
        calls = [
            Call(
                name,
                ops.StepBatch(name, [tensor for _, _, tensor in some]),
                [(part, piece) for part, piece, _ in some],
                self._is_drawn or any(part.stochastic for part, _, _ in some),
            )
            for name, some in found.items()
        ]
        for call in calls:
            call.tensors.forget_grads()  # they come with every step
        return calls
