"""Wall time on a slow link until the main job reaches a loss, method against method.

Each method trains the main job from the same start with the same schedule on emulated nodes
(``launch/netcluster``). The goal is the validation loss that fp32 has after ``--goal-step`` steps,
the mean of three validations; a method's time is the sum of its step times until its own curve,
straight between validations, is there. Validations are not counted. Finished runs in ``--runs`` are
kept.

Losses do not depend on the link. So a second rate needs no second training: with ``--losses-of`` a
method that was trained at that rate only takes ``--timed-steps`` at this one, and its curve is
stretched by the median step; the losses of both are compared as far as they go.

    python -m bench.time_to_loss --rate 100mbit -o bench/results/time_to_loss_100mbit.json
    python -m bench.time_to_loss --rate 1gbit --losses-of 100mbit -o ...
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench import harness
from bench.cluster import ROOT
from bench.methods import install
from commrt.training.config import TrainConfig
from commrt.training.data import Corpus, load_corpus
from commrt.training.model import GPT
from commrt.training.optimizer import make_optimizer
from commrt.training.trainer import Trainer

METHODS = (
    *("fp32", "fp16", "powersgd:4", "powersgd:8", "powersgd:16", "loco4", "loco2/block2"),
    *("lowrank8+small=block8", "lowrank16+small=block8"),
)
COLUMNS = ("method", "goal_s", "speed_up", "steps_to_goal", "step_ms", "best_loss", "trained_at")


class MethodTrainer(Trainer):
    """The job's trainer with any method of bench.methods instead of commrt's codecs."""

    def __init__(self, method: str, config: TrainConfig, corpus: Corpus) -> None:
        self.config, self.corpus, self.step = config, corpus, 0
        self.device = torch.device("cpu")
        torch.manual_seed(config.seed)
        self.model = GPT(config.model)
        self.wrapped = install(method, self.model, seed=config.seed, prepare=self._settle).model
        self.optimizer = make_optimizer(self.model, config)

    def _settle(self, ddp: torch.nn.parallel.DistributedDataParallel) -> None:
        self.wrapped = ddp
        self._settle_buckets()


def run_rank(args: argparse.Namespace) -> None:
    """Train on one rank until the goal or the last step; rank 0 writes the curve."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = TrainConfig.make(
        preset=args.preset,
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        warmup=args.steps // 10,
        eval_windows=args.eval_windows,
        seed=args.seed,
    )
    trainer = MethodTrainer(args.methods[0], config, load_corpus(None))
    seconds, durations = 0.0, []
    curve = [(0, 0.0, trainer.validate())]
    while trainer.step < args.last_step and smooth(curve)[-1][2] > args.goal:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(args.eval_every):
            before = time.perf_counter()
            trainer.train_step()
            durations.append(time.perf_counter() - before)
        seconds += time.perf_counter() - began
        curve.append((trainer.step, seconds, trainer.validate()))
        if dist.get_rank() == 0:
            print(f"# {args.methods[0]} {curve[-1]}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        median_ms = 1e3 * torch.tensor(durations).median().item()
        args.curve.write_text(json.dumps({"curve": curve, "step_ms": median_ms}))
    dist.barrier()
    dist.destroy_process_group()


def train(method: str, goal: float, last_step: int, args: argparse.Namespace) -> dict[str, Any]:
    """One method's curve: of this run, of an earlier one, or of one at another rate."""
    known = run_file(args.losses_of, method, args)
    if run_file(args.rate, method, args).exists() or not known.exists():
        found = run_cluster(run_file(args.rate, method, args), method, goal, last_step, args)
        return {"method": method, "trained_at": args.rate, **found}
    name = run_file(f"{args.rate}-timed", method, args)
    timed = run_cluster(name, method, 0.0, args.timed_steps, args)
    losses = {step: loss for step, _, loss in timed["curve"]}
    curve = [(step, loss) for step, _, loss in json.loads(known.read_text())["curve"]]
    if any(losses.get(step, loss) != loss for step, loss in curve):
        raise SystemExit(f"{method} has other losses at {args.rate} than at {args.losses_of}")
    stretched = [(step, 1e-3 * timed["step_ms"] * step, loss) for step, loss in curve]
    return {"method": method, "trained_at": args.losses_of, **timed, "curve": stretched}


def run_file(rate: str | None, method: str, args: argparse.Namespace) -> Path:
    """Where a method's curve at a rate is kept."""
    name = f"{rate}-{method}-seed{args.seed}".replace("/", "_").replace(":", "_")
    folder: Path = args.runs
    return folder / f"{name}.json"


def run_cluster(
    curve: Path, method: str, goal: float, last_step: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Trains on the emulated nodes, unless the file is there; returns what is in it."""
    if not curve.exists():
        args.runs.mkdir(parents=True, exist_ok=True)
        options = ("preset", "steps", "batch_size", "seq_len", "eval_every", "eval_windows", "seed")
        command = [
            *(str(ROOT / "launch/netcluster"), "--nodes", str(args.nodes), "--rate", args.rate),
            *("--", "-m", "bench.time_to_loss", "--curve", str(curve.resolve())),
            *("--methods", method, "--goal", str(goal), "--last-step", str(last_step)),
        ]
        for option in options:
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = json.loads(curve.read_text())
    return found


def smooth(curve: Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    """Each loss averaged with the two before it."""
    return [
        (step, seconds, statistics.fmean(row[2] for row in curve[max(0, index - 2) : index + 1]))
        for index, (step, seconds, _) in enumerate(curve)
    ]


def reach(curve: Sequence[Sequence[float]], goal: float) -> tuple[float, float]:
    """Steps and seconds at which a smoothed curve first is at the goal; not a number if never."""
    for (step, seconds, loss), (next_step, next_seconds, next_loss) in pairwise(smooth(curve)):
        if next_loss <= goal:
            share = (loss - goal) / (loss - next_loss)
            return step + share * (next_step - step), seconds + share * (next_seconds - seconds)
    return float("nan"), float("nan")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--losses-of", metavar="RATE", help="whose runs have the losses already")
    parser.add_argument("--timed-steps", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--preset", default="7m")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=800, help="of the learning rate schedule")
    parser.add_argument("--goal-step", type=int, default=600, help="the goal is fp32's loss there")
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--eval-windows", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/time_to_loss"))
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    parser.add_argument("--curve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--goal", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--last-step", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.curve:
        run_rank(args)
        return
    dense = train("fp32", 0.0, args.goal_step, args)
    goal = smooth(dense["curve"])[-1][2]
    rows = [dense]
    rows += [train(name, goal, args.steps, args) for name in args.methods if name != "fp32"]
    for row in rows:
        row["steps_to_goal"], row["goal_s"] = reach(row["curve"], goal)
        row["speed_up"] = dense["goal_s"] / row["goal_s"]
        row["best_loss"] = min(loss for _, _, loss in row["curve"])
    print(f"# goal: {goal:.4f} nats a byte, fp32's after {args.goal_step} steps")
    harness.print_table(COLUMNS, rows)
    if args.output:
        hidden = ("output", "curve", "goal", "last_step", "runs")
        config = {name: value for name, value in vars(args).items() if name not in hidden}
        harness.save(args.output, config={**config, "goal": goal}, results=rows)


if __name__ == "__main__":
    main()
