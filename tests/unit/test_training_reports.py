"""What a run leaves behind: JSON lines, TensorBoard events, and a comparison of runs."""

import json
import math
import sys
from pathlib import Path

import pytest

from commrt.__main__ import main
from commrt.errors import ConfigError
from commrt.metrics import JsonLines, TensorBoard, read_rows
from commrt.training.compare import compare_runs

PNG = b"\x89PNG"


def finished_run(folder: Path, codec: str, bytes_sent: int, val_loss: float) -> Path:
    sink = JsonLines(folder / "metrics.jsonl")
    sink.write({"kind": "config", "codec": codec})
    for step in range(1, 5):
        sink.write({"kind": "train", "step": step, "loss": 5.0 / step, "bytes_sent": bytes_sent})
    sink.write({"kind": "val", "step": 4, "val_loss": val_loss})
    sink.close()
    summary = {
        "codec": codec,
        "gather": None,
        "seed": 0,
        "val_loss": val_loss,
        "bytes_per_step": bytes_sent,
        "ratio": 8000 / max(1, bytes_sent),
        "step_ms": 12.5,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_rows_are_lines_of_strict_json(tmp_path):
    sink = JsonLines(tmp_path / "new" / "m.jsonl")
    rows = [{"kind": "train", "step": 1, "loss": math.nan}, {"kind": "val", "step": 1, "x": 0.5}]
    for row in rows:
        sink.write(row)
    assert read_rows(tmp_path / "new" / "m.jsonl") == [{**rows[0], "loss": None}, rows[1]]
    sink.close()


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = JsonLines(path)
    for row in ({"kind": "config"}, *({"kind": "train", "step": step} for step in range(1, 6))):
        sink.write(row)
    sink.close()
    path.write_text(path.read_text() + '{"kind": "tra')
    sink = JsonLines(path, keep_to_step=3)
    sink.write({"kind": "train", "step": 4, "again": True})
    sink.close()
    assert [row.get("step") for row in read_rows(path)] == [None, 1, 2, 3, 4]
    assert read_rows(path)[-1]["again"]


def test_a_new_run_starts_a_new_file(tmp_path):
    for step in (1, 2):
        sink = JsonLines(tmp_path / "m.jsonl")
        sink.write({"kind": "train", "step": step})
        sink.close()
    assert read_rows(tmp_path / "m.jsonl") == [{"kind": "train", "step": 2}]


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    sink.write({"kind": "config", "lr": 1.0})
    sink.write({"kind": "train", "step": 3, "loss": 2.5, "note": "text"})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    [event] = events.Scalars("train/loss")
    assert (event.step, event.value) == (3, 2.5)


def test_tensorboard_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed"):
        TensorBoard(tmp_path)


def test_runs_are_compared(tmp_path, capsys):
    runs = [
        finished_run(tmp_path / "none", "none", 8000, 2.25),
        finished_run(tmp_path / "loco4", "loco4", 1000, math.nan),
    ]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "both")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["none", "-", "2.2500", "8,000", "1.00", "12.5"]
    assert table[2].split() == ["loco4", "-", "nan", "1,000", "8.00", "12.5"]
    summaries = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert [summary["codec"] for summary in summaries] == ["none", "loco4"]
    assert (tmp_path / "both" / "loss.png").read_bytes().startswith(PNG)


def test_a_run_that_sent_nothing_is_drawn(tmp_path):
    run = finished_run(tmp_path / "alone", "none", 0, 2.0)
    compare_runs([run], tmp_path / "out")
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(PNG)


def test_an_unfinished_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no finished run"):
        compare_runs([tmp_path])
