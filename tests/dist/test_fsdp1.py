"""FSDP1 with commrt on, what the matrix leaves open: nested units, flat parameters, precision.

Bit-identical: codec "none" and FSDP1 without commrt. To tolerance: LoCo's first gradients.
"""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import commrt
from commrt.errors import ConfigError
from commrt.testing import run_ranks
from tests.dist.sharded_checks import ONE_WAY_BOUND, clip, train, whole_gradients
from tests.dist.small_training import all_of, assert_same_on_all_ranks, backward, small_model

CPU = torch.device("cpu")


def wrap(**options: Any) -> FullyShardedDataParallel:
    """Every Linear is a unit, and so is the rest."""
    policy = ModuleWrapPolicy({nn.Linear})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            small_model(), auto_wrap_policy=policy, device_id=CPU, **options
        )


def nested() -> None:
    """Names are those of the bare model, with original parameters or flat ones."""
    for options in (
        {"use_orig_params": True},
        {"use_orig_params": False},
        {"use_orig_params": True, "sharding_strategy": ShardingStrategy.NO_SHARD},
        {"use_orig_params": True, "mixed_precision": MixedPrecision(reduce_dtype=torch.bfloat16)},
    ):
        plain, exact, coded = (wrap(**options) for _ in range(3))
        commrt.attach(exact, "none")
        comm = commrt.attach(coded, "loco4:block=32", min_numel=64)
        assert set(comm.state_dict()["residuals"]) == {"0.weight", "3.weight", "5.weight"}
        losses = [train(model, range(4), backward, largest=0.1) for model in (plain, exact, coded)]
        assert losses[0] == losses[1]
        assert losses[2] == pytest.approx(losses[0], rel=0.05)
        assert comm.residual_norm() > 0
        assert clip(coded, 1.0) == pytest.approx(0.1, rel=1e-2)


def first_gradients() -> None:
    model, replica = wrap(use_orig_params=True), small_model()
    commrt.attach(model, min_numel=64)
    backward(model, 0)
    backward(replica, 0)
    found = whole_gradients(model)
    for name, parameter in replica.named_parameters():
        mean, largest = parameter.grad / dist.get_world_size(), parameter.grad.abs().max()
        dist.all_reduce(mean)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        assert (found[name] - mean).abs().max() <= ONE_WAY_BOUND * largest + 1e-8, name
    assert_same_on_all_ranks(*found.values())


def refusals() -> None:
    model = wrap(use_orig_params=True)
    backward(model, 0)  # settles which part is the root
    with pytest.raises(ConfigError, match="attach to the whole"):
        commrt.attach(model.module[0])
    for strategy in ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"):
        hybrid = FullyShardedDataParallel(
            small_model(),
            device_id=CPU,
            sharding_strategy=ShardingStrategy[strategy],
            process_group=(dist.group.WORLD, dist.new_group([dist.get_rank()])),
        )
        with pytest.raises(ConfigError, match=f"strategy {strategy}: FSDP1 calls no hook"):
            commrt.attach(hybrid)


@pytest.mark.parametrize("world_size", [2, 3])
def test_units(world_size: int) -> None:
    run_ranks(all_of, [nested, first_gradients, refusals], world_size=world_size, timeout_s=90)
