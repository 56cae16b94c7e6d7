"""Which codec a link needs: step times by an alpha-beta model, before anything is trained.

A step is replayed bucket by bucket, as DDP and the hook run it: gradients become ready evenly over
the backward pass; a bucket is encoded, sent on the reduce leg, averaged, sent on the gather leg and
decoded. The link carries one message after the other, each in ``latency + bytes / rate``; encoding
overlaps the link. All-reduce and all-gather are rings with a latency a hop, or trees where those
have fewer hops; an all-to-all reaches all peers at once, but for the cost of sending each message.
Checked against 2 to 8 emulated nodes (bench/results); for thousands it is arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from commrt.codecs import (
    BlockwiseCodec,
    Codec,
    ExactCodec,
    LowRankCodec,
    Window,
    orthonormal,
    parse,
    with_block,
)
from commrt.errors import ConfigError

MIB = 1 << 20
FIRST_BUCKET_BYTES = MIB  # DDP's
GRADIENT_BYTES = 4
SMALL_SHARE = 0.003  # of the elements: biases and norms, which travel uncompressed
WORTH = 0.95  # of fp32's step time; a smaller gain is not worth a codec
CANDIDATES = ("none", "loco8", "loco4", "loco2/block2", "loco1/block1", "lowrank32", "lowrank8")

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """A network interface.

    Attributes:
        bits_per_s: Of each direction.
        latency_s: From one node to another, software included.
        message_s: What every further message of an all-to-all costs its sender.
    """

    bits_per_s: float
    latency_s: float
    message_s: float = 2e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and on what.

    Attributes:
        num_params: Parameters of the model.
        compute_s: Of a step without communication, optimizer included.
        nodes: Number of nodes.
        between: The link of a node to the others.
        ranks_per_node: Ranks of each, which share its link.
        inside: The link of a rank to the others of its node.
        dim: Width of the model's matrices; None guesses that of a transformer of this size.
        bucket_bytes: DDP's ``bucket_cap_mb``, in bytes.
        backward_share: Of the compute, the part during which gradients become ready.

    Raises:
        ConfigError: For values that make no sense.
    """

    num_params: int
    compute_s: float
    nodes: int
    between: Link
    ranks_per_node: int = 1
    inside: Link = Link(bits_per_s=100e9, latency_s=20e-6)
    dim: int | None = None
    bucket_bytes: int = 25 * MIB
    backward_share: float = 0.6

    def __post_init__(self) -> None:
        for name in ("num_params", "nodes", "ranks_per_node", "bucket_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 1")
        if not 0 <= self.compute_s < math.inf:
            raise ConfigError(f"compute_s is {self.compute_s}: must be at least 0")

    @property
    def width(self) -> float:
        """Of the matrices: as given, or of a transformer of 12 width^2 L weights, width 64 L."""
        return self.dim or (self.num_params * 64 / 12) ** (1 / 3)


class CodecTimes(NamedTuple):
    """Seconds an element on one rank: before a bucket is sent, and after."""

    before: float
    after: float


class Prediction(NamedTuple):
    """Duration of a step, and what a node sends over its link in it."""

    method: str
    step_s: float
    wire_bytes: float


class _Traffic(NamedTuple):
    """Bytes over a link, latencies waited for, and messages sent at once."""

    num_bytes: float
    hops: int
    messages: int = 0

    def seconds(self, link: Link) -> float:
        waiting = self.hops * link.latency_s + self.messages * link.message_s
        return waiting + 8 * self.num_bytes / link.bits_per_s


