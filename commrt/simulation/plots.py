"""Pictures of simulated runs, side by side."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commrt.errors import ConfigError
from commrt.simulation.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
LIMITS = {"limit_independent": "--", "limit_joint": ":"}
# Of all that is text or axis; a page replaces it by the colour of its own text.
_INK = "#010203"
_STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _INK),
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "commrt",  # the same file for the same runs
}
_WIDE = 15  # largest over smallest, from which on an axis is logarithmic


def save_png(histories: Sequence[History], path: Path, goal: float | None = None) -> None:
    """Draw runs into a PNG file.

    Args:
        histories: The runs.
        path: Of the file.
        goal: An accuracy or loss to draw a line at.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    _draw(histories, goal).savefig(path, dpi=100)


def to_svg(histories: Sequence[History], goal: float | None = None) -> str:
    """The same as an ``<svg>`` element, transparent and in the colour of the text around it."""
    mpl = _matplotlib()
    text = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure = _draw(histories, goal)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("matplotlib is not installed: pip install matplotlib") from error
    return mpl


def _draw(histories: Sequence[History], goal: float | None) -> "Figure":
    figure: Figure = _matplotlib().figure.Figure(figsize=(11, 7.5), layout="constrained")
    (by_round, by_bytes), (by_time, bits) = figure.subplots(2, 2)
    metric = histories[0].metric
    panels = {
        by_round: ("step", metric, "aggregations"),
        by_bytes: ("sent_mb", metric, "MB sent by clients, all together"),
        by_time: ("virtual_s", metric, "virtual time, s"),
        bits: ("step", "bits", "aggregations"),
    }
    for axes, (across, up, label) in panels.items():
        for history, style in zip(histories, _styles(histories), strict=True):
            axes.plot(*history.points(across, up), **style)
        _stretch(axes, "x", [history.last(across) for history in histories])
        axes.set(xlabel=label, ylabel=up)
        axes.grid(alpha=0.2)
    for axes in (by_round, by_bytes, by_time):
        if goal is not None:
            axes.axhline(goal, color=COLORS[7], linewidth=0.8)
    _draw_limits(bits, histories)
    legend = figure.legend(
        *by_round.get_legend_handles_labels(), loc="outside upper center", ncols=4
    )
    for text, history in zip(legend.get_texts(), histories, strict=True):
        text.set(text=history.name, parse_math=False)
    return figure


def _draw_limits(axes: Any, histories: Sequence[History]) -> None:
    """What the bits of runs that know their limits are at least."""
    axes.set_ylabel("uplink bits a weight")
    _stretch(axes, "y", [history.mean("bits") for history in histories])
    for name, dashes in LIMITS.items():
        for index, history in enumerate(histories):
            color = COLORS[index % len(COLORS)]
            axes.plot(*history.points("step", name), color=color, linestyle=dashes, linewidth=0.8)
        if any(name in row for history in histories for row in history.rows):
            label = name.replace("limit_", "limit of coding: ")
            axes.plot([], [], color=COLORS[7], linestyle=dashes, label=label)
    if axes.get_legend_handles_labels()[1][len(histories) :]:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[len(histories) :], labels[len(histories) :])


def _styles(histories: Sequence[History]) -> list[dict[str, Any]]:
    """A colour each; beyond that many, other dashes."""
    dashes = ("-", "-.", "--", ":")
    return [
        {
            "color": COLORS[index % len(COLORS)],
            "linestyle": dashes[index // len(COLORS) % len(dashes)],
            "linewidth": 1.3,
            # Not the name: matplotlib hides what begins with _, and reads what is between $ and $.
            "label": f"run {index}",
            "marker": "." if len(history.rows) <= 40 else "",
        }
        for index, history in enumerate(histories)
    ]


def _stretch(axes: Any, which: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic where runs are far apart."""
    found = [value for value in values if value > 0]
    if found and max(found) > _WIDE * min(found):
        axes.set(**{f"{which}scale": "log"})
