"""The main job under faults: ranks killed at any point of a step, and checkpoints gone bad.

Bit-identical: the losses of a run that was killed and resumed, and of the run that was not.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from commrt.errors import ConfigError, PeerMismatchError, StateError
from commrt.metrics import read_rows
from commrt.testing import run_ranks
from commrt.training.config import TrainConfig
from commrt.training.job import run_job
from commrt.training.trainer import Trainer
from tests.dist.small_training import assert_same_owed

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60


def train(options):
    return run_job(TrainConfig.make(**options))


def losses(out):
    return [
        (row["kind"], row["step"], row.get("loss", row.get("val_loss")))
        for row in read_rows(out / "metrics.jsonl")
        if "step" in row
    ]


def checkpoints(out):
    return sorted(path.name for path in out.glob("step_*"))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A run of a second or so, with residuals."""
    text = tmp_path_factory.mktemp("text") / "source.py"
    text.write_bytes(Path(torch.nn.functional.__file__).read_bytes()[:40_000])
    return {
        "data": text,
        "codec": "loco4",
        "steps": 10,
        "batch_size": 2,
        "seq_len": 16,
        "warmup": 4,
        "eval_every": 4,
        "eval_windows": 10,
        "checkpoint_every": 2,
        "log_every": 1,
    }


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    """The folder of a run of two ranks that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_ranks(train, options | {"out": out}, world_size=2, timeout_s=TIMEOUT_S)
    assert checkpoints(out) == ["step_0000008", "step_0000010"]
    return out


@pytest.fixture
def out(undisturbed, tmp_path):
    """A copy of it."""
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


# -- killed under torchrun ------------------------------------------------------------------------


def torchrun(plan, options, out):
    """Runs killed_job.py on two ranks; returns what was printed."""
    given = {name.replace("_", "-"): value for name, value in (options | {"out": out}).items()}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(f"--max-restarts={len(plan)}", str(Path(__file__).with_name("killed_job.py"))),
        *(json.dumps(plan), "--", "train"),
        *(f"--{name}={value}" for name, value in given.items()),
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=200)
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)
    assert process.returncode == 0, printed
    return printed


# Where a rank dies, by start; and the step, by restart, from which rank 0 says to go on, unless it
# dies before.
KILLS = {
    "in a step": (
        [[1, 1, "forward"], [1, 6, "optimizer"], [1, 10, "end"]],
        {1: 0, 2: 6, 3: 10},
    ),
    "in a checkpoint": (
        [[1, 4, "write"], [0, 6, "rename"], [0, 6, "prune"], [0, 0, "start"]],
        {1: 2, 2: 4, 4: 6},
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("plan", "steps"), KILLS.values(), ids=KILLS)
def test_a_killed_job_resumes_by_itself(options, undisturbed, tmp_path, plan, steps):
    """SIGKILL in every start but the last: exit code 0 and the losses of the undisturbed run."""
    out = tmp_path / "run"
    printed = torchrun(plan, options, out)
    said = re.findall(r"^Restart (\d): .*(from|begins).*?(?:step_0*(\d+))?$", printed, re.MULTILINE)
    assert {int(number): int(step or 0) for number, _, step in said} == steps
    assert losses(out) == losses(undisturbed)
    assert checkpoints(out) == checkpoints(undisturbed)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (out, undisturbed)]
    for name in ("val_loss", "train_loss", "bytes_per_step", "ratio"):
        assert summaries[0][name] == summaries[1][name]


# -- ranks that were started differently ----------------------------------------------------------


def train_differently(options, changed, message):
    own = options | changed[dist.get_rank()]
    with pytest.raises(PeerMismatchError, match=message):
        train(own)


@pytest.mark.parametrize(
    ("name", "values"),
    [("steps", [10, 10, 9]), ("batch_size", [2, 3, 2]), ("resume", [None, None, Path("here")])],
)
def test_ranks_with_different_options_all_raise(options, tmp_path, name, values):
    message = "ranks disagree on {}: rank 0: '{}', rank 1: '{}', rank 2: '{}'".format(name, *values)
    changed = [{name: value} for value in values]
    args = options | {"out": tmp_path / "run"}, changed, message
    run_ranks(train_differently, *args, world_size=3, timeout_s=TIMEOUT_S)


def test_ranks_with_different_texts_all_raise(options, tmp_path):
    short = tmp_path / "short.py"
    short.write_bytes(options["data"].read_bytes()[:20_000])
    message = "ranks disagree on train_bytes: rank 0: 38000, rank 1: 19000"
    args = options | {"out": tmp_path / "run"}, [{}, {"data": short}], message
    run_ranks(train_differently, *args, world_size=2, timeout_s=TIMEOUT_S)


# -- which checkpoint a run goes on from ----------------------------------------------------------


def train_as_restarted(options, counts):
    with mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT=str(counts[dist.get_rank()])):
        return train(options)


def test_a_restart_that_one_node_counts_is_one_for_all(options, undisturbed, out, capsys):
    shutil.rmtree(out / "step_0000010")
    args = options | {"out": out}, [0, 1]
    run_ranks(train_as_restarted, *args, world_size=2, timeout_s=TIMEOUT_S)
    assert f"Restart 1: Goes on from {out}/step_0000008\n" in capsys.readouterr().out
    assert losses(out) == losses(undisturbed)


def test_a_restart_before_the_first_checkpoint_begins_anew(options, undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    args = options | {"out": out}, [2, 2]
    run_ranks(train_as_restarted, *args, world_size=2, timeout_s=TIMEOUT_S)
    assert f"Restart 2: No checkpoint in {out} yet: begins anew" in capsys.readouterr().out
    assert losses(out) == losses(undisturbed)


def test_resume_begins_anew_where_nothing_is_yet(options, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(options | {"out": out, "resume": True, "steps": 2}) == 0
    assert f"No checkpoint in {out} yet: begins anew" in capsys.readouterr().out


def test_a_finished_run_is_finished_again(options, undisturbed, out):
    """As after a kill between the last checkpoint and the summary."""
    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").unlink()
    again = options | {"out": out, "resume": True}
    run_ranks(train, again, world_size=2, timeout_s=TIMEOUT_S)
    assert losses(out) == losses(undisturbed)
    again = json.loads((out / "summary.json").read_text())
    assert again | {"resume": None, "out": summary["out"]} == summary


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({}, ConfigError, "holds checkpoints of an earlier run"),
        ({"resume": Path("nowhere")}, StateError, "nowhere holds no checkpoint to resume from"),
        ({"resume": True, "steps": 9}, StateError, "is at step 10: steps must be larger"),
        ({"resume": True, "lr": 0.5}, StateError, "another run: lr was 0.002 and is 0.5"),
    ],
)
def test_what_cannot_be_begun_is_refused_on_every_rank(options, out, changed, error, message):
    before = checkpoints(out)
    run_ranks(fail, options | {"out": out} | changed, error, message, world_size=2)
    assert checkpoints(out) == before
    assert (out / "summary.json").exists()


def fail(options, error, message):
    with pytest.raises(error, match=message):
        train(options)


# -- checkpoints gone bad -------------------------------------------------------------------------


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", ["model.pt", "comm_1.pt"])
def test_a_checkpoint_cut_short_is_refused_and_the_one_before_used(
    options, undisturbed, out, name, capsys
):
    """Also where one rank alone sees it; and the bad one is not in the way of the good one."""
    cut_short(out / "step_0000010" / name)
    run_ranks(train, options | {"out": out, "resume": True}, world_size=2, timeout_s=TIMEOUT_S)
    printed = capsys.readouterr().out
    assert f"{out}/step_0000010 is refused: {name} is cut short or corrupt" in printed
    assert printed.count("is refused") == 1
    assert f"Goes on from {out}/step_0000008\n" in printed
    assert losses(out) == losses(undisturbed)
    assert checkpoints(out) == checkpoints(undisturbed)


def test_without_a_whole_checkpoint_every_rank_says_why(options, out):
    cut_short(out / "step_0000010" / "comm_1.pt")
    (out / "step_0000008" / "comm_0.pt").unlink()
    message = (
        r"step_0000010 is refused: comm_1\.pt is cut short or corrupt: comm_1\.pt\.sha256 does not "
        r"match it\. .*step_0000008 is refused: comm_0\.pt is missing$"
    )
    changed = options | {"out": out, "resume": True}
    run_ranks(fail, changed, StateError, message, world_size=2)
    assert checkpoints(out) == ["step_0000008", "step_0000010"]


# -- another number of ranks ----------------------------------------------------------------------


def train_from(options, stop_at):
    """Trains; returns the own state as it was loaded. A signal in a step, if any, stops it soon."""
    loaded = []
    load, take_step = Trainer.load, Trainer.train_step

    def note_loaded(trainer, found):
        load(trainer, found)
        loaded.append(trainer.comm.state_dict())

    def signalled(trainer):
        if trainer.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(trainer)

    with (
        mock.patch.object(Trainer, "load", note_loaded),
        mock.patch.object(Trainer, "train_step", signalled),
    ):
        train(options)
    return loaded[0] if loaded else None


def train_on(world_size, options, stop_at=0):
    args = options | {"batch_size": 6 // world_size}, stop_at
    return run_ranks(train_from, *args, world_size=world_size, timeout_s=TIMEOUT_S)


def test_a_run_goes_on_with_other_numbers_of_ranks(options, tmp_path, capsys):
    """2, then 1, then 3 ranks on the same samples: what is owed is kept, and the losses are near
    those of a run on 2.
    """
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = options | {"eval_every": 5}
    train_on(2, options | {"out": whole})
    train_on(2, options | {"out": out}, stop_at=3)
    for world_size, step, before in ((1, 4, 2), (3, 6, 1)):
        folder = out / f"step_{step:07d}"
        former = [torch.load(folder / f"comm_{rank}.pt") for rank in range(before)]
        capsys.readouterr()
        stop_at = step + 2 if world_size == 1 else 0
        states = train_on(world_size, options | {"out": out, "resume": True}, stop_at)
        assert_same_owed(former, states)
        printed = capsys.readouterr().out
        said = f"written by {before} ranks and goes on with {world_size}: residuals are redistrib"
        assert said in printed
        assert "A step takes" not in printed
    for one, two in zip(losses(out), losses(whole), strict=True):
        assert one[:2] == two[:2]
        assert one[2] == pytest.approx(two[2], rel=0.01)


def test_another_number_of_sequences_is_said(options, out, capsys):
    again = options | {"out": out, "resume": out / "step_0000008"}
    run_ranks(train, again, world_size=3, timeout_s=TIMEOUT_S)
    expected = "A step takes 6 sequences, no longer 4; all else stays\n"
    assert expected in capsys.readouterr().out


def test_the_batch_size_stays_with_the_number_of_ranks(options, out):
    changed = options | {"out": out, "resume": True, "batch_size": 3}
    message = "belongs to another run: batch_size was 2 and is 3"
    run_ranks(fail, changed, StateError, message, world_size=2)


# -- stopped while it starts ----------------------------------------------------------------------


def test_a_signal_before_the_first_step_ends_the_job_at_once(options, tmp_path):
    def stop(trainer, *args):
        os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(Trainer, "__init__", stop), pytest.raises(KeyboardInterrupt):
        train(options | {"out": tmp_path / "run"})
