"""What the optimizer steps take: lists of tensors, each a matrix in one piece, and coefficients."""

import dataclasses
import enum
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SEGMENT = 256
"""Elements of a row that share the scale of an 8-bit moment."""


class Second(enum.IntEnum):
    """Where :func:`commrt.ops.adam_mini_` has its second moments from."""

    UPDATED = 0  # one a row, updated from the gradient
    OF_ROW = 1  # one a row, final
    OF_COLUMN = 2  # one a column, final


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepTensor:
    """A weight, or rows of it, with its gradient and optimizer state: R rows of C elements.

    All tensors are contiguous and have R * C elements in row order, unless said otherwise.

    Attributes:
        weights: fp32, bf16 or fp16.
        grad: fp32, bf16 or fp16.
        moments: As many as the rule has: all fp32; or bf16, but fp32 for those that are never
            negative; or all int8.
        rows: R.
        cols: C, at least 1.
        scales: With int8, fp32 (R, segments of a row) for each moment.
        extra: What bf16 and fp16 weights need: an fp32 master copy; or, for bf16, int8 with the
            eight bits that follow; or nothing, and then bf16 weights are rounded stochastically.
        stochastic: Whether the first moment is rounded stochastically, if it is int8.
        seed: Of the random numbers, in [0, 2**63).
        first_index: Index of the first element's random number, below 2**63.
        index_stride: From a row's first index to the next row's.
        second: For ``adam_mini_``, fp32 (R,) or (C,); for ``mofo_``, fp32 (1,), the threshold of
            the first moment.
        second_from: What ``second`` is, for ``adam_mini_``.
        block_rows: Rows that share a second moment, a divisor of R.
    """

    weights: Tensor
    grad: Tensor
    moments: tuple[Tensor, ...]
    rows: int
    cols: int
    scales: tuple[Tensor, ...] = ()
    extra: Tensor | None = None
    stochastic: bool = False
    seed: int = 0
    first_index: int = 0
    index_stride: int = 0
    second: Tensor | None = None
    second_from: Second = Second.UPDATED
    block_rows: int = 1

    @property
    def segments_per_row(self) -> int:
        """Scales that an 8-bit moment has for each row."""
        return -(-self.cols // SEGMENT)

    def between(self, begin: int, end: int) -> "StepTensor":
        """Its rows [begin, end), whole blocks of them."""

        def cut(value: Tensor, each: int) -> Tensor:
            return value.view(-1)[begin * each : end * each]

        second = self.second
        if second is not None and second.numel() == self.rows:
            second = second if self.second_from == Second.OF_COLUMN else cut(second, 1)
        return dataclasses.replace(
            self,
            weights=cut(self.weights, self.cols),
            grad=cut(self.grad, self.cols),
            moments=tuple(cut(moment, self.cols) for moment in self.moments),
            scales=tuple(cut(scale, self.segments_per_row) for scale in self.scales),
            extra=None if self.extra is None else cut(self.extra, self.cols),
            second=second,
            rows=end - begin,
            first_index=self.first_index + begin * self.index_stride,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepOptions:
    """Coefficients of a step; each rule in :mod:`commrt.ops.reference` says which it uses.

    Attributes:
        beta1: Decay of the first moment.
        beta2: Decay of the second.
        beta3: Decay of Adan's third.
        eps: Added to the root.
        decay: What weights are multiplied by.
        step_size: Learning rate over the first moment's bias correction.
        difference_size: The same of Adan's differences, times beta2.
        has_before: Whether Adan knows the gradient before.
        root_correction: Root of the second moment's bias correction.
        grad_scale: What the gradient is multiplied by.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.99
    eps: float = 1e-8
    decay: float = 1.0
    step_size: float = 1e-3
    difference_size: float = 0.0
    has_before: float = 1.0
    root_correction: float = 1.0
    grad_scale: float = 1.0


def option_values(options: StepOptions) -> list[float]:
    """In the order of the fields."""
    return [float(getattr(options, field.name)) for field in dataclasses.fields(options)]


Lists = tuple[
    list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]
]
_PLACE = ("rows", "cols", "stochastic", "seed", "first_index", "index_stride", "second_from",
          "block_rows")  # fmt: skip
SEED_PLACE = _PLACE.index("seed")

NUM_PLACES = len(_PLACE)
"""Numbers that the list of places has for each tensor."""


def flatten(tensors: Sequence[StepTensor]) -> Lists:
    """As the arguments of the operators; what a tensor does not have is an empty one."""
    nothing = torch.empty(0)
    weights = [tensor.weights for tensor in tensors]
    extras = [nothing if tensor.extra is None else tensor.extra for tensor in tensors]
    grads = [tensor.grad for tensor in tensors]
    moments = [moment for tensor in tensors for moment in tensor.moments]
    scales = [
        scale for tensor in tensors for scale in (tensor.scales or (nothing,) * len(tensor.moments))
    ]
    seconds = [nothing if tensor.second is None else tensor.second for tensor in tensors]
    places = [int(getattr(tensor, name)) for tensor in tensors for name in _PLACE]
    return weights, extras, grads, moments, scales, seconds, places


def unflatten(
    weights: Sequence[Tensor],
    extras: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Tensor],
    scales: Sequence[Tensor],
    seconds: Sequence[Tensor],
    places: Sequence[int],
) -> Iterator[StepTensor]:
    """The other way; ``scales`` and ``second`` are empty tensors where there were none."""
    each, place = len(moments) // max(1, len(weights)), len(_PLACE)
    for i, own in enumerate(weights):
        rows, cols, stochastic, seed, first, stride, second_from, block_rows = places[
            i * place : (i + 1) * place
        ]
        yield StepTensor(
            weights=own,
            grad=grads[i],
            moments=tuple(moments[i * each : (i + 1) * each]),
            rows=rows,
            cols=cols,
            scales=tuple(scales[i * each : (i + 1) * each]),
            extra=extras[i] if extras[i].numel() else None,
            stochastic=bool(stochastic),
            seed=seed,
            first_index=first,
            index_stride=stride,
            second=seconds[i],
            second_from=Second(second_from),
            block_rows=block_rows,
        )
