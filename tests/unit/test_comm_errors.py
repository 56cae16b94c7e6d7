"""Mistakes that commrt.Comm and commrt.attach find by themselves: no process group is needed,
so nothing can have been sent.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commrt
from commrt.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "loco3"}, r"'loco3' has 3 bits: must be one of \(1, 2, 4, 8\)"),
        (
            {"codec": "loco4:block=100"},
            r"block=100: must be one of \(32, 64, 128, 256, 512, 1024\)",
        ),
        ({"codec": "loco4:beta=1"}, r"beta=1.0: must be in \[0, 1\)"),
        ({"codec": "fp8"}, "codec='fp8': must be a spec such as 'loco4'"),
        ({"codec": 4}, "codec=4: must be a spec string such as 'loco4'"),
        ({"gather": "block8:block=64"}, "gather has block=64: must be the codec's 128"),
        ({"gather": commrt.parse("block8:block=64")}, "gather has block=64: must be the codec's"),
        ({"gather": "loco8"}, "gather='loco8:.*': must be 'none' or a block codec that rounds"),
        ({"gather": "block8:rounding=stochastic"}, "must be 'none' or a block codec that rounds"),
        ({"gather": "block3"}, "'block3.*' has 3 bits: must be one of"),
        ({"min_numel": -1}, "min_numel=-1: must be an integer of at least 0"),
        ({"min_numel": 1.5}, "min_numel=1.5: must be an integer of at least 0"),
        ({"warmup": -1}, "warmup=-1: must be an integer of at least 0"),
        ({"warmup": 0.5}, "warmup=0.5: must be an integer of at least 0"),
        ({"gather": ""}, "must be a spec such as 'loco4'"),
        ({"gather": "noop"}, "gather='noop': must be 'none' or a block codec that rounds"),
        ({"gather": "lowrank8"}, "gather='lowrank8:.*': must be 'none' or a block codec"),
        ({"intra": "noop"}, "intra='noop': must be 'none' or a block codec that rounds"),
        ({"intra": "loco4"}, "intra='loco4:.*': must be 'none' or a block codec that rounds"),
        ({"intra": "block8:rounding=stochastic"}, "intra='block8:.*': must be 'none' or a block"),
        ({"intra": "block8:block=64"}, "intra has block=64: must be the codec's 128"),
        ({"intra": "block3"}, "'block3.*' has 3 bits: must be one of"),
        ({"small": "loco4"}, "small='loco4:.*': must be 'none' or a block codec that rounds"),
        ({"small": "noop"}, "small='noop': must be 'none' or a block codec that rounds"),
    ],
)
def test_bad_settings_name_the_value_and_what_is_allowed(
    settings: dict[str, Any], message: str
) -> None:
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match=message):
        commrt.Comm(**settings)


@pytest.mark.parametrize(
    "collective",
    [
        lambda tensor: commrt.all_reduce_(tensor, codec="noop"),
        lambda tensor: commrt.all_reduce_(tensor, codec="block8", gather="noop"),
        lambda tensor: commrt.reduce_scatter(tensor, codec="noop"),
        lambda tensor: commrt.all_gather(tensor, codec="noop"),
    ],
)
def test_a_collective_that_sends_nothing_is_refused(collective: Callable[[Tensor], Any]) -> None:
    """Its result would be wrong: only a hook can leave gradients alone."""
    tensor = torch.ones(4)
    with pytest.raises(ConfigError, match="'noop'"):
        collective(tensor)
    assert tensor.tolist() == [1.0] * 4


def test_config_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="min_numel"):
        commrt.Comm(min_numel=-1)


def test_a_model_that_is_not_ddp_is_refused() -> None:
    with pytest.raises(ConfigError, match="model is a Linear: must be a DistributedDataParallel"):
        commrt.attach(torch.nn.Linear(2, 2))


def test_codecs_of_other_legs_take_the_codecs_block() -> None:
    for spec in ("block8", "none"):
        comm = commrt.Comm("loco4:block=256", gather=spec, intra=spec, small=spec)
        assert comm.gather.block == comm.codecs.intra.block == comm.codecs.small.block == 256
    assert commrt.Comm("loco4:block=256").gather.block == 256


def test_a_report_needs_no_process_group() -> None:
    """Before training: nothing sent, a ratio of 1, no division by zero."""
    comm = commrt.Comm("loco4")
    comm.bind([("weight", torch.nn.Parameter(torch.zeros(32, 64)))])
    assert comm.stats().ratio == 1.0
    assert "2,048 elements" in comm.report()
