"""Step time on slow links: method against method, rate against rate, on emulated nodes.

Every node is a network namespace with one rank; its link is shaped both ways by
``launch/netcluster`` (emulated: nodes share this machine's cores, so compute is slower and noisier
than on a cluster).
Within a cell, methods take turns, a few steps each, in one run of the ranks. A step is a forward,
backward and AdamW step of the main job's model; it lasts from when the last rank begins it to when
the last rank ends it, which in a run without pauses is the time a step takes. Bytes are
those of the interface's counter, headers and acknowledgements included. What ``commrt plan``
predicts stands beside it, from the cell's own links, codec times and compute. Where ranks share
cores, compute alone (``noop``) says too little: the model is given that of ranks that wait for each
other bucket by bucket (``empty``).

    python -m bench.cluster --nodes 4 --rates 100mbit none -o bench/results/cluster.json
    python -m bench.cluster --rates 200mbit --methods fsdp2:noop fsdp2 fsdp2-a2a fsdp2:loco4/block8
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench import harness
from bench.methods import Method, bucket_cap_mb, install
from commrt import plan as planning
from commrt.collectives import ring_all_reduce_bytes
from commrt.testing import interface_bytes
from commrt.training.config import PRESETS, ModelConfig
from commrt.training.model import GPT, next_byte_losses

METHODS = (
    *("noop", "empty", "fp32", "fp16", "powersgd:4", "powersgd:8"),
    *("loco8", "loco4", "loco2/block2", "loco1/block1"),
    *("lowrank8+small=block8", "lowrank16+small=block8"),
    *("loco4+intra=none", "loco4+intra=block8"),  # where nodes have several ranks
)
PROBES = ("noop", "empty", "fsdp2:noop")
BASELINES = ("fp32", "fsdp2")  # of the methods in a cell, the first that is there
ROOT = Path(__file__).parents[1]
WARM_STEPS = 3  # of each method at first: DDP's first buckets, PowerSGD's plain steps
COLUMNS = (
    *("nodes", "ranks", "rate", "method", "step_ms", "p90_ms", "speed_up", "limit_ms", "to_limit"),
    *("interface_MB", "to_payload", "planned_ms", "plan_error"),
)


class Job:
    """One method's model, optimizer and measurements on one rank."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.interface_bytes = self.payload_bytes = 0
        preset = PRESETS[args.preset]
        config = ModelConfig(
            dim=preset.dim,
            num_layers=preset.num_layers,
            num_heads=preset.num_heads,
            seq_len=args.seq_len,
        )
        torch.manual_seed(0)
        self.method: Method = install(name, GPT(config), bucket_mb=args.bucket_mb)
        self.optimizer = torch.optim.AdamW(self.method.model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(dist.get_rank())
        shape = args.batch_size, args.seq_len + 1
        text = torch.randint(0, 256, shape, generator=generator)
        self.inputs, self.targets = text[:, :-1], text[:, 1:]

    def step(self) -> None:
        next_byte_losses(self.method.model(self.inputs), self.targets).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, num_steps: int) -> None:
        """Take steps; the first, which may wait for ranks that begin late, is not counted."""
        self.step()
        dist.barrier()
        sent, paid = sent_bytes(), self._payload()
        for _ in range(num_steps):
            if self.name.endswith("noop"):  # whose ranks would not wait for each other
                dist.barrier()
            self.begins.append(time.monotonic())
            self.step()
            self.ends.append(time.monotonic())
        self.interface_bytes += sent_bytes() - sent
        self.payload_bytes += self._payload() - paid

    def _payload(self) -> int:
        return self.method.comm.stats().wire_bytes if self.method.comm else 0

    def results(self, num_params: int) -> dict[str, Any]:
        """Over all ranks, which have one clock: the busiest interface's bytes, the last rank's
        times.
        """
        begins, ends, sums = (
            torch.tensor(values, dtype=torch.float64)
            for values in (self.begins, self.ends, (self.interface_bytes, self.payload_bytes))
        )
        for values in (begins, ends, sums):
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        durations, steps = (ends - begins).tolist(), len(ends)
        interface, payload = (sums / steps).tolist()
        return {
            "method": self.name,
            "step_ms": 1e3 * statistics.median(durations),
            "p90_ms": 1e3 * statistics.quantiles(durations, n=10)[-1],
            "interface_bytes": interface,
            "payload_bytes": payload or self._known_payload(num_params),
            "durations_ms": [round(1e3 * duration, 3) for duration in durations],
        }

    def _known_payload(self, num_params: int) -> float:
        """A ring all-reduce's bytes; nothing is known of PowerSGD's."""
        num_bytes = {"fp32": 4, "fp16": 2}.get(self.name, 0) * num_params
        return ring_all_reduce_bytes(num_bytes, dist.get_world_size())


