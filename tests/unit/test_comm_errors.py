"""Mistakes that commrt.Comm and commrt.attach find by themselves: no process group is needed,
so nothing can have been sent.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist

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
    ],
)
def test_bad_settings_name_the_value_and_what_is_allowed(
    settings: dict[str, Any], message: str
) -> None:
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match=message):
        commrt.Comm(**settings)


def test_config_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="min_numel"):
        commrt.Comm(min_numel=-1)


def test_a_model_that_is_not_ddp_is_refused() -> None:
    with pytest.raises(ConfigError, match="model is a Linear: must be a DistributedDataParallel"):
        commrt.attach(torch.nn.Linear(2, 2))


def test_the_gather_codec_takes_the_codecs_block() -> None:
    assert commrt.Comm("loco4:block=256").gather.block == 256
    assert commrt.Comm("loco4:block=256", gather="none").gather.block == 256


def test_a_report_needs_no_process_group() -> None:
    """Before training: nothing sent, a ratio of 1, no division by zero."""
    comm = commrt.Comm("loco4")
    comm.bind([("weight", torch.nn.Parameter(torch.zeros(32, 64)))])
    assert comm.stats().ratio == 1.0
    assert "2,048 elements" in comm.report()
