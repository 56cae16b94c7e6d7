"""What has been sent: ``Comm.stats()``, and the text of ``Comm.report()``."""

import dataclasses
from collections.abc import Mapping

from commrt.codecs import BlockwiseCodec, ExactCodec
from commrt.hooks.wiring import Codecs, Nodes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommStats:
    """What this rank has sent since the hook was attached.

    With a hierarchy the bytes are those between nodes, but for ``node_bytes``.

    Attributes:
        steps: Backward passes that were communicated.
        reduce_bytes: Sent on the reduce leg (gradients to their owners).
        gather_bytes: Sent on the gather leg (means back to everybody).
        node_bytes: Sent to ranks of the same node, with a hierarchy; else 0.
        exact_bytes: Sent uncompressed: small parameters, on both legs, and steps that are averaged
            as plain DDP does, in a ring over all ranks.
        dense_bytes: What a ring all-reduce of the same buckets, uncompressed, sends; with a
            hierarchy, one between nodes, of which each local rank does its share.
        residual_bytes: Memory of the residuals.
        codec_s: Seconds spent encoding and decoding; on a GPU, queueing it.
        network_s: Seconds spent inside the process group, likewise.
    """

    steps: int
    reduce_bytes: int
    gather_bytes: int
    node_bytes: int
    exact_bytes: int
    dense_bytes: int
    residual_bytes: int
    codec_s: float
    network_s: float

    @property
    def wire_bytes(self) -> int:
        """All bytes sent; with a hierarchy, between nodes."""
        return self.reduce_bytes + self.gather_bytes + self.exact_bytes

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than uncompressed; 1 before the first step."""
        return self.dense_bytes / self.wire_bytes if self.wire_bytes else 1.0


def format_report(
    *,
    stats: CommStats,
    codecs: Codecs,
    world_size: int,
    nodes: Nodes | None,
    kernels: str,
    num_compressed: int,
    exempt: Mapping[str, tuple[str, int]],
    plain_reason: str,
    is_queued: bool,
) -> str:
    """Settings, bytes a step of each leg, and the reason of every uncompressed parameter."""
    steps = max(stats.steps, 1)
    lines = [
        f"commrt: {world_size} ranks, codec {codecs.codec.spec}, gather {codecs.gather.spec}",
        f"  kernels      {kernels}",
        f"  compressed   {num_compressed:,} elements, "
        f"residuals {stats.residual_bytes:,} bytes on this rank",
        *_exempt_lines(exempt, codecs.small),
        f"  bytes a step {stats.wire_bytes / steps:,.0f} sent by this rank: "
        f"reduce leg {stats.reduce_bytes / steps:,.0f}, "
        f"gather leg {stats.gather_bytes / steps:,.0f}, "
        f"uncompressed {stats.exact_bytes / steps:,.0f}",
        f"  ratio        {stats.ratio:.2f} times fewer than a ring all-reduce "
        f"({stats.dense_bytes / steps:,.0f})",
        f"  time a step  codec {stats.codec_s / steps * 1e3:.2f} ms, "
        f"network {stats.network_s / steps * 1e3:.2f} ms, over {stats.steps} steps"
        + (", to queue it: a GPU works later" if is_queued else ""),
    ]
    if nodes is not None:
        lines.insert(
            1,
            f"  two levels   {len(nodes)} nodes of {len(nodes[0])} ranks, intra "
            f"{codecs.intra.spec}; bytes are those between nodes",
        )
        lines.append(f"  inside nodes {stats.node_bytes / steps:,.0f} bytes a step")
    if plain_reason:
        lines.append(f"  uncompressed all gradients now: {plain_reason}")
    if world_size == 1:
        lines.append("  world size 1: nothing is sent and nothing is compressed")
    return "\n".join(lines)


def _exempt_lines(exempt: Mapping[str, tuple[str, int]], small: BlockwiseCodec) -> list[str]:
    by_reason: dict[str, list[tuple[str, int]]] = {}
    for name, (reason, numel) in exempt.items():
        by_reason.setdefault(reason, []).append((name, numel))
    how = "uncompressed" if isinstance(small, ExactCodec) else f"{small.spec.split(':')[0]:12}"
    return [
        f"  {how} {sum(numel for _, numel in members):,} elements in {len(members)} "
        f"parameters: {reason} ({members[0][0]}{', ...' if len(members) > 1 else ''})"
        for reason, members in by_reason.items()
    ]