def sent_bytes() -> int:
    """Bytes sent over this node's interface so far."""
    return interface_bytes(os.environ["GLOO_SOCKET_IFNAME"])


def run_rank(args: argparse.Namespace) -> None:
    """What a rank of a cell does; rank 0 writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    jobs = [Job(name, args) for name in args.methods]
    for job in jobs:
        for _ in range(WARM_STEPS):
            job.step()
    for _ in range(args.rounds):
        for job in jobs:
            job.measure(args.steps)
    num_params = sum(parameter.numel() for parameter in jobs[0].method.model.parameters())
    rows = [job.results(num_params) for job in jobs]
    add_plan(rows, num_params, args)
    if dist.get_rank() == 0:
        args.cell.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def add_plan(rows: list[dict[str, Any]], num_params: int, args: argparse.Namespace) -> None:
    """Add what ``commrt plan`` predicts, and by how much that is wrong. Ranks: all."""
    cluster = planning.measure_cluster(int(os.environ["LOCAL_WORLD_SIZE"]))
    compute_ms = next((row["step_ms"] for row in rows if row["method"] == "empty"), None)
    job = planning.Job(
        num_params=num_params,
        compute_s=(compute_ms or 0.0) / 1e3,
        cluster=cluster,
        dim=PRESETS[args.preset].dim,
    )
    for row in rows:
        row |= dict.fromkeys(("planned_ms", "plan_error"), float("nan"))
        name = planned_name(row["method"])
        if not name or compute_ms is None:
            continue
        times = measure_codec(name, job)
        bucket_mb = bucket_cap_mb(row["method"]) or args.bucket_mb
        bucketed = dataclasses.replace(
            job, bucket_bytes=int(bucket_mb * 2**20) if bucket_mb else None
        )
        planned_ms = 1e3 * planning.predict(bucketed, name, times).step_s
        row |= {
            "planned_ms": planned_ms,
            "plan_error": planned_ms / row["step_ms"] - 1,
            "link_mbit_per_s": cluster.between.bits_per_s / 1e6,
            "link_latency_us": cluster.between.latency_s * 1e6,
            "codec_ms": 1e3 * num_params * sum(times),
        }


def planned_name(method: str) -> str:
    """What ``commrt plan`` calls it; empty if it does not know it."""
    if method in ("noop", "empty", "fp16") or method.startswith(("powersgd", "fsdp", "hsdp")):
        return ""
    return "none" if method == "fp32" else method


def measure_codec(name: str, job: planning.Job) -> planning.CodecTimes:
    """Its times on an idle machine, multiplied by the number of ranks that share a core."""
    times = torch.zeros(2, dtype=torch.float64)
    if dist.get_rank() == 0:
        times = torch.tensor(planning.measure_codec(name, job), dtype=torch.float64)
    dist.broadcast(times, src=0)
    ranks_per_core = max(1.0, dist.get_world_size() / (os.cpu_count() or 1))
    return planning.CodecTimes(*times.mul_(ranks_per_core).tolist())


def run_cell(nodes: int, ranks: int, rate: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods on ``nodes`` emulated nodes with ``ranks`` each, at one rate."""
    methods = [name for name in args.methods if ranks > 1 or "intra=" not in name]
    with tempfile.TemporaryDirectory() as folder:
        cell = Path(folder, "cell.json")
        command = [
            *(str(ROOT / "launch/netcluster"), "--nodes", str(nodes), "--rate", rate),
            *("--nproc-per-node", str(ranks), "--"),
            *("-m", "bench.cluster", "--cell", str(cell), "--methods", *methods),
            *("--preset", args.preset, "--batch-size", str(args.batch_size)),
            *("--seq-len", str(args.seq_len), "--rounds", str(args.rounds)),
            *("--steps", str(args.steps)),
            *(("--bucket-mb", str(args.bucket_mb)) if args.bucket_mb else ()),
        ]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows: list[dict[str, Any]] = json.loads(cell.read_text())
    by_method = {row["method"]: row for row in rows}
    compute_ms = max((row["step_ms"] for row in rows if row["method"].endswith("noop")), default=0)
    baseline = next((by_method[name] for name in BASELINES if name in by_method), None)
    for row in rows:
        row |= {"nodes": nodes, "ranks": ranks, "rate": rate}
        row |= compare(row, baseline, compute_ms)
    return rows


