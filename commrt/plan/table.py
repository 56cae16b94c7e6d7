"""``commrt plan``: predictions for a job, method by method, and what to use."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from commrt.errors import ConfigError
from commrt.plan.measure import measure_cluster, measure_codec
from commrt.plan.model import INSIDE, Cluster, Job, Link, parse_rate, predict, recommend

LATENCY_US = 100.0
CANDIDATES = ("none", "loco8", "loco4", "loco2/block2", "loco1/block1", "lowrank32", "lowrank8")
TWO_LEVELS = ("loco4+intra=none", "loco4+intra=block8")


def plan_table(
    *,
    rate: str | None,
    latency_us: float | None,
    nodes: int | None,
    ranks_per_node: int | None,
    inside_rate: str | None,
    params: float,
    dim: int | None,
    compute_ms: float,
    methods: Sequence[str] | None,
) -> str:
    """The text of ``commrt plan``: a row for each method, and what to use.

    Without ``rate`` the ranks that ``torchrun`` started measure their links; rank 0 has the text,
    the others an empty one.

    Raises:
        ConfigError: Names the value and what is allowed.

    Ranks: all, where links are measured.
    """
    given = (rate, latency_us, nodes, ranks_per_node, inside_rate)
    if rate is not None:
        cluster = _given_cluster(rate, latency_us, nodes, ranks_per_node, inside_rate)
    elif any(value is not None for value in given):
        raise ConfigError("rate is not given: links and nodes are given together, or all measured")
    else:
        cluster = _measured_cluster()
        if int(os.environ["RANK"]) > 0:
            return ""
    job = Job(num_params=int(params), compute_s=compute_ms / 1e3, cluster=cluster, dim=dim)
    lines = [] if rate else [_describe(cluster)]
    return "\n".join([*lines, *_rows(job, methods)])


def _rows(job: Job, methods: Sequence[str] | None) -> list[str]:
    two_levels = TWO_LEVELS if 1 < job.cluster.nodes < job.cluster.ranks else ()
    names = list(dict.fromkeys(("none", *(methods or (*CANDIDATES, *two_levels)))))
    found = [predict(job, name, measure_codec(name, job)) for name in names]
    best, reason = recommend(found)
    width = max(map(len, names))
    lines = [f"{'method':{width}} {'step':>10} {'to fp32':>8} {'MB a node and step':>19}"]
    for row in found:
        speed_up = found[0].step_s / row.step_s
        wire_mb = row.wire_bytes / 1e6
        lines.append(
            f"{row.method:{width}} {1e3 * row.step_s:7.0f} ms {speed_up:7.2f}x {wire_mb:19.2f}"
        )
    return [*lines, f"use {best.method}: {reason}"]


def _given_cluster(
    rate: str,
    latency_us: float | None,
    nodes: int | None,
    ranks_per_node: int | None,
    inside_rate: str | None,
) -> Cluster:
    if nodes is None:
        raise ConfigError("nodes is not given: must be at least 1")
    latency_us = LATENCY_US if latency_us is None else latency_us
    inside = INSIDE
    if inside_rate is not None:
        inside = dataclasses.replace(INSIDE, bits_per_s=parse_rate(inside_rate))
    return Cluster(
        nodes=nodes,
        ranks_per_node=1 if ranks_per_node is None else ranks_per_node,
        between=Link(bits_per_s=parse_rate(rate), latency_s=latency_us / 1e6),
        inside=inside,
    )


def _measured_cluster() -> Cluster:
    """The links between the ranks of ``torchrun``, and inside its nodes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError("rate is not given: must be, or run under torchrun with 2 ranks or more")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return measure_cluster(int(os.environ["LOCAL_WORLD_SIZE"]), device)
    finally:
        dist.destroy_process_group()


def _describe(cluster: Cluster) -> str:
    def text(link: Link) -> str:
        return f"{link.bits_per_s / 1e6:,.0f} Mbit/s and {1e6 * link.latency_s:,.0f} us"

    inside = f", {text(cluster.inside)} inside a node" if cluster.ranks_per_node > 1 else ""
    return (
        f"measured: {cluster.nodes} nodes with {cluster.ranks_per_node} ranks each, "
        f"{text(cluster.between)} between them{inside}"
    )
