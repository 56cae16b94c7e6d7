"""``python -m commrt federated`` under mpiexec, as it is started."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from commrt.simulation.job import run_job

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(180)]

CONFIG = """
uplink = "mbtc:nmse=0.3"
[clients]
count = 9
partition = "dirichlet:alpha=1"
[schedule]
cohort = 5
over_selection = 1.4
deadline_s = 0.5
[traces]
compute_sigma = 0.5
up_bytes_per_s = 1e5
dropout = 0.1
[run]
aggregations = 8
checkpoint_every = 1
"""


FAULTY = Path(__file__).with_name("faulty.py")
PROGRAM = ("-m", "commrt")


def command(
    ranks: int, *arguments: str | Path, program: Sequence[str | Path] = PROGRAM
) -> list[str]:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    start = [mpiexec, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", ranks]
    start += [
        "--mca",
        "mpi_yield_when_idle",
        "1",
    ]  # or ranks that wait keep other tests from running
    return [str(each) for each in (*start, sys.executable, *program, "federated", *arguments)]


def start(
    ranks: int,
    *arguments: str | Path,
    program: Sequence[str | Path] = PROGRAM,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    whole = command(ranks, *arguments, program=program)
    found = subprocess.run(whole, stdout=-1, stderr=subprocess.STDOUT, text=True, check=False)
    assert not check or found.returncode == 0, found.stdout
    return found


def alone(config: Path, out: Path, *assignments: str, resume: bool = False) -> None:
    """On one rank, which is this process: starting others is most of what these tests take."""
    assert run_job(config, assignments, out=out, resume=resume) == 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def results(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    rows = [line for line in lines if line["kind"] == "round"]
    for row in rows:
        del row["wall_s"]
    return torch.load(out / "model.pt", weights_only=True), rows


def assert_same(one: Path, other: Path) -> None:
    (weights, rows), (other_weights, other_rows) = results(one), results(other)
    assert rows == other_rows
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_secure_sums_with_noise_on_any_number_of_ranks(config: Path, tmp_path: Path) -> None:
    changes = ("uplink=secure:bits=16,norm=30", "clients.importance=equal", "schedule.least=3")
    changes += ("privacy.clip=0.5", "privacy.noise_multiplier=0.5", "privacy.delta=0.001")
    changes += ("traces.up_bytes_per_s=1e6",)
    alone(config, tmp_path / "1", *changes)
    sets = [word for change in changes for word in ("--set", change)]
    start(2, config, "--out", tmp_path / "2", *sets)
    assert_same(tmp_path / "1", tmp_path / "2")
    rows = results(tmp_path / "1")[1]
    assert all(row["epsilon"] > 0 for row in rows)
    assert sum(row["answer_bytes"] for row in rows) > 0


@pytest.mark.parametrize(
    ("uplink", "numbers"), [("mbtc:nmse=0.3", (2, 4)), ("topk:share=0.05", (3,))]
)
def test_any_number_of_ranks(
    uplink: str, numbers: Sequence[int], config: Path, tmp_path: Path
) -> None:
    """Models, bytes and all figures are the same; a normal end says nothing and exits with 0."""
    alone(config, tmp_path / "1", f"uplink={uplink}")
    assert len(results(tmp_path / "1")[1]) == 8
    for ranks in numbers:
        said = start(ranks, config, "--out", tmp_path / str(ranks), "--set", f"uplink={uplink}")
        assert said.stdout == ""
        assert_same(tmp_path / "1", tmp_path / str(ranks))


def test_joint_decoding_on_any_number_of_ranks(config: Path, tmp_path: Path) -> None:
    """Of updates that have much in common; also from a checkpoint of another number of ranks."""
    changes = ("uplink=mbtc:nmse=0.005,block=256,least_gain=0", "clients.count=5")
    changes += ("clients.partition=iid", "local.batch_size=400", "local.steps=2", "local.lr=0.3")
    changes += ("schedule.cohort=4", "schedule.deadline_s=5", "run.aggregations=3")
    alone(config, tmp_path / "1", *changes)
    rows = results(tmp_path / "1")[1]
    assert sum(row["joint_groups"] for row in rows) > 0
    assert sum(row["answer_bytes"] for row in rows) > 0
    assert sum(row["asked_clients"] for row in rows) > 0
    sets = [word for change in changes for word in ("--set", change)]
    start(4, config, "--out", tmp_path / "4", *sets)
    assert_same(tmp_path / "1", tmp_path / "4")
    alone(config, tmp_path / "2", *changes, "run.aggregations=1")
    start(2, config, "--out", tmp_path / "2", *sets, "--resume")
    assert_same(tmp_path / "1", tmp_path / "2")


# Decoded on all ranks; at the first one, for a cohort; and there, each alone.
ON_GPUS = {
    "shared": (),
    "secure": ("uplink=secure:bits=16,norm=30", "clients.importance=equal", "schedule.least=3"),
    "fedbuff": ('schedule={policy="fedbuff", buffer=2, concurrency=4}', "uplink=fp16"),
}


@pytest.mark.parametrize(("name", "aware"), [("shared", 0), ("secure", 0), ("fedbuff", 1)])
def test_models_on_gpus(name: str, aware: int, config: Path, tmp_path: Path) -> None:
    """Pretended ones, whose memory MPI reads as it is the host's: the models of the CPU."""
    changes = [*ON_GPUS[name], "traces.up_bytes_per_s=1e6", "run.aggregations=3"]
    alone(config, tmp_path / "1", *changes)
    changes += ["run.device=cuda", f"run.cuda_aware={'true' if aware else 'auto'}"]
    sets = [word for change in changes for word in ("--set", change)]
    program = ("-m", "tests.mpi.pretending")
    said = start(2, config, "--out", tmp_path / "2", *sets, program=program)
    assert said.stdout.count("models go between GPUs through host memory") == (not aware)
    assert_same(tmp_path / "1", tmp_path / "2")


