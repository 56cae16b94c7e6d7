"""What a user of DDP or FSDP could use, by name: torch's own and commrt's.

noop                local gradients: compute alone
empty               local gradients, for which ranks wait bucket by bucket, as LoCo's two legs do
fp32                plain DDP
fp16                torch's fp16_compress_hook
powersgd:RANK       torch's powerSGD_hook
CODEC or CODEC/GATHER   commrt.attach, such as loco4 or loco2/block2

Further options of commrt.attach follow a "+": lowrank8+small=block8. With "+intra=CODEC" there are
two levels.

fsdp1, fsdp2        plain FSDP, every block a unit, weights freed after forward
fsdp2-bf16          FSDP2 that computes, gathers and reduces in bfloat16
fsdp2-a2a, fsdp2-bf16-a2a   the same with a reduce-scatter by all-to-all: gloo's own sends as many
                    bytes as an all-reduce
fsdp2:CODEC/GATHER  commrt.attach, the codecs of gradients and weights; also fsdp1:, fsdp2-bf16: and
                    hsdp: (shards inside nodes, replicas between them)
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.collectives import ThreadPipeline
from commrt.collectives.exchange import exchange_payloads
from commrt.hooks import BaseComm
from commrt.training.model import GPT, Block
from commrt.training.parallel import shard_blocks

# One bucket: with more, torch's PowerSGD aborts on gloo, and small messages wait for each other.
WHOLE_MODEL_MB = 1 << 20


@dataclasses.dataclass
class Method:
    """A wrapped model with a method's hook; ``comm`` is None for those that are not commrt's."""

    model: nn.Module
    comm: BaseComm | None


class EmptyLegs:
    """The two legs of a bucket without their messages: what waiting for each other takes."""

    def __init__(self) -> None:
        self._groups = dist.new_group(), dist.new_group()
        self._pipeline = ThreadPipeline()

    def hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduce_group, gather_group = self._groups
        buffer = bucket.buffer()

        def gather(_: object) -> Tensor:
            dist.barrier(gather_group)
            return buffer

        return self._pipeline.submit(lambda: dist.barrier(reduce_group), gather)


def bucket_cap_mb(name: str) -> float | None:
    """What the method needs; None if any size will do."""
    return WHOLE_MODEL_MB if name.startswith(("powersgd:", "lowrank")) else None


class AllToAll(ReduceScatter):
    """A plain reduce-scatter that sends no more than it must: the mean, in the input's precision.

    The best baseline there is on gloo: commrt's exchange, without its codecs.
    """

    def __init__(self) -> None:
        self._group = dist.new_group()

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.AVG
        world_size = dist.get_world_size()
        send = input_tensor.view(torch.uint8)
        received = torch.empty_like(send)
        own = send.numel() // world_size
        exchange_payloads(received, send, own, [own] * world_size, self._group)
        parts = received.view(input_tensor.dtype).view(world_size, -1)
        output_tensor.copy_(parts.sum(dim=0, dtype=torch.float32).div_(world_size))


def install_sharded(name: str, model: GPT) -> Method:
    """Shard the model and attach commrt, if asked. Ranks: all, started by torchrun."""
    kind, _, spec = name.partition(":")
    kind, *variants = kind.split("-")
    ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    if kind == "fsdp1":
        policy = ModuleWrapPolicy({Block})
        cpu = torch.device("cpu")
        sharded: nn.Module = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True
        )
    else:
        shape = (dist.get_world_size() // ranks, ranks) if kind == "hsdp" else (-1,)
        names = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh(
            "cpu", shape if kind == "hsdp" else (dist.get_world_size(),), mesh_dim_names=names
        )
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        options = {"mp_policy": half} if "bf16" in variants else {}
        sharded = shard_blocks(model, mesh, **options)
    if "a2a" in variants:
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(AllToAll())
    if not spec:
        return Method(sharded, None)
    codec, gather, settings = parse_spec(spec)
    return Method(sharded, commrt.attach(sharded, codec, gather, **settings))


def parse_spec(spec: str) -> tuple[str, str | None, dict[str, Any]]:
    """The codec, the gather codec and the other settings of commrt.attach."""
    codecs, *pairs = spec.split("+")
    codec, _, gather = codecs.partition("/")
    settings: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
    if "hierarchy" in settings or "intra" in settings:
        settings["hierarchy"] = int(os.environ["LOCAL_WORLD_SIZE"])
    return codec, gather or None, settings


def install(
    name: str,
    model: GPT,
    *,
    seed: int = 0,
    bucket_mb: float | None = None,
    prepare: Callable[[DistributedDataParallel], None] | None = None,
) -> Method:
    """Wrap the model, prepare it, and register the method. Ranks: all, started by torchrun."""
    if name.startswith(("fsdp", "hsdp")):
        return install_sharded(name, model)
    ddp = DistributedDataParallel(
        model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_cap_mb(name) or bucket_mb
    )
    if prepare is not None:
        prepare(ddp)
    comm = None
    if name == "fp16":
        ddp.register_comm_hook(None, fp16_compress_hook)
    elif name.startswith("powersgd:"):
        rank = int(name.removeprefix("powersgd:"))
        state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook)
    elif name == "empty":
        ddp.register_comm_hook(None, EmptyLegs().hook)
    elif name != "fp32":
        codec, gather, settings = parse_spec(name)
        comm = commrt.attach(ddp, codec, gather, seed=seed, **settings)
    return Method(ddp, comm)
