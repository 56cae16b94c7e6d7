"""What the model needs to know of this machine and of the links to others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import BlockwiseCodec, ExactCodec, LowRankCodec
from commrt.collectives import Item, LowRankReducer, Reducer, Traffic, balanced, new_residuals
from commrt.errors import ConfigError
from commrt.plan.model import (
    GRADIENT_BYTES,
    INSIDE,
    MIB,
    Cluster,
    CodecTimes,
    Job,
    Link,
    Method,
    ring,
)

LONG_S = 0.5  # of an all-reduce that shows the rate, rather than the start, of a link
MOST_BYTES = 256 * MIB
LATENCY_REPEATS = 50
CODING_S = 0.4  # of a codec's works
MOST_SHARDS, MOST_WIDTH = 8, 1024  # of a codec's measurement; beyond, an element costs as much


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


def measure_cluster(ranks_per_node: int, device: torch.device | str = "cpu") -> Cluster:
    """The links between nodes and inside them; of one node both are the latter.

    Args:
        ranks_per_node: The same on every node.
        device: Of what the ranks send.

    Raises:
        ConfigError: They cannot be so many on each.

    Ranks: all of the default group, two or more.
    """
    ranks = dist.get_world_size()
    if ranks % ranks_per_node:
        raise ConfigError(f"{ranks} ranks, {ranks_per_node} on this node: must be as many on each")
    inside = INSIDE
    if ranks_per_node > 1:
        group, _ = dist.new_subgroups(ranks_per_node)
        inside = measure_link(group, device)
    between = inside if ranks_per_node == ranks else measure_link(device=device)
    return Cluster(
        nodes=ranks // ranks_per_node,
        ranks_per_node=ranks_per_node,
        between=between,
        inside=inside,
    )


def measure_codec(method: str, job: Job, numel: int = 2 * MIB) -> CodecTimes:
    """Times of a method's codecs on one thread of this machine.

    Args:
        method: See :func:`predict`.
        job: Whose numbers of ranks and width of matrices it is for.
        numel: Elements to code, at least; whole layers of a transformer.

    Raises:
        ConfigError: There is no such method.
    """
    found = Method.parse(method)
    if isinstance(found.codec, ExactCodec):
        return CodecTimes(0.0, 0.0)
    shapes = _layers(min(round(job.width), MOST_WIDTH), numel)
    numels = [rows * columns for rows, columns in shapes]
    if isinstance(found.codec, LowRankCodec):
        before, after = _low_rank_s(found.codec, found.gather, shapes)
    else:
        assert isinstance(found.codec, BlockwiseCodec)
        inside = _Coding(0.0, 0.0, 0.0)
        local, away = 1, job.cluster.ranks
        if found.intra is not None:
            local, away = job.cluster.ranks_per_node, job.cluster.nodes
            inside = _coding_s(found.intra, ExactCodec(block=found.codec.block), numels, local)
        shares = [-(-count // local) for count in numels]
        coding = _coding_s(found.codec, found.gather, shares, away)
        before = inside.encode + inside.average + coding.encode
        after = coding.average + local * coding.decode
    return CodecTimes(before / sum(numels), after / sum(numels))


class _Coding(NamedTuple):
    """Seconds of what one rank does with all tensors: of the mean, only with its own shard."""

    encode: float
    average: float
    decode: float


def _layers(width: int, numel: int) -> list[tuple[int, int]]:
    """The matrices of so many layers of a transformer that they have ``numel`` elements."""
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return -(-numel // (12 * width**2)) * layer


def _coding_s(
    codec: BlockwiseCodec, gather: BlockwiseCodec, numels: Sequence[int], ranks: int
) -> _Coding:
    """As :class:`Reducer` does it, without sending."""
    ranks = min(ranks, MOST_SHARDS)
    shards = balanced(tuple(numels), codec.block, ranks)
    tensors = torch.randn(sum(numels)).split(list(numels))
    residuals = new_residuals(codec, numels, torch.device("cpu"))

    def payloads(of: BlockwiseCodec) -> list[Tensor]:
        return [
            torch.zeros(shards.payload_bytes(of, rank), dtype=torch.uint8) for rank in range(ranks)
        ]

    sent, returned = payloads(codec), payloads(gather)
    stack = sent[0].repeat(ranks, 1)

    def encode() -> None:
        for payload, shard in zip(sent, shards.shards, strict=True):
            for index, window in shard:
                codec.encode(tensors[index], payload, window, residual=residuals[index], seed=index)

    def average() -> None:
        if isinstance(codec, ExactCodec):
            stack.view(torch.float32).sum(dim=0).div_(ranks)
        else:
            gather.encode_average(stack, codec, returned[0])

    def decode() -> None:
        for payload, shard in zip(returned, shards.shards, strict=True):
            for index, window in shard:
                gather.decode(payload, tensors[index], window)

    return _Coding(*_mean_s(encode, average, decode))


def _low_rank_s(
    codec: LowRankCodec, gather: BlockwiseCodec, shapes: Sequence[tuple[int, int]]
) -> list[float]:
    """Of both legs, of a group of this rank alone; the factors it averages are a small part."""
    traffic = Traffic()
    with _alone() as group:
        reducer = LowRankReducer(
            codec,
            basis=Reducer(codec.basis_codec, codec.basis_codec, group, group),
            values=Reducer(codec.values_codec, gather, group, group),
        )
        sizes = [torch.Size(shape) for shape in shapes]
        residuals = new_residuals(codec, [size.numel() for size in sizes], torch.device("cpu"))
        bases = [codec.new_basis(size, "") for size in sizes]
        items = [
            Item(torch.randn(size.numel()), 0, residual, shape=size, basis=basis)
            for size, residual, basis in zip(sizes, residuals, bases, strict=True)
        ]
        sent: list[Any] = []
        return _mean_s(
            lambda: sent.append(reducer.reduce_leg(items, traffic)),
            lambda: reducer.gather_leg(sent.pop(), items, traffic),
        )


@contextmanager
def _alone() -> Iterator[dist.ProcessGroup]:
    """A group of this rank, whether or not there is a default group."""
    is_first = not dist.is_initialized()
    if is_first:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    try:
        yield group
    finally:
        dist.destroy_process_group(None if is_first else group)


def _mean_s(*works: Callable[[], object]) -> list[float]:
    """Of each, in turns, so long that pauses for others who share the cores are in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    durations: list[list[float]] = [[] for _ in works]
    try:
        for work in works:  # which takes memory
            work()
        while sum(map(sum, durations)) < CODING_S:
            for work, taken in zip(works, durations, strict=True):
                began = time.perf_counter()
                work()
                taken.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return [statistics.mean(taken) for taken in durations]


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
