"""The two-legged pipeline: order, overlap, errors, and that timing never changes a result.

Bit-identical: gradients, weights and byte counts of runs whose ranks are delayed at random in the
hook and in each leg, and of the run without delays. What may differ is only who waits for whom.
"""

import contextlib
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.collectives import Reducer, ThreadPipeline, all_reduce_exact_
from commrt.collectives.order import FifoWorker
from commrt.errors import CollectiveError
from commrt.testing import run_ranks
from tests.dist.small_training import (
    all_of,
    assert_same_on_all_ranks,
    backward,
    digest,
    small_model,
    train,
    weights,
    wrap,
)

WAIT_S = 20.0  # how long a broken pipeline may keep a test waiting
STEPS = 20


class OwnError(Exception):
    """An error that nobody else raises."""


def fail(message: str) -> None:
    raise OwnError(message)


@contextlib.contextmanager
def worker(capacity: int = 0) -> Iterator[FifoWorker]:
    worker = FifoWorker("commrt-test", capacity)
    yield worker
    worker.close()


def test_jobs_run_in_order_on_one_thread_and_close_waits_for_them() -> None:
    results: list[tuple[Any, BaseException | None]] = []
    names = set()

    def job(index: int) -> int:
        names.add(threading.current_thread().name)
        time.sleep(0.001 * (index % 3))
        return index

    with worker() as fifo:
        for index in range(30):
            fifo.submit(lambda index=index: job(index), lambda *result: results.append(result))
    assert results == [(index, None) for index in range(30)]
    assert names == {"commrt-test"}


def test_jobs_after_a_failed_one_fail_with_it_as_their_cause() -> None:
    results: list[tuple[Any, BaseException | None]] = []
    ran = []
    with worker() as fifo:
        for job in (lambda: 1, lambda: fail("first"), lambda: ran.append(1), lambda: fail("last")):
            fifo.submit(job, lambda *result: results.append(result))
    values, errors = zip(*results, strict=True)
    assert values == (1, None, None, None)
    assert errors[0] is None
    assert isinstance(errors[1], OwnError)
    assert not ran
    for error in errors[2:]:
        assert isinstance(error, CollectiveError)
        assert str(error) == "an earlier collective failed: first"
        assert error.__cause__ is errors[1]


PIPELINE = {"commrt-reduce", "commrt-gather"}


def leg_threads() -> set[str]:
    """The threads of pipelines; other tests of this process may have left other ones."""
    return {thread.name for thread in threading.enumerate()} & PIPELINE


def test_close_ends_the_threads_after_what_is_queued() -> None:
    pipeline = ThreadPipeline()
    assert leg_threads() == PIPELINE
    futures = [
        pipeline.submit(lambda index=index: index, lambda received: torch.tensor(received))
        for index in range(20)
    ]
    pipeline.close()
    assert leg_threads() == set()
    assert [future.wait().item() for future in futures] == list(range(20))


def test_close_ends_the_threads_after_an_error() -> None:
    pipeline = ThreadPipeline()
    future = pipeline.submit(lambda: 1, lambda received: fail("gather"))
    pipeline.close()
    assert leg_threads() == set()
    with pytest.raises(Exception, match="gather"):
        future.wait()


def test_the_reduce_leg_goes_on_beside_the_gather_leg_before_it() -> None:
    """The first job's gather leg waits for the second job's reduce leg."""
    pipeline = ThreadPipeline()
    reduced = threading.Event()

    def gather(_: Any) -> Tensor:
        assert reduced.wait(WAIT_S)
        return torch.ones(1)

    first = pipeline.submit(lambda: None, gather)
    second = pipeline.submit(reduced.set, lambda _: torch.zeros(1))
    assert first.wait().item() == 1.0
    assert second.wait().item() == 0.0
    pipeline.close()


def test_received_payloads_do_not_pile_up() -> None:
    """While a gather leg is stuck, one more payload may wait and one be on its way: memory."""
    pipeline = ThreadPipeline()
    release = threading.Event()
    reduced = threading.Semaphore(0)

    def gather(_: Any) -> Tensor:
        assert release.wait(WAIT_S)
        return torch.ones(1)

    futures = [pipeline.submit(reduced.release, gather) for _ in range(6)]
    for _ in range(3):
        assert reduced.acquire(timeout=WAIT_S)
    time.sleep(0.1)  # a fourth would come now
    is_fourth_reduced = reduced.acquire(blocking=False)
    release.set()
    for future in futures:
        future.wait()
    pipeline.close()
    assert not is_fourth_reduced


@contextlib.contextmanager
def jitter(seed: int) -> Iterator[None]:
    """Delay the hook and each leg at random, on every rank and thread differently."""

    def delayed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        dice = random.Random(f"{seed} {dist.get_rank()} {name}")

        def call(*args: Any, **options: Any) -> Any:
            time.sleep(dice.choice([0, 0, 0.0003, 0.003]))
            result = function(*args, **options)
            time.sleep(dice.choice([0, 0, 0, 0.002]))
            return result

        return call

    with contextlib.ExitStack() as patches:
        for owner, name in (
            (Reducer, "reduce_leg"),
            (Reducer, "gather_leg"),
            (commrt.Comm, "average"),
        ):
            patch = mock.patch.object(owner, name, delayed(name, getattr(owner, name)))
            patches.enter_context(patch)
        exact = delayed("exact", all_reduce_exact_)
        patches.enter_context(mock.patch("commrt.hooks.legs.all_reduce_exact_", exact))
        yield


