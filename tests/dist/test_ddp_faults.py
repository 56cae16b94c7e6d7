"""A rank that dies or stops, at any point of a step: the others raise, and nobody hangs.

Each test is one start of ranks, of which rank 1 is lost. The others have to end by themselves, with
a traceback that names a lost connection or, where a rank does not answer, a timeout of the group
that is well below the limit of the test.
"""

import functools
import itertools
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import commrt
from commrt.collectives import Reducer, agreement, exchange, hierarchy, reducer
from commrt.testing import RankError, multirank, run_ranks
from tests.dist.small_training import IN, OUT, train, wrap

LIMIT_S = 40.0
GROUP_S = 20.0
STOPPED_S = 4.0
LOST = 1


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Survivors may take long to end on a busy machine: it is asserted why they end, not when."""
    monkeypatch.setattr(multirank, "_GRACE_S", GROUP_S / 2)


def new_group(timeout_s: float) -> dist.ProcessGroup:
    """All ranks, with a timeout of its own."""
    return dist.new_group(timeout=timedelta(seconds=timeout_s))


Lose = Callable[[Callable[..., Any], int], Callable[..., Any]]
"""Of a function and the number of one of its calls, from 1: the function that is lost in it."""


def end_by(
    signal_number: int, lost: int, function: Callable[..., Any], at_call: int
) -> Callable[..., Any]:
    """On one rank that call sends a signal to its own process."""
    calls = itertools.count(1)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if next(calls) == at_call and dist.get_rank() == lost:
            os.kill(os.getpid(), signal_number)
            time.sleep(LIMIT_S)  # a signal may take a moment to arrive
        return function(*args, **options)

    return call


POINTS: dict[str, tuple[Any, str, int]] = {
    "agreement": (agreement, "all_gather_single", 2),
    "forward": (nn.Linear, "forward", 12),
    "first bucket": (commrt.Comm, "average", 1),
    "hook": (commrt.Comm, "average", 8),
    "encode": (Reducer, "encode", 4),
    "all-to-all": (dist, "all_to_all_single", 4),
    "in turn": (dist, "send", 8),
    "between the legs": (Reducer, "gather_leg", 4),
    "all-gather": (reducer, "gather_payloads", 4),
    "decode": (Reducer, "decode", 4),
    "uncompressed": (dist, "all_reduce", 4),
    "optimizer": (torch.optim.AdamW, "step", 2),
    "inside the node": (hierarchy, "gather_payloads", 4),
}
"""Where, and in the which call. The first step has one bucket, the others one a parameter: the
fourth call in a leg has others before it and behind it. "in turn" is the way of large payloads.
"""


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    widths = [IN] * 8 + [OUT]
    return nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))


def train_until_lost(
    point: str, lose: Lose, group: dist.ProcessGroup | None = None, **settings: Any
) -> None:
    group = group or new_group(GROUP_S)
    model = wrap(layers(), bucket_cap_mb=0.001, process_group=group)
    owner, name, at_call = POINTS[point]
    in_turn_bytes = 0 if point == "in turn" else exchange.IN_TURN_BYTES
    with (
        mock.patch.object(owner, name, lose(getattr(owner, name), at_call)),
        mock.patch.object(exchange, "IN_TURN_BYTES", in_turn_bytes),
    ):
        commrt.attach(model, min_numel=1, **settings)
        train(model, range(20))


def failures_of(function: Callable[..., None], *args: Any, world_size: int) -> dict[int, str]:
    with pytest.raises(RankError) as error:
        run_ranks(function, *args, world_size=world_size, timeout_s=LIMIT_S)
    return error.value.failures


def assert_connections_lost(failures: dict[int, str]) -> None:
    assert len(failures) > 1
    assert failures.pop(LOST).startswith("was killed by SIGKILL")
    for text in failures.values():
        assert text.startswith("exited with code 1"), text
        assert "onnection" in text, text
        assert "imed out" not in text, text


def kill_at(point: str, settings: dict[str, Any]) -> None:
    train_until_lost(point, functools.partial(end_by, signal.SIGKILL, LOST), **settings)


@pytest.mark.parametrize("point", sorted(POINTS.keys() - {"inside the node", "uncompressed"}))
def test_a_rank_killed(point: str) -> None:
    """At each point of a step."""
    failures = failures_of(kill_at, point, {}, world_size=3)
    assert failures.keys() == {0, 1, 2}
    assert_connections_lost(failures)


@pytest.mark.parametrize(
    ("point", "settings"),
    [
        ("uncompressed", {"warmup": 10}),
        ("encode", {"hierarchy": 2}),
        ("all-gather", {"hierarchy": [[0, 2], [1, 3]]}),
        ("inside the node", {"hierarchy": 2, "intra": "block8"}),
        ("all-to-all", {"codec": "lowrank2", "small": "block8"}),
    ],
)
def test_a_rank_killed_under_settings(point: str, settings: dict[str, Any]) -> None:
    """Others of its node, and those of other nodes."""
    failures = failures_of(kill_at, point, settings, world_size=4)
    assert failures.keys() == {0, 1, 2, 3}
    assert_connections_lost(failures)


PAIRS = {"forward": [0, 1], "all-gather": [2, 3], "in turn": [4, 5]}
"""Where the second of each pair stops."""


def stop_one_of_a_pair() -> None:
    """The other of the pair raises, then ends it."""
    rank = dist.get_rank()
    groups = {
        point: dist.new_group(ranks, timeout=timedelta(seconds=STOPPED_S))
        for point, ranks in PAIRS.items()
    }
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    point = next(point for point, ranks in PAIRS.items() if rank in ranks)
    survivor, stopped = PAIRS[point]
    try:
        train_until_lost(point, functools.partial(end_by, signal.SIGSTOP, stopped), groups[point])
    finally:
        if rank == survivor:
            os.kill(pids[stopped], signal.SIGKILL)


def test_a_rank_that_does_not_answer() -> None:
    """Within the timeout of the model's group, which commrt's own groups take over."""
    failures = failures_of(stop_one_of_a_pair, world_size=6)
    for survivor, stopped in PAIRS.values():
        assert failures[stopped].startswith("was killed by SIGKILL")
        assert failures[survivor].startswith("exited with code 1")
        assert f"imed out waiting {STOPPED_S * 1000:.0f}ms" in failures[survivor]
