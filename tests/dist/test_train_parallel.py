"""The main job sharded: resumed exactly, resumed as another kind or with other ranks, refused.

Bit-identical: the losses of a run that was stopped and resumed, and of the run that was not.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from commrt.errors import ConfigError, StateError
from commrt.metrics import read_rows
from commrt.testing import run_ranks
from commrt.training.config import TrainConfig
from commrt.training.job import run_job

TIMEOUT_S = 90


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "source.py"
    path.write_bytes(Path(torch.nn.functional.__file__).read_bytes()[:40_000])
    return path


@pytest.fixture
def options(text, tmp_path):
    return {
        "data": text,
        "out": tmp_path / "run",
        "steps": 6,
        "batch_size": 2,
        "seq_len": 16,
        "warmup": 3,
        "eval_every": 3,
        "eval_windows": 9,  # which ranks cannot share evenly
        "checkpoint_every": 3,
        "log_every": 1,
    }


def train(*runs):
    return [run_job(TrainConfig.make(**options)) for options in runs]


def losses(out):
    rows = read_rows(out / "metrics.jsonl")
    return [row.get("loss", row.get("val_loss")) for row in rows if "step" in row]


def train_and_resume(options, again):
    train(options)
    if dist.get_rank() == 0:
        (options["out"] / "step_0000006").rename(options["out"] / "later")
    dist.barrier()
    train(again)


@pytest.mark.parametrize(
    "choice",
    [
        {"parallel": "fsdp1", "optim": "adam-mini"},
        {"parallel": "fsdp2", "gather": "block8", "hierarchy": 2},
        {"parallel": "fsdp2", "gather": "delta4", "keep_gathered": True},
        {"parallel": "hsdp", "hierarchy": 2, "intra": "block8"},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_run(choice, options, tmp_path):
    options = options | choice
    again = options | {"out": tmp_path / "again", "resume": options["out"] / "step_0000003"}
    run_ranks(train_and_resume, options, again, world_size=4, timeout_s=TIMEOUT_S)
    assert losses(again["out"]) == losses(options["out"])[4:]
    summary = json.loads((options["out"] / "summary.json").read_text())
    assert summary["parallel"] == choice["parallel"]
    weights = torch.load(again["out"] / "step_0000006" / "model.pt")["model"]
    assert summary["num_params"] == sum(weight.numel() for weight in weights.values())


def test_a_run_goes_on_as_another_kind(options, tmp_path):
    """DDP on 2 ranks, then FSDP2 on 3, then HSDP on 4, then FSDP1 on 2."""
    folder = None
    for world_size, choice, batch_size in (
        (2, {"parallel": "ddp"}, 6),
        (3, {"parallel": "fsdp2", "gather": "block8"}, 4),
        (4, {"parallel": "hsdp", "hierarchy": 2}, 3),
        (2, {"parallel": "fsdp1"}, 6),
    ):
        part = options | choice | {"batch_size": batch_size, "out": tmp_path / choice["parallel"]}
        steps = 3 if folder is None else int(folder.name[5:]) + 3
        part |= {"steps": steps, "resume": folder}
        run_ranks(train, part, world_size=world_size, timeout_s=TIMEOUT_S)
        folder = part["out"] / f"step_{steps:07d}"
        assert all(loss < 6 for loss in losses(part["out"]))
    last = [row["loss"] for row in read_rows(part["out"] / "metrics.jsonl") if "loss" in row][-1]
    first = losses(tmp_path / "ddp")[0]
    assert last < first - 0.5


def test_an_optimizer_goes_on_as_another_kind(options, tmp_path):
    """The state of FSDP1 is AdamW's, which the others take in, and it theirs."""
    options |= {"optim": "adam-mini", "momentum": "int8", "codec": "none", "clip": 0.1}
    run_ranks(train, options, world_size=2, timeout_s=TIMEOUT_S)
    expected = losses(options["out"])
    for before, after in (("ddp", "fsdp1"), ("fsdp1", "fsdp2"), ("fsdp2", "ddp")):
        first = options | {"parallel": before, "steps": 6, "out": tmp_path / before}
        then = options | {"parallel": after, "out": tmp_path / f"{before}-{after}"}
        then["resume"] = first["out"] / "step_0000003"
        run_ranks(train, first, then, world_size=2, timeout_s=TIMEOUT_S)
        assert losses(first["out"]) == pytest.approx(expected, rel=1e-4)
        assert losses(then["out"]) == pytest.approx(expected[4:], rel=1e-4)


def test_an_offloaded_run_is_the_run(options, tmp_path):
    """Also when it goes on from a checkpoint of a run whose state was elsewhere."""
    options |= {"optim": "adam-mini", "momentum": "int8", "clip": 0.1}
    run_ranks(train, options, world_size=2, timeout_s=TIMEOUT_S)
    expected, folder = losses(options["out"]), options["out"]
    for mode in ("stream", "cpu"):
        run = options | {"offload": mode, "link_rate": "100MB/s", "out": tmp_path / mode}
        again = run | {"resume": folder / "step_0000003", "out": tmp_path / f"{mode}-again"}
        run_ranks(train, run, again, world_size=2, timeout_s=TIMEOUT_S)
        assert losses(run["out"]) == expected
        assert losses(again["out"]) == expected[4:]
        folder = run["out"]


def test_the_same_ranks_as_another_kind(options, tmp_path):
    """Whose states then are those of all ranks, not each rank's own."""
    run_ranks(train, options | {"steps": 3}, world_size=2, timeout_s=TIMEOUT_S)
    again = options | {"out": tmp_path / "again", "resume": options["out"], "parallel": "fsdp2"}
    run_ranks(train, again | {"steps": 4}, world_size=2, timeout_s=TIMEOUT_S)
    for rank in range(2):
        state = torch.load(again["out"] / "step_0000004" / f"comm_{rank}.pt")
        assert state["placement"].startswith("FSDP2")
        assert state["steps"] == 4
        assert not state["carries"]  # sent with the fourth step


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"parallel": "fsdp3"}, "parallel is fsdp3: it must be ddp, fsdp1, fsdp2, hsdp"),
        ({"parallel": "hsdp"}, "hierarchy is 0: it must be at least 1 with parallel=hsdp"),
        ({"gather": "delta4"}, "gather='delta4.*must be 'none' or a block codec"),
        ({"parallel": "fsdp2", "codec": "delta4"}, "only gather= of a sharded model takes it"),
    ],
)
def test_options_that_do_not_fit(choice, message, options):
    with pytest.raises(ConfigError, match=message):
        run_job(TrainConfig.make(**options | choice))


def refuse(options):
    for choice, message in (
        ({"parallel": "hsdp", "hierarchy": 3}, "hierarchy is 3: it must divide the 2 ranks"),
        ({"parallel": "fsdp2", "gather": "delta4"}, "reshard_after_forward of module"),
        ({"parallel": "fsdp1", "gather": "block8"}, "FSDP1 has no hook for its weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(options | choice)
    train(options | {"steps": 3})
    with pytest.raises(StateError, match="codec was 'loco4' and is 'loco2'"):
        train(options | {"resume": True, "codec": "loco2"})


def test_refusals_of_ranks(options):
    run_ranks(refuse, options, world_size=2, timeout_s=TIMEOUT_S)
