"""FSDP1 (``FullyShardedDataParallel``): its communication hook, with a state for each unit.

The hook says neither which unit calls it nor what is in its buffer: the former is read from a
private attribute (the unit's hook state), in this file only.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from commrt.collectives.torch_names import reduce_scatter_single
from commrt.collectives.wrappers import FlatPart, flat_chunk, flat_parts, plain_name
from commrt.errors import ConfigError
from commrt.hooks.reductions import Plain
from commrt.hooks.residuals import Shard
from commrt.hooks.sharded import ShardedComm
from commrt.hooks.units import Parameter, Part, Unit, UnitLayout

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


def find_units(model: FullyShardedDataParallel) -> list[tuple[Any, Unit]]:
    """FSDP's modules with parameters of their own, and units of them.

    Raises:
        ConfigError: For what the hook cannot do, with its reason.
    """
    if not model.check_is_root():
        raise ConfigError("model is a part of an FSDP model: attach to the whole")
    names = {module: plain_name(name) for name, module in model.named_modules()}
    found = []
    for module in FullyShardedDataParallel.fsdp_modules(model):
        if module.sharding_strategy in _HYBRID:
            raise ConfigError(
                f"sharding strategy {module.sharding_strategy.name}: FSDP1 calls no hook with it; "
                "use fully_shard with a mesh of two dimensions"
            )
        if module._comm_hook is not None:
            raise ConfigError("model has a communication hook already: FSDP takes one")
        if module._handle is not None:
            found.append((module, _unit(module, names[module])))
    if not found:
        raise ConfigError("model has no parameters")
    return found


def install(comm: ShardedComm, model: Any, found: Sequence[tuple[Any, Unit]]) -> None:
    """Register the hook, with a state of its own for every unit."""
    model.register_comm_hook(None, _hook)
    for module, unit in found:
        is_sharded = module.sharding_strategy != ShardingStrategy.NO_SHARD
        module._comm_hook_state = _Hook(comm, module, unit, is_sharded)


class _Hook:
    """What FSDP1 calls, for one unit."""

    def __init__(self, comm: ShardedComm, module: Any, unit: Unit, is_sharded: bool) -> None:
        self._comm, self._module, self._unit = comm, module, unit
        self._is_sharded = is_sharded

    def average(self, gradient: Tensor) -> None:
        """NO_SHARD: in place."""
        self._comm.all_reduce(
            self._unit,
            self._layout,
            gradient,
            group=self._unit.shards,
            scale=1.0,
            plain=self._divided(gradient, gradient, functools.partial(dist.all_reduce, gradient)),
            may_defer=False,
        )

    def reduce_scatter(self, gradient: Tensor, output: Tensor) -> None:
        """Sharded: from the padded flat gradient to this rank's chunk."""
        plain = functools.partial(reduce_scatter_single, output, gradient)
        self._comm.reduce_scatter(
            self._unit,
            self._layout,
            output,
            gradient,
            scale=1.0,
            plain=self._divided(gradient, output, plain),
            may_defer=False,
        )

    def _layout(self) -> UnitLayout:
        """Without the frozen parameters, whose gradients are zeros."""
        unit = self._unit
        is_trained = [part.is_trained for part in flat_parts(self._module._handle.flat_param)]
        trained = set(itertools.compress(unit.parameters, is_trained))
        if len(trained) == len(unit.parameters):
            return unit.layout
        parts = tuple(part for part in unit.layout.parts if part.name in trained)
        return dataclasses.replace(unit.layout, parts=parts)

    def _divided(self, gradient: Tensor, output: Tensor, collective: Any) -> Plain:
        """As FSDP1 without a hook: divide before and after, by about the root of the ranks each."""

        def plain(group: dist.ProcessGroup) -> None:
            gradient.div_(self._module._gradient_predivide_factor)
            collective(group=group)
            output.div_(self._module._gradient_postdivide_factor)

        return plain


def _hook(state: _Hook, gradient: Tensor, output: Tensor | None = None) -> None:
    if output is None:
        state.average(gradient)
    else:
        state.reduce_scatter(gradient, output)


def _unit(module: Any, name: str) -> Unit:
    flat = module._handle.flat_param
    is_sharded = module.sharding_strategy != ShardingStrategy.NO_SHARD
    group = module.process_group
    world_size = dist.get_world_size(group) if is_sharded else 1
    prefix = f"{name}." if name else ""
    originals = {plain_name(prefix + part.name): part for part in flat_parts(flat)}
    return Unit(
        name=name,
        parameters={
            name: Parameter(
                torch.empty(part.shape, dtype=flat.dtype, device="meta"), part.is_trained
            )
            for name, part in originals.items()
        },
        layout=_layout(originals, flat_chunk(flat, world_size), world_size),
        shards=group,
        replicas=None if is_sharded else group,
        device=module.compute_device,
    )


def _layout(originals: Mapping[str, FlatPart], chunk: int, world_size: int) -> UnitLayout:
    """As FSDP1 lays out a flat parameter: one after the other, cut into equal chunks."""
    parts = []
    for name, (_, shape, begin, *_) in originals.items():
        numel = math.prod(shape)
        for owner in range(begin // chunk, -(-(begin + numel) // chunk)):
            low = max(begin, owner * chunk)
            high = min(begin + numel, (owner + 1) * chunk)
            shard = Shard(low - begin, high - begin, numel)
            parts.append(Part(name, shard, owner, low - owner * chunk))
    return UnitLayout(tuple(sorted(parts, key=lambda p: (p.owner, p.offset))), chunk, world_size)
