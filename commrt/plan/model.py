"""Step times by an alpha-beta model.

A step is replayed bucket by bucket, as DDP and the hook run it: gradients become ready evenly over
the backward pass; a bucket is encoded, sent on the reduce leg, averaged, sent on the gather leg and
decoded. The link carries one message after the other, each in ``latency + bytes / rate``; codecs
share the cores with the compute. All-reduce and all-gather are rings with a latency a hop, or trees
where those have fewer hops; an all-to-all reaches all peers at once, but for the cost of sending
each message. Checked against emulated nodes (bench/results); for thousands it is arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from commrt.codecs import BlockwiseCodec, Codec, ExactCodec, LowRankCodec, parse, with_block
from commrt.collectives import check_gather
from commrt.errors import ConfigError

MIB = 1 << 20
FIRST_BUCKET_BYTES, BUCKET_BYTES = MIB, 25 * MIB  # DDP's own
GRADIENT_BYTES = 4
SMALL_SHARE = 0.003  # of the elements: biases and norms, which the codec does not take
WORTH = 0.95  # of fp32's step time; a smaller gain is not worth a codec

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


INSIDE = Link(bits_per_s=100e9, latency_s=20e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes and their links.

    Attributes:
        nodes: Number of nodes.
        between: The link of a node to the others.
        ranks_per_node: Ranks of each, which share its link.
        inside: The link of a rank to the others of its node.

    Raises:
        ConfigError: For numbers below 1.
    """

    nodes: int
    between: Link
    ranks_per_node: int = 1
    inside: Link = INSIDE

    def __post_init__(self) -> None:
        _require_positive(self, "nodes", "ranks_per_node")

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.ranks_per_node


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and on what.

    Attributes:
        num_params: Parameters of the model.
        compute_s: Of a step without communication, optimizer included.
        cluster: Where.
        dim: Width of the model's matrices; None guesses that of a transformer of this size.
        bucket_bytes: DDP's ``bucket_cap_mb``, in bytes; None is DDP's default.
        backward_share: Of the compute, the part during which gradients become ready.

    Raises:
        ConfigError: For values that make no sense.
    """

    num_params: int
    compute_s: float
    cluster: Cluster
    dim: int | None = None
    bucket_bytes: int | None = None
    backward_share: float = 0.6

    def __post_init__(self) -> None:
        _require_positive(self, "num_params", "bucket_bytes")
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


class Method(NamedTuple):
    """What travels how.

    Attributes:
        codec: Of the reduce leg.
        gather: Of the gather leg.
        intra: Inside the nodes; None without a level of its own.
        small: Of the parameters that the codec does not take.
    """

    codec: Codec
    gather: BlockwiseCodec
    intra: BlockwiseCodec | None
    small: BlockwiseCodec

    @classmethod
    def parse(cls, text: str) -> Method:
        """Of ``CODEC[/GATHER][+intra=CODEC][+small=CODEC]``.

        Raises:
            ConfigError: It is not one.
        """
        spec, *pairs = text.split("+")
        codec_spec, _, gather_spec = spec.partition("/")
        codec = parse(codec_spec)
        options = {"gather": gather_spec or "block8", "small": "none"}
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name not in ("intra", "small"):
                raise ConfigError(f"{pair!r} in {text!r}: must be intra=CODEC or small=CODEC")
            options[name] = value
        found = {
            name: check_gather(codec, with_block(value, codec.block), name)
            for name, value in options.items()
        }
        return cls(codec, found["gather"], found.get("intra"), found["small"])


class Traffic(NamedTuple):
    """Bytes over a link, latencies waited for, and messages sent at once."""

    num_bytes: float
    hops: int
    messages: int = 0

    def seconds(self, link: Link) -> float:
        """On an idle link."""
        waiting = self.hops * link.latency_s + self.messages * link.message_s
        return waiting + 8 * self.num_bytes / link.bits_per_s


def ring(num_bytes: float, ranks: int, passes: int = 1) -> Traffic:
    """A ring of so many ranks crosses each node's link once, in every pass."""
    hops = min(ranks - 1, 2 * math.ceil(math.log2(ranks)))
    return Traffic(passes * num_bytes * (ranks - 1) / ranks, passes * hops)


