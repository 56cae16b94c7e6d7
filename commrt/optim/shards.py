"""Which part of every parameter a rank has, as rows of the whole one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from commrt.collectives.wrappers import flat_chunk, flat_parts, inner_of, plain_name
from commrt.errors import ConfigError
from commrt.ops import SEGMENT
from commrt.optim.partition import Blocks, Place, Shape

Groups = tuple[dist.ProcessGroup, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows of one length that lie one after the other in what a rank has of a tensor.

    Attributes:
        start: First element, in the rank's memory.
        row: First row, of the whole tensor.
        col: First column, of the whole tensor.
        rows: Their number.
        cols: Elements of each.
        line: Place of the first row among those of which the rank has any elements.
        segment: Place of the first segment among the rank's.
    """

    start: int
    row: int
    col: int
    rows: int
    cols: int
    line: int
    segment: int

    @property
    def segments_per_row(self) -> int:
        """Scales that an 8-bit moment has for each row."""
        return -(-self.cols // SEGMENT)

    def elements_of(self, value: Tensor) -> Tensor:
        """Its elements in what the rank has, flat."""
        return value[self.start : self.start + self.rows * self.cols]

    def segments_of(self, scales: Tensor) -> Tensor:
        """Its scales among the rank's, flat."""
        return scales[self.segment : self.segment + self.rows * self.segments_per_row]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """What a rank has of a tensor; of this class, all of it.

    Attributes:
        name: Of the tensor, as without wrappers; "" if it is not known.
        shape: Of the whole tensor.
    """

    name: str
    shape: Shape

    @property
    def groups(self) -> Groups:
        """Of the ranks that have other parts: to add up, all-reduce over one after the other."""
        return ()

    def pieces(self, blocks: Blocks) -> Iterator[Piece]:
        """Its rows, in the order of memory."""
        return _box_pieces(blocks, (0,) * len(self.shape), self.shape)

    def column(self, blocks: Blocks, matrix: int, col: int) -> int:
        """Place of a column, of a matrix of a stack, among its :meth:`lines`."""
        return matrix * blocks.cols + col

    def can_be_coded(self, blocks: Blocks) -> bool:
        """Whether its state can have a scale for each segment."""
        return True

    def local(self, value: Tensor) -> Tensor:
        """Its elements in the parameter or its gradient."""
        return value.detach()

    def elements(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros, one for each element."""
        return torch.zeros(self.shape, dtype=dtype, device=device)

    def lines(self, blocks: Blocks, device: torch.device) -> Tensor:
        """Zeros in fp32, one for each row or column of which it has any elements."""
        return torch.zeros(blocks.second_shape, device=device)

    def scales(self, blocks: Blocks, device: torch.device) -> Tensor:
        """Zeros in fp32, one for each segment."""
        return torch.zeros(blocks.scale_shape, device=device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Box(Shard):
    """What a rank has of a DTensor: a range of each dimension. Its state are DTensors, too."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    offset: Shape
    size: Shape

    @property
    def groups(self) -> Groups:
        """Of the mesh's dimensions along which it is cut."""
        return tuple(
            self.mesh.get_group(place)
            for place, placement in enumerate(self.placements)
            if _dim(placement) is not None and self.mesh.size(place) > 1
        )

    @property
    def last_cut(self) -> int:
        """The last dimension of which it has a part."""
        cut = (d for d, n in enumerate(self.shape) if self.size[d] != n)
        return max(cut, default=0)

    def pieces(self, blocks: Blocks) -> Iterator[Piece]:
        """A range of each dimension."""
        return _box_pieces(blocks, self.offset, self.size)

    def column(self, blocks: Blocks, matrix: int, col: int) -> int:
        """Among those of the range."""
        place, stack = 0, self.shape[: blocks.stack_dims]
        for dim, size in enumerate(self.size[: blocks.stack_dims]):
            index = matrix // math.prod(stack[dim + 1 :]) % stack[dim]
            place = place * size + index - self.offset[dim]
        cols = math.prod(self.size[blocks.row_dims :])
        return place * cols + col - _first_col(blocks, self.offset)

    def can_be_coded(self, blocks: Blocks) -> bool:
        """If no segment is cut."""
        dims = [_dim(placement) for placement in self.placements]
        parts = [n for n, dim in zip(self.mesh.shape, dims, strict=True) if dim == blocks.row_dims]
        return not parts or blocks.cols % (SEGMENT * math.prod(parts)) == 0

    def local(self, value: Tensor) -> Tensor:
        """Without communication, where both are placed alike."""
        value = value.detach()
        if not isinstance(value, DTensor):
            return value
        if tuple(value.placements) != self.placements:
            value = value.redistribute(self.mesh, self.placements)
        return value.to_local()

    def elements(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A DTensor."""
        return self._wrap(torch.zeros(self.size, dtype=dtype, device=device), self.shape)

    def lines(self, blocks: Blocks, device: torch.device) -> Tensor:
        """A DTensor, replicated where lines are cut."""
        size = [
            n if whole == all_ else 1
            for n, whole, all_ in zip(self.size, blocks.second_shape, self.shape, strict=True)
        ]
        return self._wrap(torch.zeros(size, device=device), blocks.second_shape)

    def scales(self, blocks: Blocks, device: torch.device) -> Tensor:
        """A DTensor."""
        row = blocks.row_dims
        cols = math.prod(self.size[row:])
        size = (*self.size[:row], -(-cols // SEGMENT))
        return self._wrap(torch.zeros(size, device=device), blocks.scale_shape)

    def _wrap(self, local: Tensor, shape: Shape) -> Tensor:
        """As a DTensor of this shape, replicated along dimensions of one element."""
        placements = [
            Replicate()
            if (dim := _dim(placement)) is not None and shape[dim] == 1 < self.shape[dim]
            else placement
            for placement in self.placements
        ]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Span(Shard):
    """What a rank has of a tensor in a flat parameter of FSDP1: consecutive elements.

    Attributes:
        begin: First element, of the whole tensor.
        end: After the last.
        start: Of the first element, in the parameter.
        group: Whose ranks have the others; None if there are none.
    """

    begin: int
    end: int
    start: int
    group: dist.ProcessGroup | None

    @property
    def groups(self) -> Groups:
        """Of FSDP."""
        return () if self.group is None else (self.group,)

    def pieces(self, blocks: Blocks) -> Iterator[Piece]:
        """At most a cut segment, the rest of its row, whole rows, and the beginning of one."""
        begin, end, cols = self.begin, self.end, blocks.cols
        after_row, after_segment = -(-begin // cols) * cols, begin + -(begin % cols) % SEGMENT
        cuts = {begin, min(after_segment, after_row), after_row, end // cols * cols, end}
        places = sorted(cut for cut in cuts if begin <= cut <= end)
        segment = 0
        for low, high in itertools.pairwise(places):
            piece = Piece(
                start=low - begin,
                row=low // cols,
                col=low % cols,
                rows=max(1, (high - low) // cols),
                cols=min(cols, high - low),
                line=low // cols - begin // cols,
                segment=segment,
            )
            segment += piece.rows * piece.segments_per_row
            yield piece

    def local(self, value: Tensor) -> Tensor:
        """A range."""
        return value.detach().reshape(-1)[self.start : self.start + self.end - self.begin]

    def elements(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Flat."""
        return torch.zeros(self.end - self.begin, dtype=dtype, device=device)

    def lines(self, blocks: Blocks, device: torch.device) -> Tensor:
        """Flat; of columns all."""
        if blocks.axis == "column":
            return torch.zeros(blocks.second_shape, device=device)
        last = max(self.pieces(blocks), key=lambda piece: piece.line, default=None)
        return torch.zeros(0 if last is None else last.line + last.rows, device=device)

    def scales(self, blocks: Blocks, device: torch.device) -> Tensor:
        """Flat."""
        number = sum(piece.rows * piece.segments_per_row for piece in self.pieces(blocks))
        return torch.zeros(number, device=device)


def find_shards(model: nn.Module) -> Iterator[tuple[Place, nn.Parameter, Shard]]:
    """Every tensor of a model: where it is, the parameter that it is (in), and the rank's part.

    A shared one comes once for every module that has it; a flat parameter once for every tensor.
    """
    while (inner := inner_of(model)) is not None:
        model = inner
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None:
            group = module.process_group if handle.uses_sharded_strategy else None
            yield from _spans(handle.flat_param, plain_name(prefix), group)
        for name, parameter in module.named_parameters(recurse=False):
            if not is_flat(parameter):
                yield (module, name), parameter, shard_of(plain_name(prefix + name), parameter)


def is_flat(parameter: nn.Parameter) -> bool:
    """Whether only FSDP1's module knows what is in a parameter."""
    is_part = getattr(parameter, "_fsdp_flattened", False)
    return is_part or isinstance(parameter, FlatParameter)


def shard_of(name: str, parameter: nn.Parameter) -> Shard:
    """Of a parameter that is not in a flat one.

    Raises:
        ConfigError: A DTensor's local part is not a range of each dimension.
    """
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Shard(name=name, shape=shape)
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    offset, size = [0] * len(shape), list(shape)
    for dim in range(len(shape)):
        cut = [i for i, placement in enumerate(placements) if _dim(placement) == dim]
        # What torch cuts last is the outermost cut of a _StridedShard, which FSDP2 makes of what
        # tensor parallelism has cut before.
        cut.sort(key=lambda i: hasattr(placements[i], "split_factor"))
        if len(cut) > 1 and shape[dim] % math.prod(mesh.shape[i] for i in cut):
            raise ConfigError(
                f"parameter {name!r} of shape {shape} is placed as {placements}: dimension {dim}, "
                f"which is cut more than once, must be a multiple of all ranks that share it"
            )
        for i in cut:
            chunk = -(-size[dim] // mesh.shape[i])
            begin = min(mesh.get_local_rank(i) * chunk, size[dim])
            offset[dim] += begin
            size[dim] = min(chunk, size[dim] - begin)
    local = tuple(parameter.to_local().shape)
    if local != tuple(size) or any(placement.is_partial() for placement in placements):
        raise ConfigError(
            f"parameter {name!r} of shape {shape} is placed as {placements}: this rank must have "
            f"{tuple(size)} of it, and has {local}"
        )
    return Box(
        name=name,
        shape=shape,
        mesh=mesh,
        placements=placements,
        offset=tuple(offset),
        size=tuple(size),
    )


def _spans(
    flat: Any, prefix: str, group: dist.ProcessGroup | None
) -> Iterator[tuple[Place, nn.Parameter, Shard]]:
    chunk = flat_chunk(flat, 1 if group is None else dist.get_world_size(group))
    first = 0 if group is None else dist.get_rank(group) * chunk
    for part in flat_parts(flat):
        name = f"{prefix}.{part.name}" if prefix else part.name
        if not part.is_contiguous:
            raise ConfigError(
                f"parameter {name!r} of FSDP1 was not contiguous: must be, before it is wrapped"
            )
        numel = math.prod(part.shape)
        low = min(max(first - part.begin, 0), numel)
        shard = Span(
            name=name,
            shape=part.shape,
            begin=low,
            end=max(min(first + chunk - part.begin, numel), low),
            start=0 if part.parameter is not None else max(part.begin - first, 0),
            group=group,
        )
        yield part.place, flat if part.parameter is None else part.parameter, shard


def _dim(placement: Any) -> int | None:
    """That a placement cuts, if it does."""
    return getattr(placement, "dim", None)


def _box_pieces(blocks: Blocks, offset: Sequence[int], size: Sequence[int]) -> Iterator[Piece]:
    """Rows are consecutive up to the last dimension of rows that is cut."""
    shape, row_dims = blocks.shape, blocks.row_dims
    if not math.prod(size):
        return
    cols = math.prod(size[row_dims:])
    outer = max((d for d in range(row_dims) if size[d] != shape[d]), default=0)
    rows = math.prod(size[outer:row_dims])
    line = 0
    for index in itertools.product(*(range(n) for n in size[:outer])):
        row = 0
        for dim in range(row_dims):
            row = row * shape[dim] + offset[dim] + (index[dim] if dim < outer else 0)
        segment = line * -(-cols // SEGMENT)
        yield Piece(
            start=line * cols, row=row, col=_first_col(blocks, offset), rows=rows, cols=cols,
            line=line, segment=segment,
        )  # fmt: skip
        line += rows


def _first_col(blocks: Blocks, offset: Sequence[int]) -> int:
    """Only the first dimension of columns can be cut."""
    inner = blocks.shape[blocks.row_dims + 1 :]
    return math.prod(inner) * offset[blocks.row_dims] if blocks.cols > 1 else 0
