"""Validation loss of the main job, codec against codec, over seeds; "none" is the baseline.

Every run is the real job: ``torchrun`` ranks on gloo, real text, real payloads. Runs that have
already finished in the output folder are kept, so a broken-off benchmark goes on where it stopped.

    python -m bench.convergence --steps 1000 --seeds 0 1 2 -o bench/results/convergence.json
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

CODECS = (
    *("none", "loco4", "loco2", "loco2:beta=0.8", "block2"),
    *("loco4:block=1024", "block4:block=1024"),
)


def train(method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run's summary."""
    codec, _, gather = method.partition("/")
    name = method.replace(":", "_").replace("=", "").replace("/", "_")
    out = args.runs / f"{args.parallel}-{name}-seed{seed}"
    summary = out / "summary.json"
    if not summary.exists():
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(args.ranks), "-m", "commrt", "train", "--no-progress"),
            *("--preset", args.preset, "--steps", str(args.steps), "--seed", str(seed)),
            *("--codec", codec, "--eval-windows", "512", "--out", str(out)),
            *("--parallel", args.parallel, "--hierarchy", str(args.hierarchy)),
            *(("--gather", gather) if gather else ()),
            *(("--keep-gathered",) if gather.startswith("delta") else ()),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def summarise(codec: str, runs: Sequence[dict[str, Any]], exact: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds, and the gap to full precision seed by seed."""
    losses = [run["val_loss"] for run in runs]
    gaps = [100 * (loss / base - 1) for loss, base in zip(losses, exact, strict=True)]
    return {
        "codec": codec,
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
    parser.add_argument("--codecs", nargs="+", default=CODECS, help="CODEC or CODEC/GATHER")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parallel", default="ddp", help="ddp, fsdp1, fsdp2 or hsdp")
    parser.add_argument("--hierarchy", type=int, default=0, help="ranks of HSDP's shard groups")
    parser.add_argument("--runs", type=Path, default=Path("runs/convergence"))
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    args = parser.parse_args()
    codecs = list(dict.fromkeys(["none", *args.codecs]))
    runs: dict[str, list[dict[str, Any]]] = {codec: [] for codec in codecs}
    for seed in args.seeds:
        for codec in codecs:
            runs[codec].append(train(codec, seed, args))
            print(f"# seed {seed} {codec}: {runs[codec][-1]['val_loss']:.4f}", flush=True)
    exact = [run["val_loss"] for run in runs["none"]]
    rows = [summarise(codec, runs[codec], exact) for codec in codecs]
    harness.print_table([name for name in rows[0] if name != "losses"], rows)
    if args.output:
        config = {
            name: value for name, value in vars(args).items() if name not in ("output", "runs")
        }
        harness.save(args.output, config=config, results=rows)


if __name__ == "__main__":
    main()
