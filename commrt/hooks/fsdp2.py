"""FSDP2 (``fully_shard``): a reduce-scatter and an all-gather of commrt's own in every module.

Torch's public hooks do not say what is in the buffers they hand over. The layout is read from
``FSDPParamGroup``, which is private; all that is private of FSDP2 is used in this file only.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from commrt.collectives.torch_names import reduce_scatter_single
from commrt.collectives.wrappers import plain_name
from commrt.errors import ConfigError
from commrt.hooks.residuals import Shard
from commrt.hooks.sharded import ShardedComm
from commrt.hooks.units import Parameter, Part, Unit, UnitLayout

try:
    from torch.distributed.fsdp._fully_shard import _fsdp_common
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
except ImportError:  # of an older torch
    AllGather = ReduceScatter = object  # type: ignore[assignment,misc]


def find_units(model: nn.Module) -> list[tuple[FSDPModule, Any, Unit]]:
    """The FSDP modules with parameters of their own, their parameter groups, and units of them.

    Raises:
        ConfigError: For what cannot be replaced, with its reason.
    """
    if ReduceScatter is object:
        raise ConfigError(f"torch {torch.__version__}: its FSDP2 takes no custom communication")
    names = {module: name for name, module in model.named_modules()}
    found: list[tuple[FSDPModule, Any, Unit]] = []
    seen = set()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        groups = module._get_fsdp_state()._fsdp_param_groups
        if len(groups) > 1:
            raise ConfigError(
                f"module {names[module]!r} has parameters on several meshes: FSDP2 then takes no "
                "custom communication; shard the parts one by one"
            )
        if groups and id(groups[0]) not in seen:
            seen.add(id(groups[0]))
            _check_free(groups[0], names[module])
            found.append((module, groups[0], _unit(groups[0], module, names)))
    if not found:
        raise ConfigError("model has no parameters that fully_shard has sharded")
    return found


def _check_free(group: Any, name: str) -> None:
    """Raise ConfigError where somebody else has replaced what is to be replaced."""
    for comm in (group._reduce_scatter_comm, group._all_gather_comm):
        if not type(comm).__module__.startswith("torch."):
            raise ConfigError(
                f"module {name!r} has a {type(comm).__name__} of its own already: attach once, or "
                "close() first"
            )
    is_hybrid = isinstance(group.mesh_info, _fsdp_common.HSDPMeshInfo)
    if is_hybrid and group._all_reduce_hook is not None:
        raise ConfigError(f"module {name!r} has an all-reduce hook already: HSDP takes one")


def check_stays_gathered(found: Sequence[tuple[FSDPModule, Any, Unit]]) -> None:
    """Raise ConfigError unless every module keeps its weights from forward to backward."""
    for module, group, unit in found:
        is_root = module._get_fsdp_state()._auto_reshard_after_forward and not unit.name
        if not is_root:
            _check_stays_gathered(group, unit.name)


def _check_stays_gathered(group: Any, name: str) -> None:
    if group.post_forward_mesh_info is not None:
        raise ConfigError(
            f"gather of differences with reshard_after_forward of module {name!r}: must "
            "be False, or backward would compute with other weights than forward"
        )


def parent_group(found: Sequence[tuple[FSDPModule, Any, Unit]]) -> dist.ProcessGroup:
    """A group of all ranks that train the model.

    Ranks: all of them; some may have to make a group.
    """
    ranks = {tuple(_ranks(group)) for _, group, _ in found}
    members = sorted(set().union(*ranks))
    for _, _, unit in found:
        if dist.get_process_group_ranks(unit.shards) == members:
            return unit.shards
    world = dist.group.WORLD
    assert world is not None
    if members == dist.get_process_group_ranks(world):
        return world
    made = dist.new_group(members, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def install(comm: ShardedComm, found: Sequence[tuple[FSDPModule, Any, Unit]]) -> None:
    """Replace what FSDP2 calls, in every module."""
    for module, group, unit in found:
        kept = {name: getattr(group, name) for name in _REPLACED}
        comm.on_close(functools.partial(_restore, group, kept))
        replicas = None
        if unit.replicas is not None:
            replicas = _Replicas(comm, group, unit)
            replicas.take_over(module)
        module.set_custom_reduce_scatter(_ReduceScatter(comm, group, unit, replicas))
        module.set_custom_all_gather(_AllGather(comm, group, unit))
        if comm.compresses:
            module.set_reduce_scatter_unused_params(True, recurse=False)
        if unit.device.type == "cpu":
            # There are no streams to overlap anything: gathers that were prefetched do.
            group.unshard_async_op = True


_REPLACED = (
    *("_reduce_scatter_comm", "_all_gather_comm", "_all_reduce_hook", "mesh_info"),
    *("post_forward_mesh_info", "reduce_scatter_unused_params", "unshard_async_op"),
)


def _restore(group: Any, kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        setattr(group, name, value)


class _Allocating:
    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _ReduceScatter(_Allocating, ReduceScatter):
    """What FSDP2 calls for gradients, on its reduce-scatter stream.

    Which operation it asks for decides how the result is scaled, so plain FSDP2's dividing, before
    and after, by any factor, stays as it is.
    """

    def __init__(
        self, comm: ShardedComm, group: Any, unit: Unit, replicas: "_Replicas | None"
    ) -> None:
        self._comm, self._group, self._unit = comm, group, unit
        self._replicas = replicas

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        del async_op  # FSDP ignores what is returned
        world_size = dist.get_world_size(group)
        self._comm.reduce_scatter(
            self._unit,
            functools.partial(self._layout, input_tensor.numel()),
            output_tensor,
            input_tensor,
            scale=_scale(op, world_size),
            plain=lambda own: reduce_scatter_single(output_tensor, input_tensor, group=own, op=op),
            may_defer=_may_defer(self._group, input_tensor.dtype)
            and not (self._replicas and self._replicas.accumulates),
        )

    def _layout(self, numel: int) -> UnitLayout:
        layout = _trained_layout(self._group, self._unit)
        if layout.chunk * layout.world_size != numel:
            raise ConfigError(
                f"module {self._unit.name!r} reduces {numel} elements: must be "
                f"{layout.chunk * layout.world_size}, those of all its trained parameters; "
                "leave set_reduce_scatter_unused_params(True) as attach() sets it"
            )
        return layout


class _AllGather(_Allocating, AllGather):
    """What FSDP2 calls for weights, on its all-gather streams."""

    def __init__(self, comm: ShardedComm, group: Any, unit: Unit) -> None:
        self._comm, self._group, self._unit = comm, group, unit

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self._comm.sends_differences:
            _check_stays_gathered(self._group, self._unit.name)
        return self._comm.all_gather(
            self._unit, output_tensor, input_tensor, group, is_async=async_op
        )


class _Replicas:
    """HSDP: the all-reduce between replicas, which FSDP2 calls as a hook.

    FSDP2's own cannot be replaced. It is skipped where the group takes its mesh for
    one-dimensional; the parameters keep theirs, so norms and checkpoints see what they saw before.
    """

    def __init__(self, comm: ShardedComm, group: Any, unit: Unit) -> None:
        self._comm, self._group, self._unit = comm, group, unit
        self._partial: Tensor | None = None

    def take_over(self, module: FSDPModule) -> None:
        """Install the hook."""
        mesh = self._group.mesh_info
        fields = {field.name for field in dataclasses.fields(mesh) if field.init}
        own = {name: getattr(mesh, name) for name in fields - {"replicate_mesh_dim"}}
        taken = _fsdp_common.FSDPMeshInfo(**own)
        taken.reduce_scatter_process_group = mesh.reduce_scatter_process_group
        self._group.mesh_info = taken
        if self._group.post_forward_mesh_info == mesh:  # else weights would be sharded anew
            self._group.post_forward_mesh_info = taken
        module.set_all_reduce_hook(self._all_reduce)

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several backwards are added up before the all-reduce."""
        return self._partial is not None or not self._group.all_reduce_grads

    def _all_reduce(self, output: Tensor) -> None:
        if self._partial is not None:
            output.add_(self._partial)
            self._partial = None
        if not self._group.all_reduce_grads:
            self._partial = output.clone()
            output.zero_()
            return
        replicas = self._unit.replicas
        assert replicas is not None
        is_sum = self._group.gradient_divide_factor is not None
        op = dist.ReduceOp.SUM if is_sum else dist.ReduceOp.AVG
        self._comm.all_reduce(
            self._unit,
            functools.partial(_trained_layout, self._group, self._unit),
            output,
            group=replicas,
            scale=dist.get_world_size(replicas) if is_sum else 1.0,
            plain=lambda own: dist.all_reduce(output, group=own, op=op),
            may_defer=_may_defer(self._group, output.dtype),
        )


