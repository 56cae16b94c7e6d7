"""Runs side by side: real ones, small, as ``commrt federated`` leaves them."""

import dataclasses
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from commrt.__main__ import main
from commrt.errors import ConfigError, StateError
from commrt.metrics import JsonLines, read_rows
from commrt.simulation.history import read_histories
from commrt.simulation.job import run_job
from commrt.simulation.plots import to_svg
from commrt.simulation.report import report_runs

CONFIG = """
uplink = "mbtc:nmse=0.5"
[clients]
count = 12
[local]
batch_size = 16
[schedule]
cohort = 6
deadline_s = 2
[traces]
compute_s = 0.01
compute_sigma = 1.0
[run]
aggregations = 8
evaluate_every = 2
checkpoint_every = 4
"""
RUNS = {
    "rounds": ["schedule.least=2"],
    "buffer": ["uplink=eden1", 'schedule={policy="fedbuff", buffer=3, concurrency=6}'],
    "a <plain> run": ["uplink=fp32", "run.aggregations=4"],
}
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "config.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def runs(config: Path) -> list[Path]:
    for name, assignments in RUNS.items():
        run_job(config, assignments, out=config.parent / name, tensorboard=name == "rounds")
    return [config.parent / name for name in RUNS]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> str:
    """Of all runs, as the command writes it."""
    out = runs[0].parent / "new" / "report.html"
    assert main(["report", *map(str, runs), "--out", str(out), "--goal", "0.5"]) == 0
    return out.read_text(encoding="utf-8")


def rounds(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "round"]


def cells(table: str) -> list[dict[str, str]]:
    """Of an aligned table, by head; a cell's right end is its head's."""
    head, *lines = table.splitlines()
    ends = {match[0]: match.end() for match in re.finditer(r"\S+(?: \S+)*", head)}
    begins = [0, *list(ends.values())[:-1]]
    return [
        {name: line[b:end].strip() for b, (name, end) in zip(begins, ends.items(), strict=True)}
        for line in lines
    ]


def test_a_run_tells_its_settings(runs: list[Path]) -> None:
    [settings] = [r for r in read_rows(runs[1] / "metrics.jsonl") if r["kind"] == "config"]
    assert settings["uplink"].startswith("eden1:")
    assert settings["schedule.policy"] == "fedbuff"
    assert (settings["schedule.buffer"], settings["local.batch_size"]) == (3, 16)
    assert settings["traces.up_bytes_per_s"] is None  # infinite
    assert (settings["world_size"], settings["num_params"]) == (1, 17226)


def test_the_table_has_what_rows_add_up_to(runs: list[Path]) -> None:
    first, second, third = cells(report_runs(runs))
    rows = rounds(runs[0])
    assert (first["run"], first["policy"], first["aggregations"]) == ("rounds", "fedavg", "8")
    assert first["up, MB"] == f"{sum(row['uplink_bytes'] for row in rows) / 1e6:,.3f}"
    assert int(first["lost"]) == sum(row["lost"] for row in rows) > 0
    accuracies = [row["accuracy"] for row in rows if "accuracy" in row]
    assert len(accuracies) == 4
    assert (first["accuracy"], first["best"]) == (f"{accuracies[-1]:.4f}", f"{max(accuracies):.4f}")
    weighted = sum(r["bits"] * r["clients"] for r in rows) / sum(r["clients"] for r in rows)
    assert first["bits"] == f"{weighted:.3f}"
    assert first["missing"] == first["asked"] == "0"
    assert 0.1 < float(first["NMSE"]) < 1.5
    assert second["NMSE"] == third["NMSE"] == "–"
    assert (second["updates"], third["aggregations"]) == ("24", "4")
    assert "alignment" not in first  # which no run has


def test_what_a_goal_took(runs: list[Path]) -> None:
    """Until the mean of three evaluations reached it."""
    rows = [row for row in rounds(runs[0]) if "accuracy" in row]
    means = [sum(row["accuracy"] for row in rows[i : i + 3]) / 3 for i in (0, 1)]
    goal = max(means) - 0.005
    found = rows[2 if means[0] >= goal else 3]
    first, *_ = cells(report_runs(runs, goal=goal))
    assert first["after s"] == f"{found['virtual_s']:,.1f}"
    assert first[f"{goal:g} at"] == str(found["step"])
    assert "after s" not in cells(report_runs(runs, goal=1.01))[0]  # which nobody reached


