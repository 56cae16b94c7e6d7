"""The units of a sharded model: what one reduce-scatter or all-gather carries."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.hooks.residuals import Shard
from commrt.hooks.wiring import ShardWiring


class Part(NamedTuple):
    """The elements of one parameter that one rank owns, in a buffer of a chunk for each rank.

    Attributes:
        name: Of the parameter.
        shard: Which elements; at least one.
        owner: The rank, in the shard group.
        offset: Of the first element in the owner's chunk.
    """

    name: str
    shard: Shard
    owner: int
    offset: int


@dataclasses.dataclass(frozen=True)
class UnitLayout:
    """Where everything is in a unit's buffers.

    Attributes:
        parts: By owner, in the order of the buffer.
        chunk: Elements of each rank's chunk, with padding.
        world_size: Number of chunks.
    """

    parts: tuple[Part, ...]
    chunk: int
    world_size: int

    def of_buffer(self, buffer: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Each part with its elements in a flat buffer of all chunks."""
        for part in self.parts:
            begin = part.owner * self.chunk + part.offset
            yield part, buffer[begin : begin + part.shard.size]

    def of_chunk(self, chunk: Tensor, owner: int) -> Iterator[tuple[Part, Tensor]]:
        """Each of an owner's parts with its elements in that rank's flat chunk."""
        for part in self.parts:
            if part.owner == owner:
                yield part, chunk[part.offset : part.offset + part.shard.size]

    def shards(self, owners: Sequence[int]) -> dict[str, list[Shard]]:
        """By name: the shards that these ranks own, in the order of the buffer."""
        shards: dict[str, list[Shard]] = {}
        for part in self.parts:
            if part.owner in owners:
                shards.setdefault(part.name, []).append(part.shard)
        return shards

    @functools.cached_property
    def largest(self) -> dict[str, int]:
        """By name: elements of the largest shard."""
        sizes: dict[str, int] = {}
        for part in self.parts:
            sizes[part.name] = max(sizes.get(part.name, 0), part.shard.size)
        return sizes


class Parameter(NamedTuple):
    """A parameter: a tensor on the meta device stands for its elements."""

    like: Tensor
    is_trained: bool


@dataclasses.dataclass
class Unit:
    """One unit: an FSDP module's own parameters.

    Attributes:
        name: Of the module.
        parameters: All of them, by name.
        layout: Of gradients, and of weights where those are gathered; whole, frozen ones included.
        shards: Group of the ranks with a shard each.
        replicas: Group of the ranks with the same shard, with hybrid sharding or without any.
        device: Of its tensors.
        lane: Which of the threads its turn is on.
        wiring: Set when the communication starts.
        references: Weights as all ranks decoded them last, where they travel as differences.
    """

    name: str
    parameters: Mapping[str, Parameter]
    layout: UnitLayout
    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    device: torch.device
    lane: int = 0
    wiring: ShardWiring | None = None
    references: Tensor | None = None

    @property
    def rank(self) -> int:
        """Which chunk is this process's."""
        return dist.get_rank(self.shards) if self.layout.world_size > 1 else 0