def _unit(group: Any, module: Any, names: dict[nn.Module, str]) -> Unit:
    mesh: Any = group.mesh_info
    name = plain_name(names[module])
    if not isinstance(mesh, _fsdp_common.FSDPMeshInfo):
        raise ConfigError(f"module {name!r} is not sharded (replicate()): use DDP")
    ranks = dist.get_process_group_ranks(mesh.shard_process_group)
    if ranks != sorted(ranks):
        raise ConfigError(f"module {name!r} has mesh ranks {ranks}: must be in ascending order")
    of_params = [_name(param, names) for param in group.fsdp_params]
    return Unit(
        name=name,
        parameters={
            name: Parameter(_like(param), param.sharded_param.requires_grad)
            for name, param in zip(of_params, group.fsdp_params, strict=True)
        },
        layout=_layout(group.fsdp_params, of_params, len(ranks)),
        shards=mesh.shard_process_group,
        replicas=getattr(mesh, "replicate_process_group", None),
        device=group.device,
    )


def _trained_layout(group: Any, unit: Unit) -> UnitLayout:
    """Of the parameters that required a gradient when they were last gathered."""
    is_trained = [bool(param._unsharded_param.requires_grad) for param in group.fsdp_params]
    if all(is_trained):
        return unit.layout
    params = list(itertools.compress(group.fsdp_params, is_trained))
    names = itertools.compress(unit.parameters, is_trained)
    return _layout(params, list(names), unit.layout.world_size)


