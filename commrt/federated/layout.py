"""How a model's update lies in one flat vector, and which of its parts are coded together."""

import math
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from commrt.errors import ConfigError

_BF16_INFINITY = 0x7F80
# A tensor that is smaller shares the parameters of its code with its neighbours.
LEAST_ELEMENTS = 512


class Group(NamedTuple):
    """Neighbouring tensors ``[begin, end)`` of the flat vector, coded with the same parameters."""

    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Elements in it."""
        return self.end - self.begin

    def of(self, flat: Tensor) -> Tensor:
        """Its part of ``flat``, sharing memory; of a stack (..., N) as well."""
        return flat[..., self.begin : self.end]


class Layout:
    """Names and shapes of a model's tensors, in the order in which they lie in the flat vector.

    Args:
        shapes: By name. Client and server must be given the same, in the same order.

    Attributes:
        groups: See :class:`Group`.
        ends: int64, where each group ends.
        matrices: Rows and columns of each tensor, as a matrix.

    Raises:
        ConfigError: There is no element.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: tuple(map(operator.index, shape)) for name, shape in shapes.items()}
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.numel = sum(sizes)
        if self.numel == 0:
            raise ConfigError(f"shapes={dict(shapes)!r}: must have one element at least")
        self.groups = tuple(_groups(sizes))
        self.ends = torch.tensor([group.end for group in self.groups])
        self.matrices = tuple(map(_matrix, self.shapes.values()))
        self.digest = zlib.crc32(repr(self.shapes).encode())

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Of tensors by name, such as a state dict."""
        return cls({name: tensor.shape for name, tensor in tensors.items()})

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by name as a flat fp32 vector of ``numel`` elements.

        Raises:
            ConfigError: Names or shapes are others than the layout's.
        """
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != self.shapes:
            wrong = sorted(
                name
                for name in found.keys() | self.shapes.keys()
                if found.get(name) != self.shapes.get(name)
            )
            raise ConfigError(f"tensors {wrong} are not those of the layout, or of another shape")
        return torch.cat([tensors[name].detach().reshape(-1).float() for name in self.shapes])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors by name, sharing memory with ``flat``."""
        parts = zip(self.shapes.items(), self.parts(flat), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def parts(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The tensors' parts of the flat vector, one after the other."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts: tuple[Tensor, ...] = flat.split(sizes)
        return parts

    def check(self, flat: Tensor, name: str, *, count: int | None = None) -> Tensor:
        """``flat`` as contiguous fp32, if it is a finite vector of the layout.

        Args:
            flat: The vector; with ``count`` so many, (count, N).
            name: Of it, for errors.
            count: See there.

        Raises:
            ConfigError: It has another shape, or elements that are not finite.
        """
        if count is not None and len(flat) != count:
            raise ConfigError(f"{len(flat)} of {name}: must be {count}")
        shape = tuple(flat.shape if count is None else flat.shape[1:])
        if shape != (self.numel,):
            raise ConfigError(
                f"{name} has shape {shape}: must be ({self.numel},), "
                "flat in the order of the layout"
            )
        flat = flat.detach().float().contiguous()
        if not is_finite(flat):
            bad = int((~flat.isfinite()).sum())
            raise ConfigError(f"{name} has {bad} elements that are not finite: none may be")
        return flat


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """As rows and columns: a vector is a row, what has more dimensions has them as columns."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def is_finite(flat: Tensor) -> bool:
    """Whether all of at least one element are; in a quarter of the time of ``isfinite().all()``."""
    if flat.dtype == torch.bfloat16:
        return int((flat.view(torch.int16) & 0x7FFF).max()) < _BF16_INFINITY
    return magnitude(flat) < math.inf


def magnitude(flat: Tensor) -> float:
    """Of the largest of at least one element, NaN if one is; sooner than ``abs().max()``."""
    least, most = flat.aminmax()
    return max(-float(least), float(most))


def _groups(sizes: Sequence[int]) -> list[Group]:
    groups: list[Group] = []
    begin = end = 0
    for size in sizes:
        end += size
        if end - begin >= LEAST_ELEMENTS:
            groups.append(Group(begin, end))
            begin = end
    if end > begin:
        last = groups.pop() if groups else Group(0, 0)
        groups.append(Group(last.begin, end))
    return groups