def compare(
    row: dict[str, Any], dense: dict[str, Any] | None, compute_ms: float
) -> dict[str, float]:
    """What is computed from other rows of the cell: the speed-up and the limit."""
    limit_ms = max(compute_ms, 8e3 * row["interface_bytes"] / bits_per_s(row["rate"]))
    nan, payload = float("nan"), row["payload_bytes"] * row["ranks"]
    return {
        "speed_up": dense["step_ms"] / row["step_ms"] if dense else nan,
        "limit_ms": limit_ms,
        "to_limit": row["step_ms"] / limit_ms if limit_ms else nan,
        "interface_MB": row["interface_bytes"] / 1e6,
        "to_payload": row["interface_bytes"] / payload if payload and row["ranks"] == 1 else nan,
    }


def bits_per_s(rate: str) -> float:
    """Of a rate as netcluster takes it; infinite for "none"."""
    return float("inf") if rate == "none" else planning.parse_rate(rate)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up over fp32 of each method, rate by rate, on the most nodes of one rank."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["ranks"] == 1 and row["method"] not in PROBES]
    nodes = max(row["nodes"] for row in rows)
    rows = [row for row in rows if row["nodes"] == nodes]
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        found = {row["rate"]: row["speed_up"] for row in rows if row["method"] == method}
        places = [position + index * width for position in range(len(rates))]
        axes.bar(places, [found.get(rate, 0.0) for rate in rates], width, label=method)
    axes.set_xticks([position + 0.4 - width / 2 for position in range(len(rates))], rates)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="times faster a step than fp32", yscale="log")
    axes.set_title(f"{nodes} emulated nodes")
    axes.legend(ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", nargs="+", default=["4"], help="such as 4, or 2x2 ranks")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "200mbit", "1gbit", "none"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--preset", default="7m", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--bucket-mb", type=float, help="DDP's; PowerSGD has one bucket")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a method in a round")
    parser.add_argument("-o", "--output", type=Path, help="JSON file; the plot goes beside it")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        run_rank(args)
        return
    rows: list[dict[str, Any]] = []
    for nodes in args.nodes:
        for rate in args.rates:
            print(f"# {nodes} nodes, {rate}", file=sys.stderr, flush=True)
            count, _, ranks = nodes.partition("x")
            rows += run_cell(int(count), int(ranks or 1), rate, args)
            if args.output:
                hidden = ("output", "cell")
                config = {name: value for name, value in vars(args).items() if name not in hidden}
                harness.save(args.output, config=config, results=rows)
    harness.print_table(COLUMNS, rows)
    if args.output:
        plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