class Page(html.parser.HTMLParser):
    """Tags that are open at the end, and what they held."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.links, self.texts = list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for name, v in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "dt", "dd"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_a_page_needs_nothing_else(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert all(link.startswith("#") for link in parsed.links)
    texts = set(parsed.texts)
    assert {"rounds", "buffer", "a <plain> run"} <= texts
    assert {"virtual time, s", "MB sent by clients, all together", "aggregations"} <= texts
    assert {"limit of coding: joint", "limit of coding: independent"} <= texts
    # Settings that differ, and those that do not.
    differing, common = page.split("<details>")
    assert "<td>schedule.policy</td><td>fedavg</td><td>fedbuff</td><td>fedavg</td>" in differing
    assert "<td>local.batch_size</td><td>16</td></tr>" in common


def test_plots_are_the_same_for_the_same_runs(runs: list[Path], page: str) -> None:
    """In the colour of the text around them, light or dark."""
    svg = to_svg(read_histories(runs), goal=0.5)
    assert svg in page
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert "#ffffff" not in svg


def test_names_of_all_kinds_are_in_the_legend(runs: list[Path]) -> None:
    """Matplotlib has ideas of its own of some."""
    names = ["_first", r"$\none$ of it", "a$b$^c"]
    histories = [
        dataclasses.replace(history, name=name)
        for name, history in zip(names, read_histories(runs), strict=True)
    ]
    parsed = Page(to_svg(histories))
    assert set(names) <= set(parsed.texts)
    assert {"limit of coding: joint", "limit of coding: independent"} <= set(parsed.texts)


def test_a_picture(runs: list[Path]) -> None:
    report_runs(runs, runs[0].parent / "curves.png")
    assert (runs[0].parent / "curves.png").read_bytes().startswith(PNG)


def test_a_run_that_went_on(config: Path, tmp_path: Path) -> None:
    """It has all rows once, and the time of both processes."""
    run_job(config, ["run.aggregations=4"], out=tmp_path)
    [before] = [row["wall_s"] for row in rounds(tmp_path) if row["step"] == 4]
    run_job(config, out=tmp_path, resume=True)
    [history] = read_histories([tmp_path])
    assert [row["step"] for row in history.rows] == list(range(1, 9))
    assert history.last("wall_s") == pytest.approx(before + rounds(tmp_path)[-1]["wall_s"])
    assert history.settings["run.aggregations"] == 8


def test_a_run_that_time_ends_is_evaluated(config: Path, tmp_path: Path) -> None:
    """Whatever ends it; nobody knows of an aggregation that it will be the last."""
    run_job(config, ["run.aggregations=99", "run.until_s=6", "run.evaluate_every=98"], out=tmp_path)
    run_job(config, ["run.aggregations=99", "run.until_s=6"], out=tmp_path / "often")
    ended, often = read_histories([tmp_path, tmp_path / "often"])
    assert [row["step"] for row in ended.rows] == [row["step"] for row in often.rows]
    assert 1 < len(ended.rows) < 98
    assert ended.last("accuracy") == often.last("accuracy")
    assert ended.rows[-1]["virtual_s"] == often.rows[-1]["virtual_s"]


def test_a_run_that_begins_anew_leaves_nothing_to_go_on_from(config: Path, tmp_path: Path) -> None:
    """Killed before its own first checkpoint, it must not go on from that of the run before."""
    run_job(config, out=tmp_path)
    run_job(config, ["run.aggregations=2"], out=tmp_path)
    assert not list(tmp_path.glob("*.states"))
    with pytest.raises(StateError, match="no checkpoint"):
        run_job(config, out=tmp_path, resume=True)


def test_out_is_a_folder(config: Path) -> None:
    with pytest.raises(ConfigError, match="must be a folder, or nothing yet"):
        run_job(config, out=config)


def test_tensorboard_has_all_figures(runs: list[Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[0])).Reload()
    figures = {"accuracy", "bits", "nmse", "limit_joint", "missing_blocks", "asked_clients"}
    figures |= {"virtual_s", "wall_s", "uplink_bytes", "downlink_bytes", "lost"}
    assert {f"round/{name}" for name in figures} <= set(events.Tags()["scalars"])
    last = events.Scalars("round/accuracy")[-1]
    assert (last.step, last.value) == (8, pytest.approx(rounds(runs[0])[-1]["accuracy"]))


def test_alignment_and_losses_that_are_not_finite(runs: list[Path], tmp_path: Path) -> None:
    settings = read_rows(runs[0] / "metrics.jsonl")[0]
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.write(settings)
    for step, loss in enumerate((3.0, 2.0, 2.1, 1.0, math.nan), 1):
        row = {"kind": "round", "step": step, "wall_s": 1.0, "virtual_s": 1.0 * step, "clients": 2}
        sink.write({**row, "loss": loss, "uplink_bytes": 10, "alignment": 0.9, "nmse": loss})
    sink.close()
    [line] = cells(report_runs([tmp_path], goal=2.0))
    assert (line["best"], line["alignment"]) == ("1.0000", "0.900")
    assert line["NMSE"] == f"{(3 + 2 + 2.1 + 1) / 4:.3g}"  # of a zero update there is none
    assert (line["2 at"], line["after s"]) == ("4", "4.0")
    assert not {"bits", "loss"} & set(line)


def test_runs_that_cannot_be_compared_are_named(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for name, rows in {
        "training": [{"kind": "config", "codec": "loco4"}],
        "begun": read_rows(runs[0] / "metrics.jsonl")[:1],
        "other": [
            json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[0])
            | {"data.name": "text"},
            {"kind": "round", "step": 1, "wall_s": 1, "loss": 2.0, "clients": 1},
        ],
    }.items():
        sink = JsonLines(tmp_path / name / "metrics.jsonl")
        for row in rows:
            sink.write(row)
        sink.close()
    damaged = {"damaged": b"{]\n", "list": b"[1]\n", "kindless": b'{"x": 1}\n', "latin": b"\xff\n"}
    for name, content in damaged.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_bytes(content)
    names = ("none", "training", "begun", *damaged)
    with pytest.raises(ConfigError) as caught:
        report_runs([runs[0], *(tmp_path / name for name in names)])
    said = str(caught.value).splitlines()
    assert said[0] == f"{tmp_path / 'none'} holds no run: there is no metrics.jsonl in it"
    assert all(str(tmp_path / name) in line for name, line in zip(names, said, strict=True))
    with pytest.raises(ConfigError, match=r"rounds \(digits-mlp, accuracy\); other \(text, loss\)"):
        report_runs([runs[0], tmp_path / "other"])
    with pytest.raises(ConfigError, match=r"must end in \.html or \.png"):
        report_runs(runs, tmp_path / "report.pdf")


def test_runs_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    lines = (runs[0] / "metrics.jsonl").read_text()
    (tmp_path / "rounds" / "metrics.jsonl").write_text(lines)
    found = read_histories([runs[0], tmp_path / "rounds"])
    assert [history.name for history in found] == [str(runs[0]), str(tmp_path / "rounds")]
