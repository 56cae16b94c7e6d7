"""What the model needs to know of this machine and of the links to others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import BlockwiseCodec, ExactCodec, LowRankCodec, orthonormal
from commrt.collectives import balanced
from commrt.plan.model import GRADIENT_BYTES, INSIDE, MIB, CodecTimes, Job, Link, Method, ring

LONG_S = 0.5  # of an all-reduce that shows the rate, rather than the start, of a link
MOST_BYTES = 256 * MIB
LATENCY_REPEATS = 50
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
    ranks, local = job.nodes * job.ranks_per_node, job.ranks_per_node
    shapes = _layers(min(round(job.width), MOST_WIDTH), numel)
    numels = [rows * columns for rows, columns in shapes]
    if isinstance(found.codec, LowRankCodec):
        before, after = _low_rank_s(found.codec, found.gather, shapes, ranks)
    else:
        assert isinstance(found.codec, BlockwiseCodec)
        inside = _Coding(0.0, 0.0, 0.0)
        if found.intra is None:
            local, away = 1, ranks
        else:
            away = job.nodes
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
    residuals = [
        torch.zeros(codec.residual_bytes(numel), dtype=torch.uint8) if codec.residual_fmt else None
        for numel in numels
    ]

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

    return _Coding(_median_s(encode), _median_s(average), _median_s(decode))


def _low_rank_s(
    codec: LowRankCodec, gather: BlockwiseCodec, shapes: Sequence[tuple[int, int]], ranks: int
) -> tuple[float, float]:
    """Before the last factor is sent, and after, as :class:`LowRankReducer` does it."""
    matrices = [torch.randn(shape) for shape in shapes]
    bases = [torch.randn(codec.rank, columns) for _, columns in shapes]
    residuals = [
        torch.zeros(codec.residual_bytes(matrix.numel()), dtype=torch.uint8) for matrix in matrices
    ]
    spans = [torch.randn(codec.rank, rows) for rows, _ in shapes]

    def factorise() -> None:
        for matrix, basis, residual in zip(matrices, bases, residuals, strict=True):
            error = torch.empty(matrix.numel())
            codec.decode_residual(residual, error)
            span = orthonormal(basis @ matrix.add_(error.view_as(matrix)).T)
            matrix.addmm_(span.T, span @ matrix, alpha=-1)
            stored = torch.empty_like(residual)
            codec.encode_residual(matrix.view(-1), stored, 0)
            if codec.is_finite(stored):
                residual.copy_(stored)

    def multiply() -> None:
        for matrix, span, basis in zip(matrices, spans, bases, strict=True):
            torch.mm(span.T, basis, out=matrix)
            orthonormal(basis)

    numels = [span.numel() for span in spans]
    span_coding = _coding_s(codec.basis_codec, codec.basis_codec, numels, ranks)
    numels = [basis.numel() for basis in bases]
    value_coding = _coding_s(codec.values_codec, gather, numels, ranks)
    before = sum((*span_coding, value_coding.encode, value_coding.decode))
    after = value_coding.average + value_coding.decode
    return before + _median_s(factorise), after + _median_s(multiply)


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
