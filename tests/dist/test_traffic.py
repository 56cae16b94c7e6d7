"""Bytes: what stats() says against what the kernel sent, what it costs in memory, what report()
shows. All byte counts are exact; gloo adds headers, so the kernel sees a little more.
"""

import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import commrt
from commrt import ops
from commrt.codecs import parse, with_block
from commrt.collectives import Item, Reducer, Traffic, ring_all_reduce_bytes
from commrt.testing import run_ranks, tcp_bytes_sent
from tests.dist.small_training import EXEMPT, backward, small_model, wrap

NUMEL = 1_000_003
HEADERS = 0.01
FEW_BYTES = 4096  # barriers and the like


@contextmanager
def counting(sent: list[int]) -> Iterator[None]:
    """Append the bytes that this rank sends inside."""
    dist.barrier()
    before = tcp_bytes_sent()
    yield
    dist.barrier()
    sent.append(tcp_bytes_sent() - before)


def legs(codec: str, gather: str, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """For each leg, the bytes counted by Traffic and by the kernel."""
    parsed = parse(codec)
    reducer = Reducer(parsed, with_block(gather, parsed.block), None, None)
    tensors = [torch.randn(NUMEL).to(dtype), torch.randn(129).to(dtype)]
    residuals = commrt.new_residuals(parsed, [NUMEL, 129], torch.device("cpu"))
    traffic, sent = Traffic(), []
    items = [Item(*parts) for parts in zip(tensors, [0, 1], residuals, strict=True)]
    sections = reducer.sections(items)
    send = reducer.encode(sections, traffic)
    with counting(sent):
        received = reducer.exchange(send, sections, traffic)
    with counting(sent):
        reducer.gather_leg(received, items, traffic)
    exact = Traffic()
    with counting(sent):
        exact.add(commrt.all_reduce_(tensors[0], codec="none"))
    return {
        "reduce": (traffic.reduce_bytes, sent[0]),
        "gather": (traffic.gather_bytes, sent[1]),
        "exact": (exact.exact_bytes, sent[2]),
    }


def test_the_interface_sends_what_is_counted() -> None:
    """In a network namespace of its own: packet headers and acknowledgements come on top."""
    program = [sys.executable, "-m", "tests.dist.interface_bytes"]
    found = subprocess.run(
        ["unshare", "--net", "--map-root-user", *program],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    counts = json.loads(found.stdout.splitlines()[-1])
    assert counts["counted"] <= counts["sent"] <= 1.05 * counts["counted"]


def all_legs() -> list[dict[str, tuple[int, int]]]:
    return [
        legs("loco4", "block8", torch.float32),
        legs("loco1", "none", torch.bfloat16),
        legs("block8", "block4", torch.float16),
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_leg_sends_what_is_counted(world_size: int) -> None:
    """Within headers of the kernel's own count, and at the size that the codecs promise."""
    share = (world_size - 1) / world_size
    per_element = [(4.125, 8.125, 32), (1.125, 32, 16), (8.125, 4.125, 16)]
    for results in run_ranks(all_legs, world_size=world_size):
        for counts, bits in zip(results, per_element, strict=True):
            sizes = [NUMEL * share * width / 8 for width in bits]
            sizes[2] *= 2  # there and back
            for (leg, (counted, sent)), size in zip(counts.items(), sizes, strict=True):
                assert counted <= sent <= counted * (1 + HEADERS) + FEW_BYTES, leg
                assert counted == pytest.approx(size, rel=0.002), leg


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Matrices of 256 KiB (fp32), a vector beside each."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(6))).to(dtype)


def run_backward(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    dtype = next(model.parameters()).dtype
    model(torch.randn(2, 256, generator=generator).to(dtype)).square().mean().backward()


@contextmanager
def recording_sends(sent: list[int]) -> Iterator[None]:
    """Append the size of every buffer that goes into an all-to-all."""
    original = dist.all_to_all_single

    def record(output: Tensor, input: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(input.numel() * input.element_size())
        return original(output, input, *args, **options)

    with mock.patch.object(dist, "all_to_all_single", record):
        yield


def steps_of_ddp() -> list[dict[str, Any]]:
    """Each step: byte counts of stats(), of the kernel, and of the send buffers."""
    model = wrap(layers(), bucket_cap_mb=0.3)
    comm = commrt.attach(model)
    run_backward(model)
    run_backward(model)  # in rebuilt buckets
    steps = []
    for _ in range(2):
        before, sent, buffers = comm.stats(), [], []
        with counting(sent), recording_sends(buffers):
            run_backward(model)
        after = comm.stats()
        names = "steps", "reduce_bytes", "gather_bytes", "exact_bytes", "dense_bytes", "wire_bytes"
        counts = {name: getattr(after, name) - getattr(before, name) for name in names}
        steps.append(counts | {"sent": sent[0], "buffers": sum(buffers), "num": len(buffers)})
    assert after.ratio == after.dense_bytes / after.wire_bytes
    residual_bytes = sum(part.numel() for part in comm.state_dict()["residuals"].values())
    assert after.residual_bytes == residual_bytes <= 1.1 * 6 * 256 * 256
    return steps


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_sends_what_stats_says(world_size: int) -> None:
    """Also: ``loco4`` takes at most 4.25 bits a compressed element, in the buffers it sends."""
    elements, vectors = 6 * 256 * 256, 6 * 256
    for steps in run_ranks(steps_of_ddp, world_size=world_size):
        assert steps[0]["num"] > 2
        for step in steps:
            assert step["steps"] == 1
            coded = step["buffers"] - vectors * 4
            assert coded * 8 / elements <= 4.25
            share = (world_size - 1) / world_size
            assert step["reduce_bytes"] == pytest.approx(coded * share, rel=1e-3)
            assert step["gather_bytes"] == pytest.approx(elements * 8.125 / 8 * share, rel=1e-3)
            assert step["exact_bytes"] == pytest.approx(2 * vectors * 4 * share, rel=1e-3)
            assert step["dense_bytes"] == pytest.approx(8 * (elements + vectors) * share, rel=1e-3)
            legs = step["reduce_bytes"] + step["gather_bytes"] + step["exact_bytes"]
            assert step["wire_bytes"] == legs
            assert legs <= step["sent"] <= legs * 1.03 + FEW_BYTES
            assert 5.0 < step["dense_bytes"] / step["wire_bytes"] < 5.4


class Memory:
    """Stands in for torch.empty of bytes and counts what is alive at once."""

    def __init__(self) -> None:
        self.live = self.most = 0
        self._lock = threading.Lock()

    def empty(self, numel: int, *, dtype: torch.dtype, device: Any) -> Tensor:
        assert dtype == torch.uint8
        assert torch.device(device).type == "cpu"
        buffer = Buffer(numel)
        self.count(numel)
        weakref.finalize(buffer, self.count, -numel)
        return torch.frombuffer(buffer, dtype=dtype)

    def count(self, num_bytes: int) -> None:
        with self._lock:
            self.live += num_bytes
            self.most = max(self.most, self.live)


class Buffer(bytearray):
    """Memory of a tensor, which lives as long as its storage."""


def payload_memory(dtype: torch.dtype, cap_mb: float) -> tuple[int, int]:
    """The most bytes of payloads alive at once, and the size of the largest bucket."""
    memory = Memory()
    model = wrap(layers(dtype), bucket_cap_mb=cap_mb)
    comm = commrt.attach(model)
    largest = 0

    def average(buffer: Tensor, *rest: Any) -> torch.futures.Future[Tensor]:
        nonlocal largest
        largest = max(largest, buffer.numel() * buffer.element_size())
        return original(buffer, *rest)

    original = comm.average
    with mock.patch.object(comm, "average", average), mock.patch("torch.empty", memory.empty):
        for _ in range(4):
            run_backward(model)
    return memory.most, largest


def memory_in_buckets() -> dict[str, float]:
    cases = {
        "fp32": (torch.float32, 25),
        "small": (torch.float32, 0.3),
        "bf16": (torch.bfloat16, 1),
    }
    shares = {}
    for name, case in cases.items():
        most, largest = payload_memory(*case)
        shares[name] = most / largest
    with mock.patch("commrt.hooks.legs.MAX_RUN", 256 * 256):
        most, _ = payload_memory(torch.float32, 25)
        shares["one run"] = most / (256 * 256 * 4)
    return shares


def test_payloads_take_less_than_two_buckets() -> None:
    """Counted from the buffers alive at once, over both legs and both threads. DDP's first bucket
    is the whole model: it is coded in runs, which bound the memory whatever its size.
    """
    for shares in run_ranks(memory_in_buckets, world_size=2):
        assert all(0.5 < share <= 2 for share in shares.values()), shares


def reports() -> tuple[str, str]:
    model = wrap(small_model())
    comm = commrt.attach(model)
    backward(model, 0)
    stats, report = comm.stats(), comm.report()
    for count in (stats.reduce_bytes, stats.gather_bytes, stats.exact_bytes, stats.residual_bytes):
        assert count > 0
        assert f" {count:,}" in report
    assert f"{stats.ratio:.2f} times" in report
    none = wrap(small_model())
    return report, commrt.attach(none, "none").report()


def test_the_report_says_what_is_not_compressed_and_why() -> None:
    vectors = "uncompressed 233 elements in 5 parameters: fewer than 2 dimensions (0.bias, ...)"
    small = "uncompressed 264 elements in 1 parameters: fewer than 1024 elements (5.weight)"
    for report, none in run_ranks(reports, world_size=2):
        assert "commrt: 2 ranks, codec loco4:" in report
        assert "gather block8:" in report
        assert f"kernels      {ops.status()}" in report
        assert "compressed   4,160 elements" in report
        assert vectors in report
        assert small in report
        assert "reduce leg" in report
        assert "gather leg" in report
        assert "codec is none" in none
    model = dict(small_model().named_parameters())
    assert sum(model[name].numel() for name in EXEMPT) == 233 + 264


def report_of_kernels() -> str:
    return commrt.Comm("loco4").report()


def test_the_report_names_a_fall_back_and_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """Also said once by the process, when the ops are first used."""
    with mock.patch.dict("os.environ", {"COMMRT_NATIVE": "0"}):
        [report] = run_ranks(report_of_kernels, world_size=1)
    assert "kernels      reference (COMMRT_NATIVE=0)" in report
    assert capsys.readouterr().out.count("slow torch reference ops: COMMRT_NATIVE=0") == 1


class InstantReducer:
    """Counts like Reducer, sends nothing."""

    def reduce_leg(self, items: Any, traffic: Traffic) -> Tensor:
        traffic.reduce_bytes += 1
        return torch.empty(0)

    def gather_leg(self, received: Tensor, items: Any, traffic: Traffic) -> None:
        traffic.gather_bytes += 1


class SlowTraffic(Traffic):
    """Gives another thread time between reading a count and writing it."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.endswith("_bytes"):
            time.sleep(1e-5)
        return value


def test_two_threads_lose_no_count() -> None:
    """Both legs count at the same time."""
    run_ranks(two_threads_lose_no_count, world_size=2)


def two_threads_lose_no_count() -> None:
    steps = 50
    weight = nn.Parameter(torch.zeros(32, 64))
    gradient = torch.zeros(weight.numel())
    with (
        mock.patch("commrt.hooks.legs.Traffic", SlowTraffic),
        mock.patch("commrt.hooks.wiring.Reducer", return_value=InstantReducer()),
    ):
        comm = commrt.Comm("loco4")
        comm.bind([("weight", weight)])
        for _ in range(steps):
            future = comm.average(gradient, [(weight, gradient)], True)
        future.wait()
    stats = comm.stats()
    assert (stats.reduce_bytes, stats.gather_bytes) == (steps, steps)


def test_bytes_of_a_ring() -> None:
    assert [ring_all_reduce_bytes(1000, world_size) for world_size in (1, 2, 4)] == [0, 1000, 1500]