def predict(job: Job, name: str, times: CodecTimes) -> Prediction:
    """The step time of a method.

    Args:
        job: Model, nodes and links.
        name: The method: ``"none"`` (plain DDP), a codec, or ``"CODEC/GATHER"``; with
            ``"+intra=none"`` or ``"+intra=block8"`` it has two levels, with that codec inside the
            nodes, and ``"+small=block8"`` is :class:`commrt.Comm`'s ``small``.
        times: Of the codec, see :func:`measure_codec`.

    Raises:
        ConfigError: There is no such method.
    """
    method = Method.parse(name)
    link_free = wire_bytes = 0.0
    compute_free = job.compute_s * (1 - job.backward_share)
    for numel in _bucket_numels(job):
        compute_free += job.compute_s * job.backward_share * numel / job.num_params
        compute_free += numel * times.before
        between, inside = _bucket_traffic(job, method, numel)
        on_links = sum(part.seconds(job.cluster.between) for part in between)
        on_links += sum(part.seconds(job.cluster.inside) for part in inside)
        link_free = max(link_free, compute_free) + on_links + numel * times.after
        wire_bytes += sum(part.num_bytes for part in between)
    return Prediction(name, max(compute_free, link_free), wire_bytes)


def recommend(predictions: Sequence[Prediction]) -> tuple[Prediction, str]:
    """The fastest step, full precision if nothing is much faster, and why.

    Faster is not always better: fewer bits than 4 cost some loss a step (bench/results).
    """
    exact = next(found for found in predictions if found.method == "none")
    best = min(predictions, key=lambda found: found.step_s)
    if best.step_s > WORTH * exact.step_s:
        return exact, "compression does not pay: the link is not what the step waits for"
    return best, f"{exact.step_s / best.step_s:.1f} times faster a step than fp32"


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


def _require_positive(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: must be at least 1")


def _bucket_numels(job: Job) -> list[float]:
    """Elements of each bucket, in the order in which they become ready."""
    sizes: list[float] = []
    left = job.num_params * GRADIENT_BYTES
    while left > 0:
        default = BUCKET_BYTES if sizes else FIRST_BUCKET_BYTES
        sizes.append(min(left, job.bucket_bytes or default))
        left -= int(sizes[-1])
    return [size / GRADIENT_BYTES for size in sizes]


def _bucket_traffic(job: Job, method: Method, numel: float) -> tuple[list[Traffic], list[Traffic]]:
    """What one bucket sends over a node's link, and inside nodes over a rank's."""
    nodes, ranks, local = job.cluster.nodes, job.cluster.ranks, job.cluster.ranks_per_node
    if isinstance(method.codec, ExactCodec):
        return [ring(numel * GRADIENT_BYTES, ranks, passes=2)], []
    reduced, gathered = _payload_bytes(job, method, numel)
    if method.intra is not None:
        between = [Traffic(reduced * (nodes - 1) / nodes, 1, nodes), ring(gathered, nodes)]
        away = numel * _bytes_each(method.intra) * (local - 1) / local
        return between, [Traffic(away, 1, local), ring(gathered, local)]
    off_node = local * reduced * (ranks - local) / ranks
    legs = [Traffic(off_node, 1, ranks), ring(gathered, ranks)]
    if isinstance(method.codec, LowRankCodec):  # whose first factor makes the way as well
        legs += [Traffic(0, 1, ranks), ring(0, ranks)]
    return legs, []


def _payload_bytes(job: Job, method: Method, numel: float) -> tuple[float, float]:
    """Of a bucket, on the reduce leg and on the gather leg, both for all elements."""
    small = numel * SMALL_SHARE * _bytes_each(method.small)  # in the messages of the others
    codec, gather_bytes = method.codec, _bytes_each(method.gather)
    if isinstance(codec, LowRankCodec):
        # A transformer's matrices, 12 width^2 elements a layer, have 16 width rows and columns.
        factor = numel * codec.rank * 16 / 12 / job.width / 2
        basis, values = _bytes_each(codec.basis_codec), _bytes_each(codec.values_codec)
        return factor * (basis + values) + small, factor * (basis + gather_bytes) + small
    assert isinstance(codec, BlockwiseCodec)
    return numel * _bytes_each(codec) + small, numel * gather_bytes + small


def _bytes_each(codec: BlockwiseCodec) -> float:
    """Bytes of an element, scales included."""
    return codec.payload_bytes(1) / codec.block
