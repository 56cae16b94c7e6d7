"""What an offloaded optimizer does, as a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from commrt.optim.offloading.plan import Load, Plan

if TYPE_CHECKING:
    from commrt.optim.offloading.link import Link

_WORK = {
    "up": "link, host to device",
    "down": "link, device to host",
    "device": "steps of the device",
    "host": "steps of the host",
}


def describe(
    link: Link,
    plan: Plan,
    *,
    host_bytes: int,
    steps: int,
    last_s: float | None,
    note: str | None,
) -> str:
    """Returns a few lines: what is where, what crosses the link, and how long it should take.

    Args:
        link: That it crosses.
        plan: Which parameters the host steps.
        host_bytes: Memory of the host.
        steps: That have been taken.
        note: What else is to be said.
        last_s: Seconds of the last one; None if it was not waited for.
    """
    loads, rates = plan.loads, plan.rates
    hosted = [load for load in loads if load.parameter in plan.hosted]
    streamed = [load for load in loads if load.parameter not in plan.hosted]
    staying = [load for load in streamed if load.state_bytes == 0]
    numel = sum(load.numel for load in loads)
    kind = "emulated link" if link.is_emulated else f"link to {link.device}"
    lines = [
        f"{kind}: {rates.up / 1e9:.3g} GB/s up, {rates.down / 1e9:.3g} GB/s down",
        f"state streams to the device:   {_amount(streamed)}",
        f"  of these it stays there:     {_amount(staying)} (too small to move)",
        f"gradients come to the host:    {_amount(hosted)}",
        f"host memory: {host_bytes / 2**20:.1f} MiB",
        f"predicted: {plan.predicted_s * 1e3:.3g} ms a step, bound by the "
        f"{_WORK[max(plan.times_s, key=lambda name: plan.times_s[name])]}: "
        + ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in plan.times_s.items()),
    ]
    if last_s is not None:
        lines.append(f"last step: {last_s * 1e3:.3g} ms")
    if steps:
        up, down = (way.num_bytes / steps / numel for way in (link.up, link.down))
        lines.append(f"bytes a parameter and step: {up:.3f} up, {down:.3f} down")
    if note is not None:
        lines.append(note)
    return "\n".join(lines)


def _amount(loads: Sequence[Load]) -> str:
    return f"{len(loads)} parameters of {sum(load.numel for load in loads):,} elements"
