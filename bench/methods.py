"""What a user of DDP could register, by name: torch's own hooks and commrt's codecs.

noop                local gradients: compute alone
empty               local gradients, for which ranks wait bucket by bucket, as LoCo's two legs do
fp32                plain DDP
fp16                torch's fp16_compress_hook
powersgd:RANK       torch's powerSGD_hook
CODEC or CODEC/GATHER   commrt.attach, such as loco4 or loco2/block2

Further options of commrt.attach follow a "+": lowrank8+small=block8. With "+intra=CODEC" there are
two levels.
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
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.collectives import ThreadPipeline

# One bucket: with more, torch's PowerSGD aborts on gloo, and small messages wait for each other.
WHOLE_MODEL_MB = 1 << 20


@dataclasses.dataclass
class Method:
    """A model under DDP with a method's hook; ``comm`` is None for those that are not commrt's."""

    ddp: DistributedDataParallel
    comm: commrt.Comm | None


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


def install(
    name: str,
    model: nn.Module,
    *,
    seed: int = 0,
    bucket_mb: float | None = None,
    prepare: Callable[[DistributedDataParallel], None] | None = None,
) -> Method:
    """Wrap the model, prepare it, and register the method. Ranks: all, started by torchrun."""
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
        spec, *pairs = name.split("+")
        codec, _, gather = spec.partition("/")
        settings: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
        if "intra" in settings:
            settings["hierarchy"] = int(os.environ["LOCAL_WORLD_SIZE"])
        comm = commrt.attach(ddp, codec, gather or None, seed=seed, **settings)
    return Method(ddp, comm)
