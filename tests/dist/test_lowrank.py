"""Low-rank all-reduce under DDP.

Bit-identical: weights and bases of all ranks; a resumed run. To tolerance: the mean of gradients
that are of low rank themselves, and the sum of what was sent and what is still owed.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import commrt
from commrt.errors import PeerMismatchError
from commrt.testing import run_ranks
from tests.dist.small_training import (
    all_of,
    assert_same_on_all_ranks,
    backward,
    digest,
    gradients,
    local_gradients,
    same_bits,
    small_model,
    train,
    weights,
    wrap,
)


class Product(nn.Module):
    """The gradient of its weight is its input."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape, dtype=dtype))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


def reduced(model: nn.Module, gradient: Tensor) -> Tensor:
    """The mean that DDP and the hook make of each rank's gradient."""
    model.zero_grad()
    model(gradient.to(model.module.weight.dtype)).backward()
    return model.module.weight.grad.clone()


def mean_over_ranks(gradient: Tensor) -> Tensor:
    mean = gradient.double() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean


def random_matrix(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    return torch.randn(*shape, generator=generator)


def gradients_of_low_rank_arrive() -> None:
    """All ranks' gradients share a column space of rank 2: in any shape and dtype their mean comes
    back, but for the codes of 8 bits.
    """
    for shape in ((64, 128), (100, 77), (33, 300), (16, 8, 4, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            model = wrap(Product(*shape, dtype=dtype))
            commrt.attach(model, "lowrank2")
            generator = torch.Generator().manual_seed(5)
            columns = torch.randn(shape[0], 2, generator=generator)
            rows = random_matrix(2, torch.Size(shape).numel() // shape[0], seed=5)
            gradient = (columns @ rows).view(shape)
            found, mean = reduced(model, gradient), mean_over_ranks(gradient)
            error = float((found.double() - mean).norm() / mean.norm())
            assert error < 0.05, (shape, dtype, error)
            assert_same_on_all_ranks(found)


def nothing_is_lost() -> None:
    """Sum of gradients = W sum of means + residuals, over all ranks, but for the rounding of the
    residuals in storage, a step of 8 bits in every round; gradients are of full rank.
    """
    shape = (48, 96)
    for codec in ("lowrank2", "lowrank4:bits=4,basis=4"):
        model = wrap(Product(*shape))
        comm = commrt.attach(model, codec, gather="none")
        given = torch.zeros(shape, dtype=torch.float64)
        received, rounding = given.clone(), torch.zeros((), dtype=torch.float64)
        for step in range(20):
            gradient = random_matrix(*shape, seed=step)
            given += gradient
            received += reduced(model, gradient)
            owed = owed_by(comm, shape)
            rounding += 1.02 * owed.abs().max() / 127
        for tensor in (given, owed, rounding):
            dist.all_reduce(tensor)
        gap = given - dist.get_world_size() * received
        assert (gap - owed).abs().max() <= rounding + 1e-4
        # The bound is for the worst case; rounding does far less, and what is owed is far more.
        assert (gap - owed).norm() < 0.1 * owed.norm()


def owed_by(comm: commrt.Comm, shape: tuple[int, int]) -> Tensor:
    errors = torch.empty(shape).flatten()
    comm.codec.decode_residual(comm.state_dict()["residuals"]["weight"], errors)
    return errors.view(shape).double()


def ranks_stay_identical_and_learn() -> None:
    runs = {}
    for codec, settings in (
        ("none", {}),
        ("lowrank4", {}),
        ("lowrank4", {"small": "block8"}),
        ("lowrank2:bits=4,block=32", {"gather": "none", "warmup": 3}),
    ):
        model = wrap(small_model(), bucket_cap_mb=0.005)
        comm = commrt.attach(model, codec, **settings)
        runs[codec, *settings] = train(model, range(30))[-1]
        assert_same_on_all_ranks(weights(model), *comm.state_dict()["bases"].values())
        stats = comm.stats()
        assert stats.steps == 30
        if codec != "none":
            assert 0 < stats.wire_bytes < 0.7 * stats.dense_bytes
            assert (stats.exact_bytes == 0) == ("small" in settings)
    assert all(loss < 1.5 * runs[("none",)] for loss in runs.values()), runs


def what_does_not_pay_is_exact() -> None:
    model = wrap(small_model())
    comm = commrt.attach(model, "lowrank16", min_numel=0)
    backward(model, 0)
    means, _ = local_gradients(model.module, lambda replica: backward(replica, 0))
    for name, gradient in gradients(model).items():
        assert same_bits(gradient, means[name]), name
    assert "factors of rank 16 would not be half as large (0.weight, ...)" in comm.report()


def bad_gradients_reach_all_and_no_residual() -> None:
    model = wrap(Product(48, 96))
    comm = commrt.attach(model, "lowrank2")
    for step in range(3):
        reduced(model, random_matrix(48, 96, seed=step))
    before = comm.state_dict()
    gradient = random_matrix(48, 96, seed=3)
    if dist.get_rank() == 1:
        gradient[5, 7] = torch.nan
    assert reduced(model, gradient).isnan().any()
    after = comm.state_dict()
    for part in ("residuals", "bases"):
        assert same_bits(before[part]["weight"], after[part]["weight"]), part
    assert reduced(model, random_matrix(48, 96, seed=4)).isfinite().all()
    assert_same_on_all_ranks(comm.state_dict()["bases"]["weight"])


class Unused(nn.Module):
    """Only even steps use the second weight, on no rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 64, bias=False) for _ in range(2))
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        total = self.layers[0](x)
        return (total + self.layers[1](x) if self.step % 2 else total)[:, :8]


def unused_parameters_keep_residual_and_basis() -> None:
    model = wrap(Unused(), find_unused_parameters=True)
    comm = commrt.attach(model, "lowrank2")
    for step in range(6):
        model.module.step = step
        before = comm.state_dict()
        model.zero_grad()
        backward(model, step)
        after = comm.state_dict()
        for part in ("residuals", "bases"):
            is_same = same_bits(before[part]["layers.1.weight"], after[part]["layers.1.weight"])
            assert is_same == (step % 2 == 0), (part, step)


def disagreeing_arithmetic_is_refused() -> None:
    torch.set_num_threads(1 + dist.get_rank() % 2)
    with pytest.raises(PeerMismatchError, match="disagree on threads: rank 0: 1, rank 1: 2"):
        commrt.attach(wrap(small_model()), "lowrank2")
    torch.set_num_threads(1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_low_rank_gradients(world_size: int) -> None:
    checks = [gradients_of_low_rank_arrive, nothing_is_lost, ranks_stay_identical_and_learn]
    run_ranks(all_of, checks, world_size=world_size)


def test_special_gradients_and_parameters() -> None:
    checks = [
        what_does_not_pay_is_exact,
        bad_gradients_reach_all_and_no_residual,
        unused_parameters_keep_residual_and_basis,
        disagreeing_arithmetic_is_refused,
    ]
    run_ranks(all_of, checks, world_size=2)


def train_and_save(folder: Path) -> str:
    model = wrap(small_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    comm = commrt.attach(model, "lowrank4")
    train(model, range(4), optimizer)
    parts = {"model": model, "optimizer": optimizer, "comm": comm}
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state, folder / f"{dist.get_rank()}.pt")
    train(model, range(4, 8), optimizer)
    return digest([weights(model)])


def load_and_train(folder: Path) -> str:
    model = wrap(small_model(seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    comm = commrt.attach(model, "lowrank4")
    files = [folder / f"{rank}.pt" for rank in range(2)]
    states = [torch.load(file, weights_only=True) for file in files]
    is_same_world = dist.get_world_size() == len(states)
    state = states[dist.get_rank() if is_same_world else 0]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    comm.load_state_dict(state["comm"] if is_same_world else [each["comm"] for each in states])
    assert_same_on_all_ranks(*comm.state_dict()["bases"].values())
    train(model, range(4, 8), optimizer)
    assert_same_on_all_ranks(weights(model))
    return digest([weights(model)])


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    """To the bit; and three ranks go on from two."""
    found = run_ranks(train_and_save, tmp_path, world_size=2)
    assert run_ranks(load_and_train, tmp_path, world_size=2) == found
    run_ranks(load_and_train, tmp_path, world_size=3)
