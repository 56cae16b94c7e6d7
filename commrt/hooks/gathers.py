"""Gathers of a sharded model's weights: as they are, at low bits, or as low-bit differences."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import Codec, DeltaCodec
from commrt.collectives import Item, ShardReducer, Traffic, ring_scatter_bytes, timed
from commrt.collectives.torch_names import all_gather_single
from commrt.hooks.registry import Registry
from commrt.hooks.residuals import Shard
from commrt.hooks.units import Part, Unit
from commrt.hooks.wiring import ShardWiring
from commrt.ops.format import FLOAT_DTYPES


class Gathers:
    """What weights travel as, and what was sent of them.

    The optimizer has the full-precision shards; what is gathered is what every rank decodes, the
    owner too, so all ranks compute with the same bits.

    Args:
        codec: Of the weights.
        min_numel: Those with fewer elements, or fewer than two dimensions, travel as they are.

    Attributes:
        registry: Which weights are compressed.
    """

    def __init__(self, codec: Codec, min_numel: int) -> None:
        self._is_delta = isinstance(codec, DeltaCodec)
        self.registry = Registry(codec, min_numel)
        self._loaded: dict[str, Tensor] = {}
        self._resumed: set[str] = set()

    def bind(self, name: str, like: Tensor, reason: str) -> None:
        """Decide on a parameter."""
        self.registry.name(like, name)
        self.registry.admit(like, reason)

    def gather(self, unit: Unit, wiring: ShardWiring, output: Tensor, input: Tensor) -> Tensor:
        """Fill ``output`` (W * chunk) with all ranks' ``input`` (chunk)."""
        traffic, gatherer, group = Traffic(), wiring.gatherer, wiring.gather_group
        if gatherer is None or output.dtype not in FLOAT_DTYPES:
            self._note_dtype(unit, output.dtype)
            self._plain(output, input, group, traffic)
        elif not self._is_delta:
            _place(unit, output, input)
            items = self._items(unit, output)
            if items:
                gatherer.all_gather_(items, traffic)
        else:
            # What a state dict had is of all ranks or of none, also where one holds no part of it.
            has_before = unit.references is not None or unit.name in self._resumed
            if unit.references is None:
                unit.references = self._first_references(unit, group, output, input, traffic)
            if has_before:
                self._add_differences(unit, gatherer, output, input, traffic)
        if unit.replicas is not None:
            traffic.keep_inside()
        wiring.weight_traffic.add(traffic)
        return output

    def resharded(
        self, wiring: ShardWiring, output: Tensor, input: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        """Gather over a smaller group what was gathered before, as it was decoded then."""
        traffic = Traffic()
        self._plain(output, input, group, traffic)
        wiring.weight_traffic.add(traffic)
        return output

    def forget(self, units: Sequence[Unit]) -> None:
        """Send everything in full at the next gather, where weights travel as differences."""
        self._loaded.clear()
        self._resumed.clear()
        for unit in units:
            unit.references = None

    def state_dict(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Copies, by name, of this rank's shards of the weights as all ranks decoded them last."""
        return {
            part.name: (list(part.shard), values.clone())
            for unit in units
            if unit.references is not None
            for part, values in self._own_coded(unit, _own_chunk(unit, unit.references))
        }

    def load(self, units: Sequence[Unit], states: Sequence[Mapping[str, Any]]) -> None:
        """Take the weights of the state dicts of all ranks for those that were decoded last.

        Ranks: all or none; one may have none of the weights.
        """
        self.forget(units)
        if not self._is_delta:
            return
        self._resumed = {unit.name for unit in units}
        for unit in units:
            for part, _ in self._own_coded(unit, torch.empty(unit.layout.chunk, device="meta")):
                whole = torch.full((part.shard.numel,), torch.nan)
                for shard, values in (state[part.name] for state in states if part.name in state):
                    Shard(*shard).of(whole).copy_(values.view(Shard(*shard).outer, -1))
                own = part.shard.of(whole).flatten()
                if not own.isnan().any():
                    self._loaded[part.name] = own

    def _note_dtype(self, unit: Unit, dtype: torch.dtype) -> None:
        """Weights of several dtypes are gathered as bytes."""
        for name in unit.parameters.keys() & self.registry.compressed.keys():
            like = unit.parameters[name].like
            self.registry.exclude(like, f"its module's weights are gathered as {dtype}")

    def _plain(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, traffic: Traffic
    ) -> None:
        with timed(traffic, "network_s"):
            all_gather_single(output, input, group=group)
        traffic.weight_bytes += ring_scatter_bytes(output.nbytes, dist.get_world_size(group))

    def _first_references(
        self,
        unit: Unit,
        group: dist.ProcessGroup,
        output: Tensor,
        input: Tensor,
        traffic: Traffic,
    ) -> Tensor:
        """The weights as they are, in full, or those of a state dict."""
        chunk = input.clone()
        for part, values in self._own_coded(unit, chunk):
            if part.name in self._loaded:
                values.copy_(self._loaded.pop(part.name))
        with torch.inference_mode(False):  # training writes to them later
            references = torch.empty_like(output)
        self._plain(references, chunk, group, traffic)
        if unit.name not in self._resumed:
            output.copy_(references)
        self._resumed.discard(unit.name)
        return references

    def _add_differences(
        self, unit: Unit, gatherer: ShardReducer, output: Tensor, input: Tensor, traffic: Traffic
    ) -> None:
        """Move the references to where the weights are now, and give them out."""
        references = unit.references
        assert references is not None
        references.nan_to_num_(0.0, 0.0, 0.0)  # else what was not finite once would stay so
        _place(unit, output, input)
        differences = torch.empty_like(output, dtype=torch.float32)
        own, kept = _own_chunk(unit, differences), _own_chunk(unit, references)
        for (part, now), (_, before) in zip(
            self._own_coded(unit, input), self._own_coded(unit, kept), strict=True
        ):
            change = own[part.offset : part.offset + part.shard.size]
            torch.sub(now.float(), before.float(), out=change)
        items = [
            dataclasses.replace(item, tensor=change) if not item.is_small else item
            for item, (_, change) in zip(
                self._items(unit, output), unit.layout.of_buffer(differences), strict=True
            )
        ]
        gatherer.all_gather_(items, traffic)
        moved = zip(
            items,
            unit.layout.of_buffer(references),
            unit.layout.of_buffer(output),
            strict=True,
        )
        for item, (_, reference), (_, target) in moved:
            if not item.is_small:
                target.copy_(reference.add_(item.tensor))

    def _items(self, unit: Unit, buffer: Tensor) -> list[Item]:
        return [
            Item(tensor, 0, None, part.name not in self.registry.compressed, owner=part.owner)
            for part, tensor in unit.layout.of_buffer(buffer)
        ]

    def _own_coded(self, unit: Unit, chunk: Tensor) -> Iterator[tuple[Part, Tensor]]:
        for part, values in unit.layout.of_chunk(chunk, unit.rank):
            if part.name in self.registry.compressed:
                yield part, values


def _own_chunk(unit: Unit, buffer: Tensor) -> Tensor:
    return buffer.view(unit.layout.world_size, -1)[unit.rank]


def _place(unit: Unit, output: Tensor, input: Tensor) -> None:
    """Put this rank's weights where they belong in the output, unless they are there."""
    own = _own_chunk(unit, output)
    if own.data_ptr() != input.data_ptr():
        own.copy_(input)
