"""The text of ``Comm.report()``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commrt.hooks.comm import CommStats


def format_report(
    *,
    stats: "CommStats",
    codec: str,
    gather: str,
    world_size: int,
    kernels: str,
    num_compressed: int,
    exempt: Mapping[str, tuple[str, int]],
    is_detached: bool,
) -> str:
    """Settings, bytes a step of each leg, and the reason of every uncompressed parameter."""
    steps = max(stats.steps, 1)
    lines = [
        f"commrt: {world_size} ranks, codec {codec}, gather {gather}",
        f"  kernels      {kernels}",
        f"  compressed   {num_compressed:,} elements, "
        f"residuals {stats.residual_bytes:,} bytes on this rank",
        *_exempt_lines(exempt),
        f"  bytes a step {stats.wire_bytes / steps:,.0f} sent by this rank: "
        f"reduce leg {stats.reduce_bytes / steps:,.0f}, "
        f"gather leg {stats.gather_bytes / steps:,.0f}, "
        f"uncompressed {stats.exact_bytes / steps:,.0f}",
        f"  ratio        {stats.ratio:.2f} times fewer than a ring all-reduce "
        f"({stats.dense_bytes / steps:,.0f})",
        f"  time a step  codec {stats.codec_s / steps * 1e3:.2f} ms, "
        f"network {stats.network_s / steps * 1e3:.2f} ms, over {stats.steps} steps",
    ]
    if is_detached:
        lines.append("  detached     gradients travel uncompressed")
    if world_size == 1:
        lines.append("  world size 1: nothing is sent and nothing is compressed")
    return "\n".join(lines)


def _exempt_lines(exempt: Mapping[str, tuple[str, int]]) -> list[str]:
    by_reason: dict[str, list[tuple[str, int]]] = {}
    for name, (reason, numel) in exempt.items():
        by_reason.setdefault(reason, []).append((name, numel))
    return [
        f"  uncompressed {sum(numel for _, numel in members):,} elements in {len(members)} "
        f"parameters: {reason} ({members[0][0]}{', ...' if len(members) > 1 else ''})"
        for reason, members in by_reason.items()
    ]
