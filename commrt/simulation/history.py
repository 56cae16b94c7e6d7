"""What simulated runs have told, read back from their folders."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from commrt.errors import ConfigError
from commrt.metrics import Row, read_rows
from commrt.simulation.job import METRICS

METRIC_NAMES = ("accuracy", "loss")
EVALUATIONS = 3  # whose mean has to reach a goal


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """A run from its first aggregation to its last.

    Attributes:
        name: What it is called.
        settings: By the names that ``--set`` knows, and what it ran on.
        rows: Of the aggregations, in order. ``wall_s`` is of all processes that the run had one
            after the other, ``sent_mb`` what clients have sent so far, in 10^6 bytes.
        metric: What was evaluated, ``"accuracy"`` or ``"loss"``.
    """

    name: str
    settings: Row
    rows: Sequence[Row]
    metric: str

    def points(self, across: str, up: str) -> tuple[list[float], list[float]]:
        """Two figures of all rows that have the second; NaN where one was not finite."""
        rows = [row for row in self.rows if up in row]
        return [_number(row.get(across)) for row in rows], [_number(row[up]) for row in rows]

    def last(self, figure: str) -> float:
        """Its newest value; NaN if it was never told."""
        return (self.points("step", figure)[1] or [math.nan])[-1]

    def best(self) -> float:
        """The highest accuracy, or the lowest loss, of any evaluation."""
        found = [value for value in self.points("step", self.metric)[1] if math.isfinite(value)]
        return (max if self.metric == "accuracy" else min)(found, default=math.nan)

    def mean(self, figure: str) -> float:
        """Over the updates of all rows in which it is finite; NaN if it is in none."""
        found = [(v, c) for c, v in zip(*self.points("clients", figure), strict=True) if v == v]
        return statistics.fmean(*zip(*found, strict=True)) if found else math.nan

    def total(self, figure: str) -> float:
        """Over all rows that have it; NaN if none has."""
        _, values = self.points("step", figure)
        return math.fsum(values) if values else math.nan

    def reached(self, goal: float) -> Row:
        """The row at which accuracy is at least, or loss at most, ``goal``; empty if none is.

        That is the mean of the last three evaluations, since one of them may be luck.
        """
        sign = 1 if self.metric == "accuracy" else -1
        evaluated = [row for row in self.rows if self.metric in row]
        for last in range(EVALUATIONS, len(evaluated) + 1):
            values = [_number(row[self.metric]) for row in evaluated[last - EVALUATIONS : last]]
            if sign * statistics.fmean(values) >= sign * goal:
                return evaluated[last - 1]
        return {}


def read_histories(folders: Sequence[Path]) -> list[History]:
    """Read runs that can be compared.

    Args:
        folders: Which ``--out`` of ``commrt federated`` named.

    Raises:
        ConfigError: Folders without a run, or runs of different data; names them all.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    histories, errors = [], []
    for name, folder in zip(names, folders, strict=True):
        try:
            histories.append(_read(name, folder))
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    data = {h.name: f"{h.settings['data.name']}, {h.metric}" for h in histories}
    if len(set(data.values())) > 1:
        named = "; ".join(f"{name} ({what})" for name, what in data.items())
        raise ConfigError(f"runs of different data cannot be compared: {named}")
    return histories


def _read(name: str, folder: Path) -> History:
    path = folder / METRICS
    if not path.is_file():
        raise ConfigError(f"{folder} holds no run: there is no {METRICS} in it")
    try:
        lines = read_rows(path)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not all(isinstance(line, dict) and "kind" in line for line in lines):
        raise ConfigError(f"{path} is damaged, or of something else: it has lines without a kind")
    settings = [line for line in lines if line["kind"] == "config"]
    if not settings or "schedule.policy" not in settings[-1]:
        raise ConfigError(f"{folder} holds no federated run: {METRICS} has no settings of one")
    rows = _rows(lines)
    metric = next((m for m in METRIC_NAMES if any(m in row for row in rows)), None)
    if metric is None:
        raise ConfigError(f"{folder} holds a run that was not evaluated yet")
    return History(name=name, settings=settings[-1], rows=rows, metric=metric)


def _rows(lines: Sequence[Row]) -> list[Row]:
    """Those of aggregations, with what adds up over them."""
    rows = list[Row]()
    wall_s = earlier_s = sent = 0.0
    for line in lines:
        if line["kind"] == "config":
            # A process that goes on counts its time from its own beginning.
            earlier_s = wall_s
            continue
        wall_s = earlier_s + line["wall_s"]
        if line["kind"] == "round":
            sent += _number(line.get("uplink_bytes"))
            rows.append({**line, "wall_s": wall_s, "sent_mb": sent / 1e6})
        else:
            # An evaluation of its own, after a last aggregation that had none.
            rows[-1] = {**line, **rows[-1], "wall_s": wall_s}
    return rows


def _number(value: float | None) -> float:
    return math.nan if value is None else value
