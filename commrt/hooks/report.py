"""What has been sent: ``Comm.stats()``, and the text of ``Comm.report()``."""

import dataclasses
from collections.abc import Mapping, Sequence

from commrt.codecs import ExactCodec
from commrt.hooks.wiring import Codecs


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommStats:
    """What this rank has sent since the hook was attached.

    With a hierarchy the bytes are those between nodes, but for ``node_bytes``.

    Attributes:
        steps: Backward passes that were communicated.
        reduce_bytes: Sent on the reduce leg (gradients to their owners).
        gather_bytes: Sent on the gather leg (means back to everybody).
        weight_bytes: Sent by the weight gathers of FSDP2, compressed or not; inside nodes too, with
            a hierarchy. FSDP1's are not counted.
        node_bytes: Sent to ranks of the same node, with a hierarchy, or of the same shard group,
            with HSDP; else 0.
        exact_bytes: Sent uncompressed: small gradients, on both legs, and steps that are averaged
            as without commrt, in a ring over all ranks (a sharded model's on gloo by its
            reduce-scatter, which sends as much as an all-reduce).
        dense_bytes: What rings send for the same, uncompressed: an all-reduce of DDP's buckets, or
            the reduce-scatter of a sharded model and the weight gathers of FSDP2; with a hierarchy,
            between nodes, of which each local rank does its share.
        residual_bytes: Memory of the residuals.
        codec_s: Seconds spent encoding and decoding; on a GPU, queueing it.
        network_s: Seconds spent inside the process group, likewise.
    """

    steps: int
    reduce_bytes: int
    gather_bytes: int
    weight_bytes: int
    node_bytes: int
    exact_bytes: int
    dense_bytes: int
    residual_bytes: int
    codec_s: float
    network_s: float

    @property
    def wire_bytes(self) -> int:
        """All bytes sent; with a hierarchy, between nodes."""
        return self.reduce_bytes + self.gather_bytes + self.weight_bytes + self.exact_bytes

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than uncompressed; 1 before the first step."""
        return self.dense_bytes / self.wire_bytes if self.wire_bytes else 1.0


def format_report(
    *,
    stats: CommStats,
    title: str,
    codecs: Codecs,
    world_size: int,
    kernels: str,
    num_compressed: int,
    exempt: Mapping[str, tuple[str, int]],
    remarks: Sequence[str],
    verbose: bool,
    is_queued: bool,
) -> str:
    """Settings, bytes a step of each leg, and the reason of every uncompressed parameter."""
    steps = max(stats.steps, 1)
    legs = {
        "reduce leg": stats.reduce_bytes,
        "gather leg": stats.gather_bytes,
        "weights": stats.weight_bytes,
        "uncompressed": stats.exact_bytes,
        "inside nodes (not counted)": stats.node_bytes,
    }
    small = codecs.small
    how = "uncompressed" if isinstance(small, ExactCodec) else f"{small.spec.split(':')[0]:12}"
    lines = [
        f"commrt: {world_size} ranks, "
        + ", ".join(f"{name} {spec}" for name, spec in codecs.specs().items())
        + f" ({title})",
        f"  kernels      {kernels}",
        f"  compressed   {num_compressed:,} elements, "
        f"residuals {stats.residual_bytes:,} bytes on this rank",
        *(f"  {how} {line}" for line in exempt_lines(exempt, verbose=verbose)),
        f"  bytes a step {stats.wire_bytes / steps:,.0f} sent by this rank: "
        + ", ".join(f"{leg} {sent / steps:,.0f}" for leg, sent in legs.items() if sent),
        f"  ratio        {stats.ratio:.2f} times fewer than rings, uncompressed "
        f"({stats.dense_bytes / steps:,.0f})",
        f"  time a step  codec {stats.codec_s / steps * 1e3:.2f} ms, "
        f"network {stats.network_s / steps * 1e3:.2f} ms, over {stats.steps} steps"
        + (", to queue it: a GPU works later" if is_queued else ""),
        *(f"  {remark}" for remark in remarks),
    ]
    if world_size == 1:
        lines.append("  world size 1: nothing is sent and nothing is compressed")
    return "\n".join(lines)


def exempt_lines(exempt: Mapping[str, tuple[str, int]], *, verbose: bool) -> list[str]:
    """Parameters that are not compressed, a line for each reason; all their names if verbose."""
    by_reason: dict[str, list[tuple[str, int]]] = {}
    for name, (reason, numel) in exempt.items():
        by_reason.setdefault(reason, []).append((name, numel))
    lines = []
    for reason, members in by_reason.items():
        names = [name for name, _ in members]
        if not verbose and len(names) > 1:
            names[1:] = ["..."]
        lines.append(
            f"{sum(numel for _, numel in members):,} elements in {len(members)} "
            f"parameters: {reason} ({', '.join(names)})"
        )
    return lines
