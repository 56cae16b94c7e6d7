"""The main job for a long time, with ranks killed and world sizes changed at random.

Compared with runs that nothing happened to: the loss, the memory, and whether the gradients that
were given are those that were received and are still owed (bench.soak_rank keeps the ledger).

    python -m bench.soak --steps 2000 --kills 20 --seed 0 -o bench/results/soak.json

Three kinds of event: a rank is killed, and torchrun starts all again; the job is stopped by
SIGTERM, or all of it is killed, and it is started again with another number of ranks.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from bench import harness
from bench.soak_rank import LEDGER_FILE
from commrt.metrics import read_rows

GLOBAL_BATCH = 12  # divisible by all world sizes
WORLD_SIZES = (1, 2, 3, 4)
HANG_S = 60.0
# Of ranks that lived that long, RSS may grow by this share in the later half.
LONG_LIFE_S = 30.0
FLAT = 0.02


class HangError(Exception):
    """No step for too long."""


class Event(NamedTuple):
    """Something bad: a random moment after ``step``, or after the event before it."""

    kind: str  # "rank", "stop" or "crash"
    step: int
    is_at_once: bool


class Job:
    """A run under torchrun, started as often as it takes.

    Attributes:
        out: Its folder.
        world_size: Ranks it has now.
        num_starts: How often torchrun was started.
        memory: By process id of a rank: seconds and MiB.
    """

    def __init__(self, out: Path, seed: int, args: argparse.Namespace) -> None:
        self.out = out
        self.world_size = 0
        self.num_starts = 0
        self.memory: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self._options = [
            *("--preset", args.preset, "--codec", args.codec, "--gather", "none"),
            *("--steps", str(args.steps), "--seq-len", str(args.seq_len), "--seed", str(seed)),
            *("--eval-every", str(max(1, args.steps // 20)), "--eval-windows", "256"),
            *("--checkpoint-every", str(args.checkpoint_every), "--timeout-s", "30"),
            *("--no-progress", "--log-every", "50", "--out", str(out)),
        ]
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self._log: TextIO = (out / "log.txt").open("a")

    def start(self, world_size: int) -> None:
        """Starts torchrun, which begins or goes on."""
        self.world_size = world_size
        self.num_starts += 1
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(world_size), "--max-restarts", "1000"),
            *("-m", "bench.soak_rank", "train", "--batch-size", str(GLOBAL_BATCH // world_size)),
            *("--resume", *self._options),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.agent = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def ranks(self) -> list[int]:
        """Process ids of the ranks that live."""
        task = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children")
        try:
            return [int(pid) for pid in task.read_text().split() if _is_rank(int(pid))]
        except (FileNotFoundError, ProcessLookupError):
            return []

    def step(self) -> int:
        """The newest step in the metrics, 0 before the first."""
        path = self.out / "metrics.jsonl"
        rows = read_rows(path) if path.exists() else []
        return max((row.get("step", 0) for row in rows), default=0)

    def is_finished(self) -> bool:
        """Whether torchrun has ended well; raises RuntimeError if it has ended badly."""
        code = self.agent.poll()
        if code:
            raise RuntimeError(f"torchrun ended with code {code}: see {self.out}/log.txt")
        return code == 0

    def kill_rank(self, rng: random.Random) -> bool:
        """Kills one rank; False if none lives just now."""
        ranks = self.ranks()
        return bool(ranks) and _kill(rng.choice(ranks))

    def stop(self) -> None:
        """Asks it to stop, with a checkpoint."""
        self.agent.terminate()
        self.agent.wait(HANG_S)

    def crash(self) -> None:
        """Kills all of it at once, as when a machine fails."""
        ranks = self.ranks()
        self.agent.kill()
        self.agent.wait()
        for pid in ranks:
            _kill(pid)

    def note_memory(self, seconds: float) -> None:
        """Samples the memory of all ranks."""
        for pid in self.ranks():
            mib = _resident_mib(pid)
            if mib:
                self.memory[pid].append((seconds, mib))


def follow(job: Job, plan: list[Event], rng: random.Random) -> dict[str, Any]:
    """Lets a job run to its end, and the events of a plan happen to it.

    Raises:
        HangError: No step for HANG_S.
        RuntimeError: The job failed.
    """
    began = moved = time.monotonic()
    size, longest, happened = 0, 0.0, []
    plan = list(plan)
    while not job.is_finished():
        time.sleep(0.2)
        now = time.monotonic()
        job.note_memory(now - began)
        path = job.out / "metrics.jsonl"
        if path.exists() and path.stat().st_size != size:
            size, moved = path.stat().st_size, now
        longest = max(longest, now - moved)
        if longest > HANG_S:
            job.crash()
            raise HangError(f"no step for {longest:.0f} s at step {job.step()}")
        step = job.step() if plan else 0
        if plan and (plan[0].is_at_once or step >= plan[0].step):
            time.sleep(rng.uniform(0, 8 if plan[0].is_at_once else 1))
            if not job.is_finished() and act(job, plan[0], rng):
                row = {"kind": plan.pop(0).kind, "step": step, "world_size": job.world_size}
                happened.append(row)
                print(f"# {time.monotonic() - began:.0f} s: {row}", flush=True)
    return {
        "seconds": time.monotonic() - began,
        "longest_pause_s": longest,
        "events": happened,
        "missed_events": len(plan),
    }


def act(job: Job, event: Event, rng: random.Random) -> bool:
    """Lets an event happen; False if it could not."""
    if event.kind == "rank":
        return job.kill_rank(rng)
    if event.kind == "stop":
        job.stop()
    else:
        job.crash()
    job.start(rng.choice([size for size in WORLD_SIZES if size != job.world_size]))
    return True


def make_plan(rng: random.Random, steps: int, kills: int) -> list[Event]:
    """Kills, and half as many changes of the world size, over the steps."""
    kinds = ["rank"] * kills + [rng.choice(("stop", "crash")) for _ in range(kills // 2)]
    rng.shuffle(kinds)
    targets = sorted(rng.randrange(steps // 50, steps * 97 // 100) for _ in kinds)
    return [
        Event(kind, target, is_at_once=index > 0 and rng.random() < 0.15)
        for index, (kind, target) in enumerate(zip(kinds, targets, strict=True))
    ]


def describe(name: str, job: Job, followed: dict[str, Any]) -> dict[str, Any]:
    """A row of the results."""
    summary = json.loads((job.out / "summary.json").read_text())
    rows = read_rows(job.out / "metrics.jsonl")
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    ledger = read_rows(job.out / LEDGER_FILE)
    long = [life for life in job.memory.values() if life[-1][0] - life[0][0] > LONG_LIFE_S]
    lives = [growth(samples) for samples in long]
    slopes = [slope for slope, _ in lives]
    return {
        "run": name,
        "val_loss": summary["val_loss"],
        "steps": len(steps),
        "complete": steps == list(range(1, summary["steps"] + 1)),
        **followed,
        "kills": sum(event["kind"] != "stop" for event in followed["events"]),
        "starts": job.num_starts,
        "rss_mib": max(samples[-1][1] for samples in job.memory.values()),
        "long_lives": len(lives),
        "rss_mib_per_min": statistics.median(slopes) if slopes else 0.0,
        "rss_growth": max((share for _, share in lives), default=0.0),
        "curve": {row["step"]: row["val_loss"] for row in rows if row["kind"] == "val"},
        "balance": [row for row in ledger if row["kind"] == "save"][-1]["parameters"],
        "loads": [row for row in ledger if row["kind"] == "load"],
    }


def growth(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """Of the later half of a rank's life: slope in MiB a minute, and growth as a share.

    From the medians of its quarters, since a checkpoint takes memory for a moment.
    """
    half = samples[len(samples) // 2 :]
    first, last = half[: len(half) // 2], half[len(half) // 2 :]
    (begin, before), (end, after) = (
        tuple(statistics.median(values) for values in zip(*quarter, strict=True))
        for quarter in (first, last)
    )
    return 60 * (after - before) / (end - begin), after / before - 1


def check(soaked: dict[str, Any], calm: list[dict[str, Any]]) -> dict[str, Any]:
    """What the soak is to show, each with its numbers."""
    losses = [row["val_loss"] for row in calm]
    gap, noise = soaked["val_loss"] - losses[0], 3 * statistics.stdev(losses)
    steps = [step for step in soaked["curve"] if step in calm[0]["curve"]][-10:]
    gaps = [soaked["curve"][step] - calm[0]["curve"][step] for step in steps]
    jumps = [entry for row in soaked["loads"] for entry in row["parameters"]]
    balance = soaked["balance"]
    return {
        "loss": {
            "passed": abs(gap) <= noise,
            "gap": gap,
            "noise_over_seeds": noise,
            "curve_gap": statistics.fmean(map(abs, gaps)),
        },
        "conserved": {
            "passed": all(entry["jump"] <= entry["bound"] for entry in jumps)
            and all(entry["error"] <= entry["bound"] for entry in balance),
            "error_by_bound": max(entry["error"] / entry["bound"] for entry in balance),
            "error_by_given": max(entry["error"] / entry["given"] for entry in balance),
            "error_by_forgone": max(entry["error"] / (entry["forgone"] or 1) for entry in balance),
            "jump_by_bound": max(
                (entry["jump"] / (entry["bound"] or 1) for entry in jumps), default=0.0
            ),
            "jump_by_owed": max((entry["jump"] / entry["owed"] for entry in jumps), default=0.0),
        },
        "no_hang": {"passed": soaked["complete"], "longest_pause_s": soaked["longest_pause_s"]},
        "memory_flat": {
            "passed": all(row["long_lives"] and row["rss_growth"] <= FLAT for row in calm),
            "growth": max(row["rss_growth"] for row in calm),
        },
        "all_happened": {
            "passed": soaked["missed_events"] == 0,
            "world_sizes": sorted({row["world_size"] for row in soaked["loads"]}),
        },
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20, help="ranks killed, one at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="undisturbed runs, 2 or more")
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--codec", default="loco4")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--checkpoint-every", type=int, default=25)
    parser.add_argument("--runs", type=Path, default=Path("runs/soak"))
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    soak = Job(args.runs / "soak", args.seed, args)
    soak.start(2)
    plan = make_plan(rng, args.steps, args.kills)
    rows = [describe("soak", soak, follow(soak, plan, rng))]
    for seed in range(args.seed, args.seed + args.seeds):
        job = Job(args.runs / f"seed{seed}", seed, args)
        job.start(2)
        rows.append(describe(f"seed {seed}", job, follow(job, [], rng)))
    columns = ("run", "val_loss", "steps", "kills", "starts", "seconds", "rss_mib", "rss_growth")
    harness.print_table(columns, rows)
    checks = check(rows[0], rows[1:])
    for name, found in checks.items():
        print(name, found)
    if args.output:
        config = {
            name: value for name, value in vars(args).items() if name not in ("output", "runs")
        }
        harness.save(args.output, config=config, results=[*rows, {"run": "checks", **checks}])
    return 0 if all(found["passed"] for found in checks.values()) else 1


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _is_rank(pid: int) -> bool:
    return b"bench.soak_rank" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _resident_mib(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
