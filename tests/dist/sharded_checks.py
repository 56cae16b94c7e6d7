"""Small models under FSDP1, FSDP2 and HSDP, and what must hold of them with commrt on."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from commrt.codecs import LocoCodec
from commrt.hooks import BaseComm
from tests.dist.small_training import IN, OUT, owed, small_model

# Half a step of 4 bits in each rank's gradient, 1/14 of its largest element; scales are rounded up
# to bfloat16, by 1/128 at most.
ONE_WAY_BOUND = (1 / 14) * (1 + 1 / 128)

KINDS = ("ddp", "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "fsdp2", "fsdp2-keep", "fsdp2-2", "hsdp")
"""DDP; FSDP1's strategies; FSDP2 that frees weights after forward, keeps them, or frees them but
for a group of two ranks; HSDP of two replicas of two shards each."""


def mesh_of(kind: str) -> DeviceMesh:
    """For FSDP2 over all ranks."""
    world_size = dist.get_world_size()
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (world_size,))


def shard(model: nn.Module, kind: str = "fsdp2", *, mesh: DeviceMesh | None = None, **options: Any):
    """Under FSDP2: every layer with parameters is a unit, and so is the rest."""
    reshard: Any = {"fsdp2-keep": False, "fsdp2-2": 2}.get(kind, True)
    settings = {"mesh": mesh or mesh_of(kind), "reshard_after_forward": reshard, **options}
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **settings)
    fully_shard(model, **settings)
    return model


def wrap_as(kind: str, model: nn.Module | None = None, *, is_bf16: bool = False) -> nn.Module:
    """The model, by default the small one, as ranks share it; computing in bfloat16 if asked."""
    model = small_model() if model is None else model
    if kind == "ddp":
        return DistributedDataParallel(model.bfloat16() if is_bf16 else model)
    if kind.isupper():
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NO_SHARD is deprecated
            return FullyShardedDataParallel(
                model,
                sharding_strategy=ShardingStrategy[kind],
                device_id=torch.device("cpu"),
                use_orig_params=True,
                mixed_precision=MixedPrecision(**half) if is_bf16 else None,
            )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    return shard(model, kind, **({"mp_policy": policy} if is_bf16 else {}))


def clip(model: nn.Module, largest: float) -> Tensor:
    """The gradient's norm, which is cut down to ``largest``."""
    if isinstance(model, FullyShardedDataParallel):
        return model.clip_grad_norm_(largest)
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Gradients are accumulated on every rank inside."""
    if not isinstance(model, FSDPModule):
        with model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, however it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Full-precision weights by name."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {clean(n): p.detach().clone() for n, p in model.named_parameters()}
    return {clean(name): whole(parameter) for name, parameter in model.named_parameters()}


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Reduced gradients by name."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True, writeback=False):
            return {clean(n): p.grad.detach().clone() for n, p in model.named_parameters()}
    return {
        clean(name): whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def clean(name: str) -> str:
    """Without what wrappers add."""
    for part in ("module.", "_fsdp_wrapped_module.", "_orig_mod."):
        name = name.replace(part, "")
    return name


def no_bias() -> nn.Sequential:
    """Matrices only, one of them with uneven shards."""
    torch.manual_seed(0)
    layers = [nn.Linear(IN, 64, bias=False), nn.Tanh(), nn.Linear(64, 39, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(39, OUT * 4, bias=False))


def states_of_all(comm: BaseComm) -> list[dict[str, Any]]:
    """The state dicts of all ranks."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, comm.state_dict())
    return states


@dataclasses.dataclass
class Ledger:
    """What the mean gradient was and what came of it, in fp64, by name.

    Args:
        comm: LoCo; every parameter is compressed, and weights are gathered as they are.
    """

    comm: BaseComm
    given: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    received: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def take(
        self, model: nn.Module, replica: nn.Module, run: Callable[[nn.Module], object]
    ) -> None:
        """Run on the model and, for the ranks' own gradients, on a replica with its weights."""
        replica.load_state_dict(whole_weights(model))
        replica.zero_grad()
        run(replica)
        run(model)
        for name, parameter in replica.named_parameters():
            mean = parameter.grad.double() / dist.get_world_size()
            dist.all_reduce(mean)
            self.given[name] = self.given.get(name, 0) + mean
        for name, gradient in whole_gradients(model).items():
            self.received[name] = self.received.get(name, 0) + gradient.double()

    def check(self, tolerance: float) -> None:
        """Sum of means = sum of what was received + what is still owed, residuals / (1 - beta)."""
        codec = self.comm.codec
        assert isinstance(codec, LocoCodec)
        due = owed(states_of_all(self.comm))
        assert due.keys() == self.given.keys()
        for name, residual in due.items():
            gap = (self.given[name] - self.received[name]).flatten()
            expected = residual.double() / (1 - codec.beta)
            error = (gap - expected).abs().max()
            scale = self.given[name].abs().max()
            assert error <= tolerance * scale, (name, error / scale)
            assert gap.abs().max() > 2 * tolerance * scale, "residuals would not be missed"


def train(
    model: nn.Module,
    steps: Iterable[int],
    run: Callable[[nn.Module, int], float],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    largest: float | None = None,
) -> list[float]:
    """Losses of this rank, with AdamW and gradients clipped if asked."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(run(model, step))
        if largest is not None:
            clip(model, largest)
        optimizer.step()
    return losses