def _layout(params: Sequence[Any], names: Sequence[str], world_size: int) -> UnitLayout:
    """As FSDP2 copies gradients in and weights out: chunk after chunk, each of every parameter."""
    parts = []
    for owner in range(world_size):
        offset = 0
        for name, param in zip(names, params, strict=True):
            shard = _shard(param, owner, world_size)
            if shard.size:
                parts.append(Part(name, shard, owner, offset))
            offset += param.padded_sharded_param_size.numel()
    chunk = sum(param.padded_sharded_param_size.numel() for param in params)
    return UnitLayout(tuple(parts), chunk, world_size)


def _shard(param: Any, owner: int, world_size: int) -> Shard:
    size, dim = param._orig_size, param.fsdp_placement.dim
    inner = math.prod(size[dim + 1 :])
    per_rank = -(-size[dim] // world_size)
    begin, end = (min(per_rank * rank, size[dim]) for rank in (owner, owner + 1))
    return Shard(begin * inner, end * inner, size.numel(), math.prod(size[:dim]))


def _like(param: Any) -> Tensor:
    return torch.empty(param._orig_size, dtype=param.sharded_param.dtype, device="meta")


def _name(param: Any, names: dict[nn.Module, str]) -> str:
    info = param._module_info
    return plain_name(f"{names[info.module]}.{info.param_name}".removeprefix("."))


def _scale(op: Any, world_size: int) -> float:
    """By what to multiply the mean for the result of an operation."""
    kind = getattr(op, "op", op)
    if kind == dist.ReduceOp.AVG:
        return 1.0
    if kind == dist.ReduceOp.PREMUL_SUM:
        return float(world_size * op.factor)
    assert kind == dist.ReduceOp.SUM, kind
    return float(world_size)


def _may_defer(group: Any, dtype: torch.dtype) -> bool:
    """Whether FSDP2 only hands the reduced gradients on, as views, until backward is over.

    It looks at them to cast, divide, accumulate or offload them, or for the sake of hooks.
    """
    if dtype != group._orig_dtype or dtype == torch.float16 or group.force_sum_reduction_for_comms:
        return False
    hook = group._all_reduce_hook
    if hook is not None and not isinstance(getattr(hook, "__self__", None), _Replicas):
        return False
    return not any(
        param.sharded_param.grad is not None
        or param.offload_to_cpu
        or getattr(param.sharded_param, "_post_accumulate_grad_hooks", None)
        for param in group.fsdp_params
    )


def _ranks(group: Any) -> Iterator[int]:
    mesh = group.mesh_info
    yield from dist.get_process_group_ranks(mesh.shard_process_group)
    if isinstance(mesh, _fsdp_common.HSDPMeshInfo):
        yield from mesh.mesh.mesh.flatten().tolist()
