"""Every kind of data parallelism with every feature.

Bit-identical: codec "none" and the kind without commrt; LoCo's gradients on all ranks. To
tolerance: LoCo's first gradients, near the ranks' mean.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.testing import run_ranks
from tests.dist.sharded_checks import (
    KINDS,
    ONE_WAY_BOUND,
    clean,
    clip,
    no_sync,
    train,
    whole_gradients,
    whole_weights,
    wrap_as,
)
from tests.dist.small_training import assert_same_on_all_ranks, backward, same_bits, small_model

FEATURES = ("accumulate", "clip", "bf16", "unused")
# The mean comes back at 8 bits, where it comes back; bfloat16 rounds gradients and their mean.
BOUND = ONE_WAY_BOUND + 1 / 254 * (1 + ONE_WAY_BOUND) * (1 + 1 / 128)
BF16_BOUND = BOUND + 3 / 256


class WithUnused(nn.Module):
    """A layer that no rank uses in odd steps; the first element of the batch says which."""

    def __init__(self) -> None:
        super().__init__()
        self.used = small_model()
        torch.manual_seed(1)
        self.sometimes = nn.Linear(32, 64)
        self.is_used = True

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.used(inputs)
        if self.is_used:
            outputs = outputs + self.sometimes(inputs)[:, :8].tanh()
        return outputs


def run_of(feature: str):
    def run(model: nn.Module, step: int) -> float:
        if feature == "unused":
            for module in model.modules():
                if isinstance(module, WithUnused):
                    module.is_used = step % 2 == 0
        if feature == "accumulate" and hasattr(model, "set_requires_gradient_sync") | hasattr(
            model, "no_sync"
        ):
            with no_sync(model):
                backward(model, 100 + step)
        elif feature == "accumulate":
            backward(model, 100 + step)
        return backward(model, step)

    return run


def wrapped(kind: str, feature: str) -> nn.Module:
    model = WithUnused() if feature == "unused" else small_model()
    if kind == "ddp" and feature == "unused":
        return DistributedDataParallel(model, find_unused_parameters=True)
    return wrap_as(kind, model, is_bf16=feature == "bf16")


@contextlib.contextmanager
def inputs_in(dtype: torch.dtype) -> Iterator[None]:
    """DDP's model is in bfloat16 as a whole, and so must be its inputs."""
    before = nn.Linear.forward

    def forward(self: nn.Linear, inputs: Tensor) -> Tensor:
        return before(self, inputs.to(dtype))

    nn.Linear.forward = forward  # type: ignore[method-assign]
    yield
    nn.Linear.forward = before  # type: ignore[method-assign]


def check_cell(kind: str, feature: str) -> None:
    run, largest = run_of(feature), 0.05 if feature == "clip" else None
    is_bf16_ddp = (kind, feature) == ("ddp", "bf16")
    with inputs_in(torch.bfloat16) if is_bf16_ddp else contextlib.nullcontext():
        plain, exact, coded = (wrapped(kind, feature) for _ in range(3))
        commrt.attach(exact, "none")
        comm = commrt.attach(coded, "loco4", min_numel=64)
        check_first_gradients(coded, kind, feature)
        losses = [train(model, range(4), run, largest=largest) for model in (plain, exact, coded)]
        assert losses[0] == losses[1]
        weights = whole_weights(exact)
        for name, weight in whole_weights(plain).items():
            assert same_bits(weight, weights[name]), name
        assert losses[2] != losses[0]
        assert losses[2] == pytest.approx(losses[0], rel=0.05)
        assert comm.stats().steps == 5
        assert comm.residual_norm() > 0
        if largest is not None:
            norms = torch.stack([g.norm() for g in whole_gradients(coded).values()])
            torch.testing.assert_close(norms.norm(), torch.tensor(largest), rtol=1e-3, atol=0)
            assert clip(coded, 1.0) == pytest.approx(largest, rel=1e-3)


def check_first_gradients(model: nn.Module, kind: str, feature: str) -> None:
    run = run_of(feature)
    replica = WithUnused() if feature == "unused" else small_model()
    if feature == "bf16":
        replica = replica.bfloat16()
        with inputs_in(torch.bfloat16):
            run(replica, 0)
    else:
        run(replica, 0)
    run(model, 0)
    found = whole_gradients(model)
    for name, parameter in replica.named_parameters():
        mean, largest = parameter.grad.float(), parameter.grad.float().abs().max()
        mean = mean / dist.get_world_size()
        dist.all_reduce(mean)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        error = (found[clean(name)].float() - mean).abs().max()
        assert error <= (BF16_BOUND if feature == "bf16" else BOUND) * largest + 1e-8, name
    assert_same_on_all_ranks(*found.values())


def check_row(kind: str) -> None:
    for feature in FEATURES:
        check_cell(kind, feature)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row(kind: str) -> None:
    run_ranks(check_row, kind, world_size=4, timeout_s=120)
