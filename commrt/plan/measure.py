"""What the model needs to know of this machine and of the links to others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import BlockwiseCodec, ExactCodec, LowRankCodec, Window, orthonormal
from commrt.plan.model import GRADIENT_BYTES, INSIDE, MIB, CodecTimes, Job, Link, Method, ring

LONG_S = 0.5  # of an all-reduce that shows the rate, rather than the start, of a link
MOST_BYTES = 256 * MIB
LATENCY_REPEATS = 50


def measure_link(
    group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Link:
    """Latency and rate of this group's links, by all-reduces: of one number, then of ever more.

    Args:
        group: Two ranks or more.
        device: Of what they send.

    Ranks: all of the group; every rank returns the same.

    Cost: seconds, and up to 256 MiB of memory.
    """
    ranks = dist.get_world_size(group)
    latency_s = (
        _all_reduce_s(torch.zeros(1, device=device), LATENCY_REPEATS, group)
        / ring(0, ranks, passes=2).hops
    )
    numel, seconds = 1 << 16, 0.0
    while seconds < LONG_S and GRADIENT_BYTES * numel < MOST_BYTES:
        numel *= 4
        seconds = _all_reduce_s(torch.zeros(numel, device=device), 1, group)
    traffic = ring(GRADIENT_BYTES * numel, ranks, passes=2)
    return Link(
        bits_per_s=8 * traffic.num_bytes / (seconds - traffic.hops * latency_s),
        latency_s=latency_s,
    )


def measure_links(ranks_per_node: int, device: torch.device | str = "cpu") -> tuple[Link, Link]:
    """The links between nodes and inside them; of one node both are the latter.

    Ranks: all of the default group, two or more.
    """
    if ranks_per_node == 1:
        return measure_link(device=device), INSIDE
    group, _ = dist.new_subgroups(ranks_per_node)
    inside = measure_link(group, device)
    is_one_node = ranks_per_node == dist.get_world_size()
    return inside if is_one_node else measure_link(device=device), inside


def measure_codec(method: str, job: Job, numel: int = 2 * MIB) -> CodecTimes:
    """Times of a method's codec on one thread of this machine.

    Args:
        method: See :func:`predict`.
        job: Whose number of ranks and width of matrices it is for.
        numel: Elements to code.

    Raises:
        ConfigError: There is no such method.
    """
    codec, gather, *_ = Method.parse(method)
    if isinstance(codec, ExactCodec):
        return CodecTimes(0.0, 0.0)
    if isinstance(codec, LowRankCodec):
        return _measure_low_rank(codec, round(job.width), numel)
    assert isinstance(codec, BlockwiseCodec)
    shards = min(job.nodes * job.ranks_per_node, 8)
    window = Window(0, codec.num_blocks(numel), 0)
    gradient = torch.randn(numel)
    residual = torch.zeros(codec.residual_bytes(numel), dtype=torch.uint8)
    payload = torch.empty(codec.payload_bytes(window.num_blocks), dtype=torch.uint8)
    stack = payload[: codec.payload_bytes(window.num_blocks // shards)].repeat(shards, 1)
    mean = torch.empty(gather.payload_bytes(window.num_blocks // shards), dtype=torch.uint8)
    returned = torch.zeros(gather.payload_bytes(window.num_blocks), dtype=torch.uint8)
    encode_s = _median_s(lambda: codec.encode(gradient, payload, window, residual=residual, seed=0))
    average_s = _median_s(lambda: gather.encode_average(stack, codec, mean))
    decode_s = _median_s(lambda: gather.decode(returned, gradient, window))
    return CodecTimes(encode_s / numel, (average_s + decode_s) / numel)


def _measure_low_rank(codec: LowRankCodec, width: int, numel: int) -> CodecTimes:
    """What LowRankReducer does with square matrices, but for coding their factors."""
    count = max(1, numel // width**2)
    matrices = torch.randn(count, width, width).unbind()
    bases = torch.randn(count, codec.rank, width).unbind()
    residuals = torch.zeros(count, codec.residual_bytes(width**2), dtype=torch.uint8).unbind()

    def before() -> None:
        for matrix, basis, residual in zip(matrices, bases, residuals, strict=True):
            error = torch.empty(width**2)
            codec.decode_residual(residual, error)
            values = orthonormal(basis @ matrix.add_(error.view_as(matrix)).T) @ matrix
            matrix.addmm_(basis.T, values, alpha=-1)
            codec.encode_residual(matrix.flatten(), residual, 0)

    def after() -> None:
        for matrix, basis in zip(matrices, bases, strict=True):
            torch.mm(orthonormal(basis).T, basis, out=matrix)

    elements = count * width**2
    return CodecTimes(_median_s(before) / elements, _median_s(after) / elements)


def _median_s(work: Callable[[], object], repeats: int = 7) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        durations = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            durations.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(durations)


def _all_reduce_s(tensor: Tensor, repeats: int, group: dist.ProcessGroup | None) -> float:
    """Median seconds of an all-reduce, of the slowest rank."""
    durations = []
    for _ in range(repeats + 1):  # the first makes connections
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        tensor[0].item()  # waits for the device
        durations.append(time.perf_counter() - began)
    slowest = torch.tensor([statistics.median(durations[1:])], device=tensor.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    return slowest.item()
