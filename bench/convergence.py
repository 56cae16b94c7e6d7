"""Validation loss of the main job over seeds: codecs against "none", or optimizers against AdamW.

Every run is the real job: ``torchrun`` ranks on gloo, real text, real payloads. Runs that have
already finished in the output folder are kept, so a broken-off benchmark goes on where it stopped.

    python -m bench.convergence --steps 1000 --seeds 0 1 2 -o bench/results/convergence.json
    python -m bench.convergence --optims adam-mini adam-mini/int8 -o bench/results/optims.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import harness
from commrt.training.config import OPTIMIZERS

CODECS = (
    *("none", "loco4", "loco2", "loco2:beta=0.8", "block2"),
    *("loco4:block=1024", "block4:block=1024"),
)


def train(method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run's summary."""
    name = method.replace(":", "_").replace("=", "").replace("/", "_")
    out = args.runs / f"{args.parallel}-{name}-seed{seed}"
    summary = out / "summary.json"
    if not summary.exists():
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(args.ranks), "-m", "commrt", "train", "--no-progress"),
            *("--preset", args.preset, "--steps", str(args.steps), "--seed", str(seed)),
            *("--eval-windows", "512", "--out", str(out)),
            *("--parallel", args.parallel, "--hierarchy", str(args.hierarchy)),
            *options_of(method),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def options_of(method: str) -> list[str]:
    """Of the main job."""
    name, _, detail = method.partition("/")
    if name in OPTIMIZERS:
        return ["--codec", "none", "--optim", name, *(["--momentum", detail] if detail else [])]
    return [
        *("--codec", name),
        *(("--gather", detail) if detail else ()),
        *(("--keep-gathered",) if detail.startswith("delta") else ()),
    ]


def summarise(
    method: str, runs: Sequence[dict[str, Any]], exact: Sequence[float]
) -> dict[str, Any]:
    """Mean over seeds, and the gap to the baseline seed by seed."""
    losses = [run["val_loss"] for run in runs]
    gaps = [100 * (loss / base - 1) for loss, base in zip(losses, exact, strict=True)]
    return {
        "method": method,
        "val_loss": statistics.mean(losses),
        "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "gap_%": statistics.mean(gaps),
        "gap_min_%": min(gaps),
        "gap_max_%": max(gaps),
        "bytes_per_step": int(runs[0]["bytes_per_step"]),
        "losses": losses,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--codecs", nargs="+", default=CODECS, help="CODEC or CODEC/GATHER")
    choice.add_argument("--optims", nargs="+", help="OPTIMIZER or OPTIMIZER/MOMENTUM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parallel", default="ddp", help="ddp, fsdp1, fsdp2 or hsdp")
    parser.add_argument("--hierarchy", type=int, default=0, help="ranks of HSDP's shard groups")
    parser.add_argument("--runs", type=Path, default=Path("runs/convergence"))
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    args = parser.parse_args()
    baseline = "adamw" if args.optims else "none"
    methods = list(dict.fromkeys([baseline, *(args.optims or args.codecs)]))
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for seed in args.seeds:
        for method in methods:
            runs[method].append(train(method, seed, args))
            print(f"# seed {seed} {method}: {runs[method][-1]['val_loss']:.4f}", flush=True)
    exact = [run["val_loss"] for run in runs[baseline]]
    rows = [summarise(method, runs[method], exact) for method in methods]
    harness.print_table([name for name in rows[0] if name != "losses"], rows)
    if args.output:
        config = {
            name: value for name, value in vars(args).items() if name not in ("output", "runs")
        }
        harness.save(args.output, config=config, results=rows)


if __name__ == "__main__":
    main()
