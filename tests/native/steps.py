"""What tests of the optimizer steps share: lists of awkward tensors, every path at once."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from commrt import ops
from commrt.ops import SEGMENT, Second, StepOptions, StepTensor, reference
from tests.native import cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGES = (torch.float32, torch.bfloat16, torch.int8)
# Dtypes of weights and of what they need besides.
WEIGHTS = (
    (torch.float32, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, None),
)
FORMATS = tuple(itertools.product(WEIGHTS, DTYPES, STORAGES))
# Whether each moment of an op has a sign.
SIGNED = {
    "adam_mini_": (True,),
    "adamw_": (True, False),
    "lion_": (True,),
    "adan_": (True, True, False, True),
    "mofo_": (True, False),
}
# What a tensor of an op has besides, as make() takes it.
OTHERS: dict[str, dict[str, Any]] = {
    "adam_mini_": {"second": Second.UPDATED},
    "mofo_": {"threshold": 6e-4},  # of about half the moments
}
OPTIONS = StepOptions(
    beta1=0.9, beta2=0.95, decay=0.999, step_size=1e-3, root_correction=0.7,
    difference_size=3e-4, grad_scale=0.5,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Formats:
    """Dtypes of a tensor's parts."""

    weights: torch.dtype = torch.float32
    extra: torch.dtype | None = None
    grad: torch.dtype = torch.float32
    moments: torch.dtype = torch.float32


def make(
    rows: int,
    cols: int,
    signed: Sequence[bool] = (True,),
    formats: Formats = Formats(),
    *,
    seed: int = 0,
    second: Second | None = None,
    threshold: float | None = None,
    **options: Any,
) -> StepTensor:
    """A tensor of random content, with the state of any step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int, size: float) -> Tensor:
        return torch.randn(count, generator=generator) * size

    def uniform(count: int, size: float) -> Tensor:
        return torch.rand(count, generator=generator) * size

    def codes(count: int) -> Tensor:
        return torch.randint(-127, 128, (count,), generator=generator).to(torch.int8)

    numel, is_coded = rows * cols, formats.moments == torch.int8
    moments, scales = [], []
    for has_sign in signed:
        if is_coded:
            moments.append(codes(numel))
            scales.append(uniform(rows * -(-cols // SEGMENT), 1e-5))
        else:
            value = normal(numel, 1e-3)
            moments.append(value.to(formats.moments) if has_sign else value.abs())
    weights = normal(numel, 0.02)
    extra = {
        None: None,
        torch.float32: weights + normal(numel, 1e-5),
        torch.int8: codes(numel),
    }[formats.extra]
    counts = {Second.OF_COLUMN: cols}
    of_tensor = None if threshold is None else torch.tensor([threshold])
    return StepTensor(
        weights=weights.to(formats.weights),
        grad=normal(numel, 1e-3).to(formats.grad),
        moments=tuple(moments),
        rows=rows,
        cols=cols,
        scales=tuple(scales),
        extra=extra,
        second=of_tensor if second is None else uniform(counts.get(second, rows), 1e-6),
        second_from=second or Second.UPDATED,
        seed=1234567,
        **{"index_stride": cols, **options},
    )


def tensors_of(tensor: StepTensor) -> Iterator[tuple[str, Tensor]]:
    yield "weights", tensor.weights
    yield "grad", tensor.grad
    yield from ((f"moment {k}", moment) for k, moment in enumerate(tensor.moments))
    yield from ((f"scales {k}", scale) for k, scale in enumerate(tensor.scales))
    if tensor.extra is not None:
        yield "extra", tensor.extra
    if tensor.second is not None:
        yield "second", tensor.second


def copy(tensor: StepTensor, device: str = "cpu") -> StepTensor:
    def clone(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(clone, value))
        return value.to(device, copy=True) if isinstance(value, Tensor) else value

    fields = dataclasses.fields(tensor)
    return StepTensor(**{field.name: clone(getattr(tensor, field.name)) for field in fields})


def by_specification(name: str, tensors: Sequence[StepTensor], **options: Any) -> list[StepTensor]:
    """What commrt.ops.reference makes of copies."""
    copies = [copy(tensor) for tensor in tensors]
    with mock.patch.object(torch.ops.commrt, name, getattr(reference, name)):
        getattr(ops, name)(copies, **options)
    return copies


def run_everywhere(
    name: str, tensors: Sequence[StepTensor], options: StepOptions = OPTIONS, **others: Any
) -> list[StepTensor]:
    """Run a step by its specification, and assert that every path leaves the same bits."""
    expected = by_specification(name, tensors, options=options, **others)
    step: Callable[..., None] = getattr(ops, name)
    for path, use in cases.paths().items():
        copies = [copy(tensor) for tensor in tensors]
        with use:
            step(copies, options, **others)
        for index, (found, wanted) in enumerate(zip(copies, expected, strict=True)):
            for (what, actual), (_, target) in zip(
                tensors_of(found), tensors_of(wanted), strict=True
            ):
                cases.assert_same_bits(actual, target, f"{path}: {what} of tensor {index}")
    return expected
