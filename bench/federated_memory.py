"""Memory of a simulated run, by rank: 1,000 clients, a million weights, an uplink that remembers.

Every run is one of its own, two ranks, one thread each, with a checkpoint at its end; the data are
small and made up. Peaks are the processes' own, with Python, torch and MPI, as Linux counts them.

    peak_mb       of each rank; total_mb of all
    begin_mb      of each rank, imported and before the run is made
    files_mb      the checkpoint
    state_mb      what clients' states may take in a rank's memory; null for no limit

    python -m bench.federated_memory -o bench/results/federated_memory.json
    python -m bench.federated_memory --cohorts 100 --state-mb 100
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bench import harness
from commrt.simulation.job import run_job
from commrt.simulation.transport import all_ranks

CLIENTS = 1000
CLASSES, FEATURES = 10, 64
ROUNDS = {100: 20, 1000: 2}
CONFIG = """
[data]
name = "{folder}/data.npz"
model = "bench.federated_memory:mlp"
[clients]
count = {clients}
[local]
batch_size = 2
[schedule]
cohort = {cohort}
[run]
aggregations = {rounds}
evaluate_every = {rounds}
checkpoint_every = {rounds}
"""
COLUMNS = ("uplink", "cohort", "state_mb", "rounds", "begin_mb", "peak_mb", "total_mb", "files_mb")
COLUMNS += ("wall_s",)


def mlp() -> nn.Module:
    """1,010,970 weights."""
    return nn.Sequential(
        *(nn.Linear(FEATURES, 976), nn.ReLU()),
        *(nn.Linear(976, 960), nn.ReLU(), nn.Linear(960, CLASSES)),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--uplink", default="mbtc:nmse=0.5")
    parser.add_argument("--cohorts", type=int, nargs="+", default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help="default: 20 of 100 clients, 2 of 1,000")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--state-mb", type=float, help="default: no limit")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        run(*options.run)
        return
    rows = []
    for cohort in options.cohorts:
        rounds = options.rounds or ROUNDS.get(cohort, 2)
        rows.append(measured(options.uplink, cohort, rounds, options.ranks, options.state_mb))
        harness.print_table(COLUMNS, rows)
        if options.out:
            config = {"clients": CLIENTS, "ranks": options.ranks}
            harness.save(options.out, config=config, results=rows)


def measured(
    uplink: str, cohort: int, rounds: int, ranks: int, state_mb: float | None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        text = CONFIG.format(folder=folder, clients=CLIENTS, cohort=cohort, rounds=rounds)
        (folder / "config.toml").write_text(text)
        sets = [f"uplink={uplink}"]
        if state_mb is not None:
            sets += [f"clients.state_mb={state_mb}", f'clients.state_folder="{folder}"']
        mpiexec = str(Path(sys.executable).with_name("mpiexec"))
        start = [mpiexec, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        own = [sys.executable, "-m", "bench.federated_memory", "--run", name, *sets]
        begin = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*start, "-n", str(ranks), *own], check=True, env=environment)
        wall_s = time.perf_counter() - begin
        peaks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
        kept = [path for part in ("checkpoint.*", "*.states") for path in folder.glob(part)]
        return {
            "uplink": uplink, "cohort": cohort, "state_mb": state_mb, "rounds": rounds,
            "begin_mb": [begin for begin, _ in peaks], "peak_mb": [peak for _, peak in peaks],
            "total_mb": sum(peak for _, peak in peaks),
            "files_mb": round(sum(path.stat().st_size for path in kept) / 1e6),
            "wall_s": round(wall_s, 1),
        }  # fmt: skip


def write_data(folder: Path) -> None:
    """Noise around a centre for each class."""
    draw = np.random.default_rng(0)
    targets = draw.integers(CLASSES, size=4 * CLIENTS)
    centres = draw.normal(size=(CLASSES, FEATURES))
    inputs = centres[targets] + 2 * draw.normal(size=(len(targets), FEATURES))
    np.savez(folder / "data.npz", inputs=inputs.astype(np.float32), targets=targets)


def run(name: str, *sets: str) -> None:
    """As one of the ranks: run, and write down this process's peaks before and after."""
    folder, begin = Path(name), peak_mb()
    run_job(folder / "config.toml", sets, out=folder)
    (folder / f"{all_ranks().rank}.json").write_text(json.dumps([begin, peak_mb()]))


def peak_mb() -> int:
    """Of the resident memory so far."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e6)


if __name__ == "__main__":
    main()