def test_a_killed_rank_ends_all_and_the_run_goes_on(config: Path, tmp_path: Path) -> None:
    """On another number of ranks, to the same model."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    length = ("--set", "run.aggregations=60")
    alone(config, whole, length[1])
    job = subprocess.Popen(command(2, config, "--out", killed, *length), stdout=-3, stderr=-3)
    wait_for(lambda: len((killed / "metrics.jsonl").read_text().splitlines()) >= 5)
    victims = [pid for pid in children(job.pid) if "federated" in arguments_of(pid)]
    os.kill(victims[-1], signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    assert not (killed / "model.pt").exists()
    start(3, config, "--out", killed, *length, "--resume")
    assert_same(whole, killed)


def test_a_failing_rank_ends_all_with_its_traceback(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "occupied"
    folder.mkdir()
    (folder / "checkpoint.pt").mkdir()  # which no file can replace
    found = start(2, config, "--out", folder, check=False)
    assert found.returncode != 0
    assert "Traceback" in found.stdout
    assert "checkpoint.pt" in found.stdout


@pytest.mark.parametrize(("rank", "fault"), [(0, "raise"), (1, "setting")])
def test_a_rank_that_cannot_go_on_ends_all(
    rank: int, fault: str, config: Path, tmp_path: Path
) -> None:
    """In the middle of a run, whatever the kind of its error; that would last for hours."""
    program = [FAULTY, fault, str(rank)]
    sets = ("--set", "run.aggregations=1000000")
    found = start(2, config, "--out", tmp_path, *sets, program=program, check=False)
    assert found.returncode != 0
    assert "Traceback" in found.stdout
    assert f"{'ConfigError' if fault == 'setting' else 'StateError'}: this rank" in found.stdout


@pytest.mark.parametrize(
    ("rank", "fault"), [(1, "open:clients-"), (0, "os.rename:checkpoint"), (0, "os.remove:clients")]
)
def test_a_rank_killed_while_saving(rank: int, fault: str, config: Path, tmp_path: Path) -> None:
    """The run goes on, on another number of ranks, to the same model."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    length = ("--set", "run.aggregations=3")
    alone(config, whole, length[1])
    program = [FAULTY, fault, str(rank)]
    found = start(2, config, "--out", killed, *length, program=program, check=False)
    assert found.returncode != 0
    assert not (killed / "model.pt").exists()
    alone(config, killed, length[1], resume=True)
    assert_same(whole, killed)


def test_what_one_rank_cannot_read_ends_all(config: Path, tmp_path: Path) -> None:
    """A state that only one rank reads is damaged: it is said once, and no rank waits for it."""
    start(2, config, "--out", tmp_path, "--set", "run.aggregations=3")
    (path,) = tmp_path.glob("clients-*-1.states")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    found = start(2, config, "--out", tmp_path, "--resume", check=False)
    assert found.returncode == 2
    assert found.stdout.count(f"{path} is damaged") == 1


def test_a_mistake_is_said_once(config: Path) -> None:
    found = start(2, config, "--set", "local.lr=-1", check=False)
    assert found.returncode == 2
    assert found.stdout.count("local: lr is -1.0: must be positive and finite") == 1
    assert "Traceback" not in found.stdout


def wait_for(holds: Any) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    raise AssertionError("waited for a minute")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    below = [each for child in found for each in children(int(child))]
    return [*map(int, found), *below]


def arguments_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
