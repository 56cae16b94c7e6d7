"""The configuration: what a preset decides, what is refused, and the command line."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from commrt.__main__ import main
from commrt.errors import ConfigError
from commrt.training.config import TrainConfig, add_options


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return TrainConfig.make(**vars(parser.parse_args(arguments)))


def test_a_preset_decides_unless_overridden():
    config = TrainConfig.make(preset="7m", batch_size=3)
    assert (config.model.dim, config.seq_len, config.batch_size, config.lr) == (384, 128, 3, 1e-3)


def test_the_default_folder_names_the_run():
    config = TrainConfig.make(codec="loco4:block=128", seed=3)
    assert config.out == Path("runs/1m-loco4-block-128-seed3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "2m"}, "preset is '2m': it must be one of 1m, 7m, 25m, 124m"),
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1: it must be at least 1"),
        ({"eval_every": -1}, "eval_every is -1: it must be at least 0"),
        ({"timeout_s": 0}, "timeout_s is 0: it must be at least 1"),
        ({"codec_warmup": -1}, "codec_warmup is -1: it must be at least 0"),
        ({"hierarchy": -2}, "hierarchy is -2: it must be at least 0"),
        ({"lr": 0.0}, "lr is 0.0: it must be above 0 and finite"),
        ({"lr": float("nan")}, "lr is nan: it must be above 0 and finite"),
        ({"clip": float("inf")}, "clip is inf: it must be at least 0 and finite"),
        ({"seed": 2**63}, "seed is .*: it must be below 2"),
        ({"device": "tpu"}, "device is tpu: it must be auto, cpu or cuda"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.make(**options)


def test_options_become_fields():
    config = parse("--preset", "25m", "--lr", "1e-4", "--data", "text", "--no-progress")
    assert config == TrainConfig.make(preset="25m", lr=1e-4, data=Path("text"), no_progress=True)
    assert parse() == TrainConfig.make()


def test_every_field_has_an_option():
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = parser.format_help()
    for entry in dataclasses.fields(TrainConfig):
        assert f"--{entry.name.replace('_', '-')}" in text


def test_resume_alone_means_the_run_s_own_folder():
    assert parse("--out", "here", "--resume").resume == Path("here")
    assert parse("--out", "here", "--resume", "there").resume == Path("there")
    assert parse("--out", "here").resume is None


def test_a_configuration_fits_json():
    assert json.loads(json.dumps(TrainConfig.make(data=Path("text")).to_dict()))["data"] == "text"


def test_a_mistake_is_one_line_and_exit_code_2(capsys):
    assert main(["train", "--data", "nowhere"]) == 2
    assert capsys.readouterr().err == (
        "commrt train: error: nowhere is neither a file nor a folder\n"
    )


def test_a_bad_codec_is_refused_before_anything_is_read(capsys):
    assert main(["train", "--codec", "loco3", "--data", "nowhere"]) == 2
    assert "loco3" in capsys.readouterr().err


def test_help_needs_no_torch():
    program = """
import sys
sys.modules["torch"] = None
from commrt.__main__ import main
main(["train", "--help"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert b"--batch-size" in result.stdout
