"""The reference job on real ranks: resumed exactly, stopped well, the same on one rank or two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from commrt.errors import ConfigError, StateError
from commrt.metrics import read_rows
from commrt.testing import run_ranks
from commrt.training.config import TrainConfig
from commrt.training.job import run_job
from commrt.training.trainer import Trainer

TIMEOUT_S = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "source.py"
    path.write_bytes(Path(torch.nn.functional.__file__).read_bytes()[:40_000])
    return path


@pytest.fixture
def options(text, tmp_path):
    """A run of a second or so."""
    return {
        "data": text,
        "out": tmp_path / "run",
        "codec": "none",
        "steps": 8,
        "batch_size": 2,
        "seq_len": 16,
        "warmup": 4,
        "eval_every": 4,
        "eval_windows": 10,
        "checkpoint_every": 4,
        "log_every": 1,
    }


def train(options):
    return run_job(TrainConfig.make(**options))


def train_both(first, second):
    return train(first), train(second)


def train_stopped(options, rank, step):
    """Trains; one rank gets a signal while it takes the given step."""
    take_step = Trainer.train_step

    def signalled(trainer):
        if dist.get_rank() == rank and trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(trainer)

    with mock.patch.object(Trainer, "train_step", signalled):
        return train(options)


def train_stopped_and_resumed(options, again, rank, step):
    code = train_stopped(options, rank, step)
    if dist.get_rank() == 0:  # which writes what is looked at
        assert losses(options["out"])[-1][:2] == ("train", 6)
        assert not (options["out"] / "summary.json").exists()
    return code, train(again)


def results(out, step):
    """The files of a checkpoint."""
    files = {
        path.name: torch.load(path, weights_only=True)
        for path in sorted((out / f"step_{step:07d}").glob("*.pt"))
    }
    files["model.pt"].pop("config")
    return files


def losses(out):
    rows = read_rows(out / "metrics.jsonl")
    return [
        (row["kind"], row["step"], row.get("loss", row.get("val_loss")))
        for row in rows
        if "step" in row
    ]


def assert_same(a, b):
    """Equality to the last bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# Three ranks, since the sum of two numbers has but one order.
@pytest.mark.parametrize(("codec", "world_size"), [("none", 3), ("loco4", 2)])
def test_a_resumed_run_equals_an_unbroken_one(options, tmp_path, codec, world_size):
    options |= {"codec": codec}
    again = options | {"out": tmp_path / "again", "resume": options["out"] / "step_0000004"}
    run_ranks(train_both, options, again, world_size=world_size, timeout_s=TIMEOUT_S)
    assert_same(results(again["out"], 8), results(options["out"], 8))
    assert losses(again["out"]) == losses(options["out"])[5:]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(options, tmp_path):
    options["out"].mkdir()
    (options["out"] / "summary.json").write_text("of an earlier run")
    again = options | {"resume": options["out"] / "step_0000004"}
    codes = run_ranks(
        train_stopped_and_resumed, options, again, 1, 5, world_size=2, timeout_s=TIMEOUT_S
    )
    assert codes == [(128 + signal.SIGINT, 0), (128 + signal.SIGTERM, 0)]

    run_ranks(train, options | {"out": tmp_path / "whole"}, world_size=2, timeout_s=TIMEOUT_S)
    assert losses(options["out"]) == losses(tmp_path / "whole")
    names = [path.name for path in options["out"].glob("step_*")]
    assert sorted(names) == ["step_0000004", "step_0000008"]


def test_two_ranks_train_as_one_with_twice_the_batch(options, tmp_path):
    run_ranks(train, options, world_size=2, timeout_s=TIMEOUT_S)
    alone = options | {"out": tmp_path / "alone", "batch_size": 4}
    train(alone)
    for one, two in zip(losses(alone["out"]), losses(options["out"]), strict=True):
        assert one[:2] == two[:2]
        assert one[2] == pytest.approx(two[2], rel=1e-4)

    summary = json.loads((options["out"] / "summary.json").read_text())
    assert summary["val_loss"] == losses(options["out"])[-1][2] < 5.6
    assert summary["bytes_per_step"] == pytest.approx(4 * summary["num_params"], rel=0.01)
    assert summary["step_ms"] > 0
    expected = {"codec": "none", "seed": 0, "steps": 8, "world_size": 2, "batch_size": 2}
    assert expected.items() <= summary.items()


def test_the_codec_waits_and_nodes_are_averaged_first(options):
    changed = {"codec": "loco4", "codec_warmup": 2, "hierarchy": 2, "batch_size": 1, "steps": 4}
    run_ranks(train, options | changed, world_size=4, timeout_s=TIMEOUT_S)
    rows = [row for row in read_rows(options["out"] / "metrics.jsonl") if row["kind"] == "train"]
    numel = json.loads((options["out"] / "summary.json").read_text())["num_params"]
    sent = [row["bytes_sent"] for row in rows]
    assert sent[:2] == [pytest.approx(4 * numel * 2 * 3 / 4, rel=0.01)] * 2
    # Between nodes a quarter, coded, there and back. Inside a half: there in fp32, back as coded.
    between = (4.125 + 8.125) / 8 * numel / 4
    assert sent[2:] == [pytest.approx(between, rel=0.15)] * 2  # more for what is not coded
    within = [row["node_bytes"] for row in rows]
    assert within == [0, 0, *[pytest.approx((4 + 8.125 / 8) * numel / 2, rel=0.02)] * 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.5}, "belongs to another run: lr was 0.002 and is 0.5"),
        ({"steps": 4}, "is at step 4: steps must be larger"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(options, tmp_path, changed, message):
    train(options)
    changed |= {"out": tmp_path / "other", "resume": options["out"] / "step_0000004"}
    with pytest.raises(StateError, match=message):
        train(options | changed)


def test_a_folder_with_checkpoints_is_not_overwritten(options):
    train(options)
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        train(options)


def start(launcher, options, **changed):
    """Starts the command line program, in a process group of its own like in a terminal."""
    given = {name.replace("_", "-"): value for name, value in (options | changed).items()}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "commrt", "train", *arguments],
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt(process, metrics):
    """Presses Ctrl-C once some steps are taken; returns what was printed."""
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not metrics.exists() or len(read_rows(metrics)) < 5:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step was taken in time"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        return process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=TIMEOUT_S)


def test_ctrl_c_ends_all_ranks_of_torchrun(options, tmp_path):
    logs = tmp_path / "logs"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher += [f"--log-dir={logs}", "--redirects=3"]
    metrics = options["out"] / "metrics.jsonl"
    process = start(launcher, options, steps=100_000, checkpoint_every=0)
    interrupt(process, metrics)
    last = losses(options["out"])[-1][1]
    assert [path.name for path in options["out"].glob("step_*")] == [f"step_{last:07d}"]
    assert {path.name for path in (options["out"] / f"step_{last:07d}").glob("*.pt")} == {
        "comm_0.pt",
        "comm_1.pt",
        "model.pt",
    }
    # The launcher itself ends by a traceback; the ranks must not.
    printed = {path: path.read_text() for path in logs.rglob("std*.log")}
    assert len(printed) == 4
    assert not [path for path, text in printed.items() if "Traceback" in text]
    assert any(f"Stopped at step {last}" in text for text in printed.values())


def test_ctrl_c_ends_a_run_without_a_launcher(options):
    process = start([], options, steps=100_000, checkpoint_every=0)
    out, err = interrupt(process, options["out"] / "metrics.jsonl")
    assert process.returncode == 128 + signal.SIGINT
    assert "Stopped at step" in out
    assert "Traceback" not in err
