"""What must hold of a DDP model with the hook on it, whatever its options."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commrt
from tests.dist.small_training import (
    IN,
    OUT,
    Ledger,
    assert_same_on_all_ranks,
    backward,
    gradients,
    local_gradients,
    same_bits,
    small_model,
    weights,
    wrap,
)

# Half a step of 4 bits in each rank's gradient, 1/14 of its largest element, and half a step of 8
# bits in the mean, 1/254; scales are rounded up to bfloat16, by 1/128 at most.
BOUND = (1 / 14 + 1 / 254 * (1 + 1 / 14)) * (1 + 1 / 128)

Run = Callable[[nn.Module, int], object]
"""Forward and backward of one step."""


def no_bias() -> nn.Sequential:
    """Matrices only."""
    torch.manual_seed(0)
    layers = [nn.Linear(IN, 64, bias=False), nn.Tanh(), nn.Linear(64, 33, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(33, OUT, bias=False))


def residuals_of(comm: commrt.Comm) -> dict[str, Tensor]:
    """As they are stored, by name."""
    return comm.state_dict()["residuals"]


def assert_close(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    atol: float = 1e-8,
    bound: float = BOUND,
) -> None:
    """The gradients of a DDP model, just made by ``run`` with empty residuals, are near the mean
    of the ranks' own, and on all ranks the same.
    """
    means, largest = local_gradients(model.module, run)
    found = gradients(model)
    assert found.keys() == means.keys()
    for name, gradient in found.items():
        error = (gradient.float() - means[name].float()).abs().max()
        assert error <= bound * largest[name].float() + atol, name
    assert_same_on_all_ranks(*found.values())


def assert_plain_semantics(run: Run = backward, atol: float = 1e-8, **options: Any) -> None:
    """With codec "none" the weights of plain DDP, to the bit; with LoCo near the mean at first, and
    the same on all ranks.
    """
    plain, exact, coded = (wrap(small_model(), **options) for _ in range(3))
    commrt.attach(exact, "none")
    commrt.attach(coded)
    run(coded, 0)
    assert_close(coded, lambda replica: run(replica, 0), atol)
    for model in (plain, exact, coded):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            run(model, step)
            optimizer.step()
    assert same_bits(weights(plain), weights(exact))
    assert_same_on_all_ranks(weights(coded))
    assert not same_bits(weights(plain), weights(coded))


def keep_ledger(model: DistributedDataParallel, codec: str, **settings: Any) -> Ledger:
    """Of all that the model will send; with a hook of the ledger's own instead of attach()."""
    ledger = Ledger(model.module, codec, **settings)
    model.register_comm_hook(None, ledger.hook)
    return ledger


def assert_nothing_is_lost(steps: Iterable[int], codec: str, **settings: Any) -> None:
    """Of matrices that are trained: sent, received and still owed add up."""
    model = wrap(no_bias(), bucket_cap_mb=0.005)
    ledger = keep_ledger(model, codec, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        ledger.end_step()
        optimizer.step()
    for name in ledger.given:
        ledger.check(name)


@contextlib.contextmanager
def poisoned(gradients: Mapping[Tensor, Mapping[int, float]]) -> Iterator[None]:
    """Rank 1's gradients of these parameters have these values at these places."""
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 1:
            for parameter, values in gradients.items():
                stack.callback(parameter.register_hook(_poison(values)).remove)
        yield


def _poison(values: Mapping[int, float]) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        for place, value in values.items():
            changed.view(-1)[place] = value
        return changed

    return hook


def assert_bad_in_blocks(model: DistributedDataParallel, weight: Tensor, bad: Tensor) -> None:
    """The gradient of ``weight`` is NaN where ``bad`` is set, all other matrices' are finite."""
    assert weight.grad is not None
    assert torch.equal(weight.grad.flatten().isnan(), bad)
    assert torch.equal(weight.grad.flatten().isfinite(), ~bad)
    for parameter in model.parameters():
        if parameter is not weight and parameter.dim() > 1:
            assert parameter.grad.isfinite().all()
