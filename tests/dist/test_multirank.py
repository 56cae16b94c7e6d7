"""run_ranks: values in rank order, and every way a rank can fail told from the others."""

import os
import signal
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from commrt.testing import RankError, loopback_bytes, multirank, run_ranks, tcp_bytes_sent


def sum_of_ranks(x: torch.Tensor) -> tuple[int, torch.Tensor]:
    x += dist.get_rank()
    dist.all_reduce(x)
    print("summed")
    return dist.get_rank(), x


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.barrier()


def wait_forever_on_rank_1(directory: Path) -> None:
    (directory / str(os.getpid())).touch()
    if dist.get_rank() == 1:
        lost_sleep()


def lost_sleep() -> None:
    time.sleep(1000)


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_on_rank_0() -> None:
    if dist.get_rank() == 0:
        sys.exit(7)


def leave_a_thread_behind() -> str:
    threading.Thread(target=lost_sleep).start()
    return "value"


def return_big_value() -> bytes:
    return bytes(1 << 20)


def read_environment(name: str) -> str:
    return os.environ[name]


def count_bytes(num_bytes: int) -> tuple[int, int]:
    x = torch.zeros(num_bytes, dtype=torch.uint8)
    dist.barrier()
    sent, loopback = tcp_bytes_sent(), loopback_bytes()
    other = 1 - dist.get_rank()
    for work in [dist.isend(x, other), dist.irecv(x.clone(), other)]:
        work.wait()
    dist.barrier()
    return tcp_bytes_sent() - sent, loopback_bytes() - loopback


def failures_of(fn, *args, **options) -> dict[int, str]:
    with pytest.raises(RankError) as error:
        run_ranks(fn, *args, world_size=2, **options)
    for rank, failure in error.value.failures.items():
        assert f"rank {rank} {failure}" in str(error.value)
    return error.value.failures


def test_values_come_in_rank_order_and_arguments_are_copied(capsys):
    x = torch.ones(3)
    values = run_ranks(sum_of_ranks, x, world_size=3)
    assert [rank for rank, _ in values] == [0, 1, 2]
    assert all(torch.equal(total, torch.full((3,), 6.0)) for _, total in values)
    assert torch.equal(x, torch.ones(3))
    assert capsys.readouterr().out.splitlines() == [f"[rank {r}] summed" for r in range(3)]


def test_a_value_larger_than_a_pipe():
    assert run_ranks(return_big_value, world_size=2) == [bytes(1 << 20)] * 2


def test_ranks_see_the_callers_environment(monkeypatch):
    for value in ("first", "second"):
        monkeypatch.setenv("COMMRT_TEST_VALUE", value)
        assert run_ranks(read_environment, "COMMRT_TEST_VALUE", world_size=1) == [value]


@pytest.fixture(params=[0.0, 1.0])
def busy_parent(request, monkeypatch):
    """Also one that looks only when all ranks have failed."""

    def wait(*args):
        time.sleep(request.param)
        return connection.wait(*args)

    monkeypatch.setattr(multirank, "wait", wait)


@pytest.mark.usefixtures("busy_parent")
def test_a_raising_rank_gives_its_traceback_first():
    failures = failures_of(raise_on_rank_1)
    assert next(iter(failures)) == 1
    assert failures[1].startswith("exited with code 1\n")
    assert "raise_on_rank_1" in failures[1]
    assert "KeyError: 'the cause'" in failures[1]


def test_a_hanging_rank_is_killed_in_time_and_shows_its_stack(tmp_path):
    start = time.monotonic()
    failures = failures_of(wait_forever_on_rank_1, tmp_path, timeout_s=4)
    assert time.monotonic() - start < 10
    assert failures[1].startswith("timed out (limit 4 s)\n")
    assert "in lost_sleep" in failures[1]
    pids = [path.name for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(Path("/proc", pid).exists() for pid in pids)


@pytest.mark.usefixtures("busy_parent")
def test_a_killed_rank_is_reported_first_with_the_signal():
    failures = failures_of(die_on_rank_1)
    assert next(iter(failures)) == 1
    assert failures[1].startswith("was killed by SIGKILL\n")


def test_a_rank_that_exits_has_failed():
    assert failures_of(exit_on_rank_0)[0].startswith("exited with code 7\n")


def test_a_thread_left_behind_keeps_a_rank_from_ending():
    failures = failures_of(leave_a_thread_behind, timeout_s=4)
    assert set(failures) == {0, 1}
    assert all("in lost_sleep" in failure for failure in failures.values())


def test_counters_see_what_ranks_send():
    num_bytes = 1 << 20
    for sent, loopback in run_ranks(count_bytes, num_bytes, world_size=2):
        assert num_bytes <= sent < num_bytes * 1.01
        assert loopback >= 2 * num_bytes


def test_there_must_be_a_rank():
    with pytest.raises(ValueError, match="world_size must be at least 1, not 0"):
        run_ranks(return_big_value, world_size=0)