def predict(job: Job, method: str, times: CodecTimes) -> Prediction:
    """The step time of a method.

    Args:
        job: Model, nodes and links.
        method: ``"none"``, a codec, or ``"CODEC/GATHER"``; with ``"+none"`` or ``"+block8"`` it has
            two levels, with that codec inside the nodes.
        times: Of the codec, see :func:`measure_codec`.
    """
    encoder_free = link_free = wire_bytes = 0.0
    ready = job.compute_s * (1 - job.backward_share)
    for numel in _bucket_numels(job):
        ready += job.compute_s * job.backward_share * numel / job.num_params
        encoder_free = max(encoder_free, ready) + numel * times.before
        between, inside = _bucket_traffic(job, method, numel)
        on_links = sum(part.seconds(job.between) for part in between)
        on_links += sum(part.seconds(job.inside) for part in inside)
        link_free = max(link_free, encoder_free) + on_links + numel * times.after
        wire_bytes += sum(part.num_bytes for part in between)
    return Prediction(method, max(job.compute_s, link_free), wire_bytes)


def recommend(predictions: Sequence[Prediction]) -> tuple[Prediction, str]:
    """The fastest step, full precision if nothing is much faster, and why.

    Faster is not always better: fewer bits than 4 cost some loss a step (bench/results).
    """
    exact = next(found for found in predictions if found.method == "none")
    best = min(predictions, key=lambda found: found.step_s)
    if best.step_s > WORTH * exact.step_s:
        return exact, "compression does not pay: the link is not what the step waits for"
    return best, f"{exact.step_s / best.step_s:.1f} times faster a step than fp32"


def measure_codec(method: str, world_size: int, numel: int = 2 * MIB) -> CodecTimes:
    """Times of a method's codec on one thread of this machine."""
    codec, gather = _codecs(method)
    if isinstance(codec, ExactCodec):
        return CodecTimes(0.0, 0.0)
    if isinstance(codec, LowRankCodec):
        return _measure_low_rank(codec, numel)
    assert isinstance(codec, BlockwiseCodec)
    shards = min(world_size, 8)
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


