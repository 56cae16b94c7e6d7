"""Worlds of one to four ranks, groups, and several models in one process."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import commrt
from commrt.testing import run_ranks
from tests.dist.ddp_checks import assert_close, residuals_of
from tests.dist.small_training import (
    IN,
    OUT,
    all_of,
    assert_same_on_all_ranks,
    backward,
    batch,
    same_bits,
    small_model,
    train,
    weights,
    wrap,
)


def worlds() -> None:
    """Close to plain DDP, which may sum in another order."""
    plain, exact, coded = (wrap(small_model(), bucket_cap_mb=0.005) for _ in range(3))
    commrt.attach(exact, "none")
    comm = commrt.attach(coded)
    backward(coded, 0)
    assert_close(coded, lambda replica: backward(replica, 0))
    for model in (plain, exact, coded):
        train(model, range(3))
    torch.testing.assert_close(weights(plain), weights(exact), rtol=1e-5, atol=1e-7)
    assert_same_on_all_ranks(weights(coded))
    assert f"commrt: {dist.get_world_size()} ranks" in comm.report()
    assert comm.stats().steps == 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_world_sizes(world_size: int) -> None:
    """LoCo near the mean in the first step, the same bits on all ranks."""
    run_ranks(worlds, world_size=world_size)


def groups_of_three_and_one() -> None:
    """At the same time; what they send differs, so what one does cannot have reached the other."""
    members = [0, 2, 3] if dist.get_rank() != 1 else [1]
    own = dist.new_group(members, use_local_synchronization=True)
    model = wrap(small_model(), process_group=own, bucket_cap_mb=0.005)
    comm = commrt.attach(model)
    train(model, range(3))
    assert_same_on_all_ranks(weights(model), group=own)
    assert (comm.stats().wire_bytes > 0) == (len(members) > 1)
    assert f"commrt: {len(members)} ranks" in comm.report()


def test_groups_of_different_sizes() -> None:
    run_ranks(groups_of_three_and_one, world_size=4)


def adversaries(codecs: tuple[str, str] | None) -> tuple[Tensor, list[commrt.Comm]]:
    """Four steps of a generator and a discriminator. The generator's backward goes through both, so
    that buckets of both are on their way at once.
    """
    torch.manual_seed(0)
    generator = wrap(nn.Sequential(nn.Linear(OUT, 64), nn.Tanh(), nn.Linear(64, IN)))
    judge = wrap(nn.Sequential(nn.Linear(IN, 64), nn.Tanh(), nn.Linear(64, 1)))
    models = generator, judge
    comms = [commrt.attach(*pair) for pair in zip(models, codecs, strict=True)] if codecs else []
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for step in range(4):
        real, noise = batch(step)
        for turn, optimizer in enumerate(optimizers):
            fake = generator(noise)
            # One forward for both: DDP allows one before each backward.
            scores = judge(torch.cat([real, fake if turn == 0 else fake.detach()]))
            sign = 1.0 if turn else -1.0
            generator.zero_grad()
            judge.zero_grad()
            (sign * (scores[16:].mean() - scores[:16].mean())).backward()
            optimizer.step()
    return torch.cat([weights(model) for model in models]), comms


def two_models_in_one_backward() -> None:
    plain, _ = adversaries(None)
    exact, _ = adversaries(("none", "none"))
    assert same_bits(plain, exact)
    coded, comms = adversaries(("loco4", "loco2"))
    again, _ = adversaries(("loco4", "loco2"))
    assert_same_on_all_ranks(coded)
    assert same_bits(coded, again)
    assert not same_bits(coded, plain)
    assert not same_bits(coded, adversaries(("loco4", "loco4"))[0])
    assert [comm.stats().steps for comm in comms] == [4, 8]


def ranks_round_independently() -> None:
    """The same gradient on both, so that only the draws can differ."""
    model = wrap(small_model())
    comm = commrt.attach(model, "loco4:rounding=stochastic")
    model(torch.ones(1, IN)).sum().backward()
    residuals: list[Any] = [None] * 2
    dist.all_gather_object(residuals, residuals_of(comm)["0.weight"])
    assert not same_bits(*residuals)


def num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_names)


def train_and_close(settings: dict[str, Any]) -> None:
    model = wrap(small_model())
    comm = commrt.attach(model, **settings)
    train(model, range(2))
    comm.close()
    comm.close()
    assert comm.stats().steps == 2
    with pytest.raises(RuntimeError, match="closed"):
        backward(model, 2)


def closed_comms_leave_nothing() -> None:
    """Groups and sockets of models that are wrapped anew do not pile up: they are used again."""
    counts = []
    for _ in range(3):
        for settings in ({}, {"hierarchy": 1}, {"hierarchy": 2}, {}):
            train_and_close(settings)
        gc.collect()
        counts.append((num_groups(), len(list(Path("/proc/self/fd").iterdir()))))
    assert counts[0] == counts[1] == counts[2]
    commrt.Comm().close()


def test_several_models() -> None:
    """Trained by turns, each with groups, threads and residuals of its own; nothing left behind."""
    checks = [two_models_in_one_backward, ranks_round_independently, closed_comms_leave_nothing]
    run_ranks(all_of, checks, world_size=2)
