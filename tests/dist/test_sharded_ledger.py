"""Nothing is lost: what sharded models send and what their residuals hold is what was computed.

To tolerance: a step's rounding of residuals to 8 bits adds up to less than 0.1 % of the gradients.
"""

from typing import Any

import pytest
import torch

import commrt
from commrt.testing import run_ranks
from tests.dist.sharded_checks import Ledger, no_bias, wrap_as
from tests.dist.small_training import backward_of_any

STEPS = 8


def check(kind: str, settings: dict[str, Any]) -> None:
    model, replica = wrap_as(kind, no_bias()), no_bias()
    ledger = Ledger(commrt.attach(model, "loco4:block=32", min_numel=1, **settings))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        ledger.take(model, replica, lambda part, step=step: backward_of_any(part, step))
        optimizer.step()
    ledger.check(tolerance=0.001)


def check_all(cells: list[tuple[str, dict[str, Any]]]) -> None:
    for kind, settings in cells:
        check(kind, settings)


@pytest.mark.parametrize(
    "cells",
    [
        [
            ("fsdp2", {}),
            ("fsdp2", {"hierarchy": 2}),
            ("fsdp2", {"hierarchy": [[0, 3], [1, 2]]}),
            ("fsdp2", {"residuals": "host"}),
            ("fsdp2-2", {}),
        ],
        [
            ("hsdp", {"returns": "none"}),
            ("FULL_SHARD", {}),
            ("SHARD_GRAD_OP", {"residuals": "host"}),
            ("FULL_SHARD", {"hierarchy": 2}),
            ("NO_SHARD", {"returns": "none"}),
        ],
    ],
    ids=["FSDP2", "others"],
)
def test_what_is_sent_and_what_is_owed_add_up(cells: list[tuple[str, dict[str, Any]]]) -> None:
    run_ranks(check_all, cells, world_size=4, timeout_s=120)