def parse_rate(text: str) -> float:
    """Bits a second of a text such as ``200mbit``, ``10gbit`` or ``1.5e9``.

    Raises:
        ConfigError: It is not one.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmgt]?)(?:bit(?:/s)?)?", text.lower())
    try:
        rate = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise ConfigError(f"rate is {text!r}: must be a number with kbit, mbit or gbit")
    return rate


def plan_table(
    *,
    rate: str,
    latency_us: float,
    nodes: int,
    ranks_per_node: int,
    inside_rate: str,
    params: float,
    dim: int | None,
    compute_ms: float,
    methods: Sequence[str] | None,
) -> str:
    """The text of ``commrt plan``: a row for each method, and what to use.

    Raises:
        ConfigError: Names the value and what is allowed.
    """
    job = Job(
        num_params=int(params),
        compute_s=compute_ms / 1e3,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        between=Link(bits_per_s=parse_rate(rate), latency_s=latency_us / 1e6),
        inside=Link(bits_per_s=parse_rate(inside_rate), latency_s=20e-6),
        dim=dim,
    )
    two_levels = ("loco4+none", "loco4+block8") if ranks_per_node > 1 and nodes > 1 else ()
    names = list(dict.fromkeys(("none", *(methods or (*CANDIDATES, *two_levels)))))
    world_size = nodes * ranks_per_node
    found = [predict(job, name, measure_codec(name, world_size)) for name in names]
    best, reason = recommend(found)
    lines = [f"{'method':14} {'step':>10} {'to fp32':>8} {'MB a node and step':>19}"]
    for row in found:
        speed_up = found[0].step_s / row.step_s
        wire_mb = row.wire_bytes / 1e6
        lines.append(f"{row.method:14} {1e3 * row.step_s:7.0f} ms {speed_up:7.2f}x {wire_mb:19.2f}")
    return "\n".join([*lines, f"use {best.method}: {reason}"])


def _codecs(method: str) -> tuple[Codec, BlockwiseCodec]:
    codec_spec, _, gather_spec = method.partition("+")[0].partition("/")
    codec = parse(codec_spec)
    gather = with_block(gather_spec or "block8", codec.block)
    assert isinstance(gather, BlockwiseCodec)
    return codec, gather


def _bucket_numels(job: Job) -> list[float]:
    """Elements of each bucket, in the order in which they become ready."""
    sizes: list[float] = []
    left = job.num_params * GRADIENT_BYTES
    while left > 0:
        sizes.append(min(left, job.bucket_bytes if sizes else FIRST_BUCKET_BYTES))
        left -= int(sizes[-1])
    return [size / GRADIENT_BYTES for size in sizes]


def _bucket_traffic(job: Job, method: str, numel: float) -> tuple[list[_Traffic], list[_Traffic]]:
    """What one bucket sends over a node's link, and inside nodes over a rank's."""
    codec, gather = _codecs(method)
    intra = method.partition("+")[2]
    ranks, local = job.nodes * job.ranks_per_node, job.ranks_per_node
    if isinstance(codec, ExactCodec):
        return [_ring(numel * GRADIENT_BYTES, ranks, passes=2)], []
    reduced, gathered = _payload_bytes(job, codec, gather, numel)
    small = numel * SMALL_SHARE * GRADIENT_BYTES  # in the messages of the others, on both legs
    reduced, gathered = reduced + small, gathered + small
    if intra:
        share = reduced * (job.nodes - 1) / job.nodes
        between = [_Traffic(share, 1, job.nodes), _ring(gathered, job.nodes)]
        inside_codec = with_block(intra, codec.block)
        assert isinstance(inside_codec, BlockwiseCodec)
        bits = inside_codec.payload_bytes(1) / inside_codec.block
        away = numel * bits * (local - 1) / local
        return between, [_Traffic(away, 1, local), _ring(gathered, local)]
    off_node = local * reduced * (ranks - local) / ranks
    legs = [_Traffic(off_node, 1, ranks), _ring(gathered, ranks)]
    if isinstance(codec, LowRankCodec):  # whose first factor makes the way as well
        legs += [_Traffic(0, 1, ranks), _ring(0, ranks)]
    return legs, []


def _payload_bytes(
    job: Job, codec: Codec, gather: BlockwiseCodec, numel: float
) -> tuple[float, float]:
    """Of a bucket, on the reduce leg and on the gather leg, both for all elements."""
    gather_bytes = gather.payload_bytes(1) / gather.block
    if isinstance(codec, LowRankCodec):
        # A transformer's matrices, 12 width^2 elements a layer, have 16 width rows and columns.
        factor = numel * codec.rank * 16 / 12 / job.width / 2
        basis, values = codec.basis_codec, codec.values_codec
        both = basis.payload_bytes(1) / basis.block, values.payload_bytes(1) / values.block
        return factor * sum(both), factor * (both[0] + gather_bytes)
    assert isinstance(codec, BlockwiseCodec)
    return numel * codec.payload_bytes(1) / codec.block, numel * gather_bytes


def _ring(num_bytes: float, ranks: int, passes: int = 1) -> _Traffic:
    """A ring of so many ranks crosses each node's link once, in every pass."""
    hops = min(ranks - 1, 2 * math.ceil(math.log2(ranks)))
    return _Traffic(passes * num_bytes * (ranks - 1) / ranks, passes * hops)


def _measure_low_rank(codec: LowRankCodec, numel: int) -> CodecTimes:
    width = math.isqrt(numel)
    matrix, basis = torch.randn(width, width), torch.randn(codec.rank, width)

    def before() -> None:
        error = torch.empty(width * width)
        residual = torch.zeros(codec.residual_bytes(error.numel()), dtype=torch.uint8)
        codec.decode_residual(residual, error)
        values = orthonormal(basis @ matrix.add_(error.view_as(matrix)).T) @ matrix
        codec.encode_residual(torch.addmm(matrix, basis.T, values).flatten(), residual, 0)

    def after() -> None:
        matrix.copy_(orthonormal(basis).T @ basis)

    return CodecTimes(_median_s(before) / numel, _median_s(after) / numel)


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
