"""A model small enough for any test, and a few steps of training it on every rank."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.codecs import LocoCodec
from commrt.hooks.residuals import Shard

IN, OUT = 32, 8
EXEMPT = {"0.bias", "1.weight", "1.bias", "3.bias", "5.weight", "5.bias"}
"""What the default min_numel leaves uncompressed in small_model: 1-D or fewer than 1024."""


def small_model(seed: int = 0) -> nn.Sequential:
    """Weights of 16, 16.5 and 2.1 blocks of 128, and 1-D parameters between them."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(IN, 64),
        nn.LayerNorm(64),
        nn.GELU(),
        nn.Linear(64, 33),
        nn.Tanh(),
        nn.Linear(33, OUT),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, other ones on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    inputs = torch.randn(16, IN, generator=generator)
    return inputs, inputs[:, :OUT].sin()


def backward(model: nn.Module, step: int) -> float:
    """Forward and backward of one batch; returns the loss."""
    inputs, targets = batch(step)
    loss = nn.functional.mse_loss(model(inputs).float(), targets)
    loss.backward()
    return loss.item()


def backward_of_any(model: nn.Module, step: int) -> float:
    """As :func:`backward`, for a model with any number of outputs."""
    inputs, _ = batch(step)
    loss = model(inputs).float().square().mean()
    loss.backward()
    return loss.item()


def train(
    model: nn.Module, steps: Iterable[int], optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    """Train, by default with AdamW; returns the losses of this rank."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(backward(model, step))
        optimizer.step()
    return losses


def weights(model: nn.Module) -> Tensor:
    """All parameters in one fp32 tensor."""
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients by name, without DDP's prefix."""
    return {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal dtype, shape and bits: tells -0.0 from 0.0, and NaN equals itself."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and digest([first]) == digest([second])
    )


def digest(tensors: Iterable[Tensor]) -> str:
    """Equal for equal bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def assert_same_on_all_ranks(*tensors: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Every rank of the group has these bits."""
    digests: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest(tensors), group=group)
    assert len(set(digests)) == 1, digests


def wrap(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """The model under DDP, a copy of it."""
    return DistributedDataParallel(copy.deepcopy(model), **options)


def all_of(checks: Sequence[Callable[[], None]]) -> None:
    """Run checks one after the other: starting ranks takes longer than most of them."""
    for check in checks:
        check()


def local_gradients(
    model: nn.Module, run: Callable[[nn.Module], object]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By name: the mean over ranks of the gradients that ``run`` makes, averaged as plain DDP does
    (bit-equal for two ranks), and the largest magnitude on any rank.
    """
    replica = copy.deepcopy(model)
    replica.zero_grad()
    run(replica)
    means, largest = {}, {}
    for name, gradient in gradients(replica).items():
        # A gradient may be empty, which has no maximum.
        largest[name] = torch.cat([gradient.flatten().abs(), gradient.new_zeros(1)]).max()
        dist.all_reduce(largest[name], op=dist.ReduceOp.MAX)
        means[name] = gradient / dist.get_world_size()
        dist.all_reduce(means[name])
    return means, largest


class Ledger:
    """Sums of one rank's gradients and of the means that came back, in fp64, by name.

    Args:
        model: The module under DDP.
        codec: LoCo; the means come back in fp32, and every parameter is compressed.
        **settings: Of :class:`commrt.Comm`.
    """

    def __init__(self, model: nn.Module, codec: str, **settings: Any) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.comm = commrt.Comm(codec, gather="none", min_numel=1, **settings)
        self.comm.bind(model.named_parameters())
        zeros = {
            name: torch.zeros(parameter.numel(), dtype=torch.float64)
            for name, parameter in model.named_parameters()
        }
        self.given, self.received = copy.deepcopy(zeros), copy.deepcopy(zeros)
        self.rounding = dict.fromkeys(zeros, 0.0)
        self.ranks_per_node = 1
        if self.comm.hierarchy is not None:
            self.ranks_per_node = len(self.comm._nodes[0])

    def hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = self.names[parameter]
            self.given[name] += gradient.flatten()
            self.rounding[name] += 1e-6 * float(gradient.abs().max())
        return commrt.ddp_hook(self.comm, bucket)

    def end_step(self) -> None:
        """Note the means, and how far the residuals can have been rounded to 8 bits."""
        codec = self.comm.codec
        assert isinstance(codec, LocoCodec)
        state = self.comm.state_dict()
        for parameter, name in self.names.items():
            if parameter.grad is not None:
                self.received[name] += parameter.grad.flatten()
            half_a_step = 1.02 * float(residual_of(codec, state, name).abs().max()) / 254
            self.rounding[name] += self.ranks_per_node * half_a_step / (1 - codec.beta)

    def check(self, name: str) -> None:
        """Sum of gradients = W * sum of means + what is still owed, over all ranks: residuals /
        (1 - beta), each of the mean of a node's ranks.
        """
        codec = self.comm.codec
        assert isinstance(codec, LocoCodec)
        kept = residual_of(codec, self.comm.state_dict(), name)
        owed = self.ranks_per_node * kept.double() / (1 - codec.beta)
        given, rounding = self.given[name].clone(), torch.tensor(self.rounding[name])
        for tensor in (owed, given, rounding):
            dist.all_reduce(tensor)
        gap = given - dist.get_world_size() * self.received[name]
        error = float((gap - owed).abs().max())
        assert error <= rounding, (name, error, rounding)
        assert float(gap.abs().max()) > 2 * rounding, "the residuals would not be missed"


def residual_of(codec: LocoCodec, state: Mapping[str, Any], name: str) -> Tensor:
    """The residual in a state dict, of the whole parameter; zeros where other ranks keep it."""
    shards = [Shard(*shard) for shard in state["shards"][name]]
    sizes = [codec.residual_bytes(shard.size) for shard in shards]
    carry = state["carries"].get(name, torch.zeros(sum(shard.size for shard in shards)))
    whole = torch.zeros(shards[0].numel)
    parts = carry.split([shard.size for shard in shards])
    payloads = state["residuals"][name].split(sizes)
    for shard, payload, part in zip(shards, payloads, parts, strict=True):
        errors = torch.empty(shard.size)
        codec.decode_residual(payload, errors)
        errors += (1 - codec.beta) * part
        shard.of(whole).copy_(errors.view(shard.outer, -1))
    return whole


def owed(states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What the mean gradient is still due by the states of all ranks: the sum of the residuals,
    divided by how many ranks keep one of an element.
    """
    codec = commrt.parse(states[0]["codec"])
    assert isinstance(codec, LocoCodec)
    due = {}
    for name in states[0]["residuals"]:
        kept = [Shard(*shard) for state in states for shard in state["shards"][name]]
        num_holders = sum(shard.size for shard in kept) // kept[0].numel
        due[name] = sum(residual_of(codec, state, name) for state in states) / num_holders
    return due


def assert_same_owed(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> None:
    """But for rounding in fp32, although every rank's residual was rounded to its bits anew."""
    expected, found = owed(first), owed(second)
    assert expected.keys() == found.keys()
    for name, due in expected.items():
        assert due.any(), name
        assert (found[name] - due).abs().max() <= 1e-6 * due.abs().max(), name
