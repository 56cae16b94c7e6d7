"""How the model is spread over the ranks: DDP, FSDP1, FSDP2 or HSDP."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as full
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.errors import ConfigError
from commrt.hooks import BaseComm
from commrt.hooks.wiring import Codecs
from commrt.optim import StepOptimizer
from commrt.training.config import TrainConfig
from commrt.training.model import GPT, Block


def check(config: TrainConfig) -> None:
    """Raise ConfigError where the codecs do not fit together or to ``config.parallel``."""
    codecs: dict[str, Any] = {"intra": config.intra, "small": config.small}
    if config.parallel == "ddp":
        hierarchy = config.hierarchy or None
        commrt.Comm(config.codec, config.gather, hierarchy=hierarchy, **codecs)
    else:
        Codecs.parse(config.codec, weights=config.gather or "none", gather="block8", **codecs)


def wrap(model: GPT, config: TrainConfig, device: torch.device) -> nn.Module:
    """Wrap the model as ``config.parallel`` says; a unit of FSDP is a block, and the rest.

    Ranks: all must call.

    Raises:
        ConfigError: The ranks cannot be divided into groups of ``config.hierarchy``.
    """
    if config.parallel == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if config.parallel == "fsdp1":
        policy = ModuleWrapPolicy({Block})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=device, use_orig_params=True
        )
    world_size, ranks = dist.get_world_size(), config.hierarchy
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    if config.parallel == "hsdp":
        if world_size % ranks:
            raise ConfigError(f"hierarchy is {ranks}: it must divide the {world_size} ranks")
        shape = world_size // ranks, ranks
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return shard_blocks(model, mesh, reshard_after_forward=not config.keep_gathered)


def shard_blocks(
    model: GPT, mesh: DeviceMesh, *, reshard_after_forward: bool = True, **options: Any
) -> GPT:
    """``fully_shard`` the blocks, and the rest; on a CPU the next two blocks are gathered ahead.

    Without streams FSDP2 would gather one block after the other, with nothing beside; with one
    ahead the network is idle whenever a gather has just ended.
    """
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, **options)
    if mesh.device_type == "cpu":
        units: list[FSDPModule] = [model, *model.blocks]  # type: ignore[list-item]
        for place, unit in enumerate(units):
            unit.set_modules_to_forward_prefetch(units[place + 1 : place + 3])
            before = units[max(place - 2, 1) : place] if place else units[-2:]
            unit.set_modules_to_backward_prefetch(before[::-1])
    return model


def attach(model: nn.Module, config: TrainConfig) -> BaseComm:
    """Put commrt on the wrapped model. Ranks: all must call."""
    hierarchy = None if config.parallel == "hsdp" else config.hierarchy or None
    return commrt.attach(
        model,
        config.codec,
        config.gather,
        seed=config.seed,
        warmup=config.codec_warmup,
        hierarchy=hierarchy,
        intra=config.intra,
        small=config.small,
    )


def gather_spec(comm: BaseComm) -> str | None:
    """The codec of the return leg, or of a sharded model's weights; None if there is none."""
    codecs = comm.codecs
    if isinstance(comm, commrt.ShardedComm):
        return codecs.weights.spec
    return None if codecs.codec.spec == "none" else codecs.gather.spec


def clip_gradients(model: nn.Module, largest: float) -> None:
    """Scale the gradients down to a norm of ``largest``. Ranks: all must call."""
    if isinstance(model, FullyShardedDataParallel):
        model.clip_grad_norm_(largest)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), largest)


def state_dicts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state as one rank would have them, on rank 0; the same of any wrapping.

    Ranks: all must call.
    """
    # On a CPU there is nothing to offload, and FSDP1's offloading then crashes (torch 2.13).
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    options = full.StateDictOptions(full_state_dict=True, cpu_offload=not is_on_cpu)
    weights, moments = full.get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def load_state_dicts(
    model: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, Any]
) -> None:
    """Load what `state_dicts` returned. Ranks: all must call, with all of it."""
    moments = states["optimizer"]
    if isinstance(model, FullyShardedDataParallel) and isinstance(optimizer, StepOptimizer):
        found = moments["state"].items()
        moments = {**moments, "state": {name: optimizer.as_adamw(own) for name, own in found}}
    full.set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=moments,
        options=full.StateDictOptions(full_state_dict=True),
    )
    for group in optimizer.param_groups:
        group["betas"] = tuple(group["betas"])  # torch makes them a list