class CountingComm(commrt.Comm):
    """Notes how many buckets came in each step."""

    buckets: tuple[int, ...] = (0,)

    def average(self, buffer: Tensor, parts: list[tuple[Tensor, Tensor]], is_last: bool) -> Any:
        self.buckets = (*self.buckets[:-1], self.buckets[-1] + 1) + (0,) * is_last
        return super().average(buffer, parts, is_last)


def many_layers() -> nn.Sequential:
    """Compressed and uncompressed parameters in turn."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Tanh()) for _ in range(8)]
    return nn.Sequential(*layers, nn.Linear(32, 8))


def reduce_own_tensor(totals: list[Tensor]) -> Callable[[Tensor], None]:
    """A backward hook with a collective of the user's, on the default group."""

    def hook(gradient: Tensor) -> None:
        total = torch.tensor([float(dist.get_rank() + len(totals)), 1.0])
        dist.all_reduce(total)
        totals.append(total)

    return hook


def many_steps(seed: int | None) -> tuple[str, list[int], tuple[int, ...]]:
    """Train through many small buckets; digest of everything, byte counts and bucket counts."""
    model = DistributedDataParallel(many_layers(), bucket_cap_mb=0.001)
    comm = CountingComm("loco4", min_numel=64)
    comm.bind(model.module.named_parameters())
    model.register_comm_hook(comm, commrt.ddp_hook)
    totals: list[Tensor] = []
    model.module[4][0].weight.register_hook(reduce_own_tensor(totals))
    with contextlib.nullcontext() if seed is None else jitter(seed):
        losses = train(model, range(STEPS))
    assert_same_on_all_ranks(weights(model))
    for index, total in enumerate(totals):
        ranks = range(dist.get_world_size())
        assert total.tolist() == [sum(index + rank for rank in ranks), len(ranks)]
    residuals = comm.state_dict()["residuals"].values()
    stats = comm.stats()
    sent = [stats.reduce_bytes, stats.gather_bytes, stats.exact_bytes]
    return digest([weights(model), torch.tensor(losses), *residuals]), sent, comm.buckets[:-1]


def calm_and_shaken() -> None:
    calm = many_steps(None)
    buckets = calm[2]
    assert len(buckets) == STEPS
    assert min(buckets[1:]) >= 9
    assert many_steps(1) == calm


def two_models() -> None:
    """As in adversarial training: each model has its groups and threads, backward by turns."""

    def run(seed: int | None) -> str:
        models = [wrap(small_model(index), bucket_cap_mb=0.001) for index in range(2)]
        for model in models:
            commrt.attach(model, min_numel=64)
        with contextlib.nullcontext() if seed is None else jitter(seed):
            for step in range(5):
                for model in models:
                    train(model, [step])
        return digest([weights(model) for model in models])

    assert run(1) == run(None)


def test_delays_change_nothing() -> None:
    """4 ranks, many small buckets, another collective in backward: equal to the bit."""
    run_ranks(all_of, [calm_and_shaken, two_models], world_size=4)


LEGS = ("encode", "reduce_leg", "gather_leg")


def errors_of_legs() -> list[tuple[str, str]]:
    """For each leg: it fails on every rank in the second step; type and text of what backward()
    raises. Then the Comm refuses further work.
    """
    errors = []
    for leg in LEGS:
        model = wrap(small_model(), bucket_cap_mb=0.001)
        comm = commrt.attach(model)
        backward(model, 0)
        error = OwnError(f"{leg} of rank {dist.get_rank()}")
        with (
            mock.patch.object(Reducer, leg, side_effect=error),
            pytest.raises(Exception, match=" ") as raised,
        ):
            backward(model, 1)
        errors.append((raised.type.__name__, str(raised.value)))
        weight = next(model.module.parameters())
        gradient = torch.zeros(weight.numel())
        future = comm.average(gradient, [(weight, gradient)], True)
        with pytest.raises(Exception, match=f"an earlier collective failed: .*{leg} of rank"):
            future.wait()
    return errors


@pytest.fixture(scope="module")
def errors() -> list[list[tuple[str, str]]]:
    return run_ranks(errors_of_legs, world_size=2, timeout_s=30)


def test_an_error_in_a_leg_reaches_backward(errors: list[list[tuple[str, str]]]) -> None:
    """Each rank's own, by name and message."""
    for rank, found in enumerate(errors):
        for leg, (kind, text) in zip(LEGS, found, strict=True):
            assert "OwnError" in kind + text
            assert f"{leg} of rank {rank}" in text


def forgotten_models() -> int:
    """How many threads are left when the model and its Comm are gone."""
    for _ in range(3):
        model = wrap(small_model())
        comm = commrt.attach(model)
        backward(model, 0)
        assert leg_threads()
        del model, comm
        gc.collect()
    deadline = time.monotonic() + WAIT_S
    while leg_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(leg_threads())


def test_threads_end_with_their_model() -> None:
    assert run_ranks(forgotten_models, world_size=1) == [0]


def lose_rank_1() -> str:
    """Rank 1 fails in a leg and gives up its groups, as it does when its process ends."""
    model = wrap(small_model(), bucket_cap_mb=0.001)
    commrt.attach(model)
    backward(model, 0)
    if dist.get_rank() == 1:
        patch = mock.patch.object(Reducer, "reduce_leg", side_effect=OwnError("rank 1"))
        with patch, pytest.raises(Exception, match="rank 1"):
            backward(model, 1)
        dist.destroy_process_group()
        return ""
    with pytest.raises(RuntimeError) as error:
        backward(model, 1)
    dist.destroy_process_group()
    return str(error.value)


def test_a_lost_peer_is_an_error_and_no_hang() -> None:
    """The other rank gets gloo's error long before the timeout of the group."""
    message, _ = run_ranks(lose_rank_1, world_size=2, timeout_s=40)
    assert "onnection" in message
