"""Bytes of the federated uplink, against what the model loses by them and what theory allows.

Tasks: 16 clients train locally, their updates cross the uplink as bytes, and the model gets the
mean that the server decodes (`bench.uplink_tasks`). Sources: correlated Gaussians, for which the
limits are known (`bench.uplink_gaussian`).

    bits          uplink bits a weight and client: headers, tables, checks and answers included
    answers       of these, what the server asked for once more; asked: share of clients it asked
    down          bits of parameters and requests, a weight and client, without the model
    quarter, half accuracy, or loss of text, after so many rounds; final: mean of the last three
    gap           final less that of fp32, seed by seed
    distortion    |mean - true mean|^2 / sum_k w_k^2 |update_k|^2, mean over rounds
    alignment     <mean, true mean> / |true mean|^2: below 1 where a codec shrinks
    enc_ms        of a client; dec_ms: of the server, a client; one thread
    first         bits of the first round, when the server knows nothing; bits are of the others
    limit, alone  bits that Gaussian updates need at the row's distortion: Berger-Tung, and each
                  client decoded alone

    python -m bench.uplink -o bench/results/uplink.json
    python -m bench.uplink --tasks digits-mlp --splits iid --codecs eden1 mbtc:nmse=0.571

Needs scikit-learn for the digits: pip install -c constraints.txt -e '.[bench]'.
"""

import argparse
import itertools
import json
import multiprocessing
import operator
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import harness, uplink_gaussian, uplink_tasks

GAUSSIAN = "gaussian"
SPLITS = {
    "digits-mlp": ("iid", "dirichlet0.5", "dirichlet0.1"),
    "digits-cnn": ("iid", "dirichlet0.1"),
    "text": ("natural",),
}
REFERENCE = "fp32"
CODECS = (
    *(REFERENCE, "fp16", "loco4", "eden2", "eden1", "qsgd:levels=9", "spread:step=2.6"),
    *("sign", "pvq", "topk:share=0.03", "topk:share=0.01"),
    *("mbtc:nmse=0.571", "mbtc:nmse=0.571,memory=False", "mbtc:nmse=10"),
    *(f"mbtc:bits={bits}" for bits in (0.2, 0.5, 1, 2)),
)
COLUMNS = (
    *("task", "split", "codec", "bits", "answers", "down", "quarter", "half", "final", "gap"),
    *("distortion", "alignment", "enc_ms", "dec_ms", "seeds"),
)
DUEL_COLUMNS = ("task", "split", "codec", "bits", "final", "ours", "our_bits", "our_final", "gain")
SLACK = 1.01  # `bits=` is met on average, to a per cent or so
Row = dict[str, Any]


def train(name: str, split: str, codec: str, seed: int, *, rounds: int) -> Row:
    """A run's row."""
    row = uplink_tasks.train(
        uplink_tasks.TASKS[name][0](split, seed), codec, rounds=rounds, seed=seed
    )
    return {"task": name, "split": split, "codec": codec, "seed": seed, **row}


def jobs(args: argparse.Namespace) -> list[Callable[[], Row]]:
    """What is to be run; what takes longest first."""
    calls: list[Callable[[], Row]] = []
    tasks = [name for name in args.tasks if name != GAUSSIAN]
    if GAUSSIAN in args.tasks:
        sources = itertools.product(
            sorted(args.clients, reverse=True),
            uplink_gaussian.CORRELATIONS,
            uplink_gaussian.CODECS,
        )
        measure = partial(uplink_gaussian.measure, rounds=args.gaussian_rounds)
        calls += [partial(measure, *source) for source in sources]
    for name in reversed(tasks):
        splits = [s for s in args.splits or SPLITS[name] if uplink_tasks.has_split(name, s)]
        cells = itertools.product([name], splits, args.codecs, args.seeds)
        calls += [partial(train, *cell, rounds=args.rounds) for cell in cells]
    return calls


def run(calls: Sequence[Callable[[], Row]], num_processes: int) -> list[Row]:
    """The rows, each of one thread of one process."""
    rows = []
    with ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        for row in pool.map(operator.call, calls):
            rows.append(row)
            done = f"{len(rows)} of {len(calls)}: {row['codec']}, {row['bits']:.3f} bits"
            print(done, file=sys.stderr, flush=True)
    return rows


def added(rows: Sequence[Row], paths: Sequence[Path]) -> list[Row]:
    """Rows of earlier runs that are not among these."""
    found = {_place(row): row for path in paths for row in json.loads(path.read_text())["results"]}
    for row in rows:
        found.pop(_place(row), None)
    return list(found.values())


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("task", "split", "seed", "K", "rho", "kind", "codec"))


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """A row for each task, split and codec: means over seeds, and the gap to the reference."""
    reference = {_cell(row): row["final"] for row in rows if row["codec"] == REFERENCE}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        gap = row["final"] - reference.get(_cell(row), float("nan"))
        key = (row["task"], row["split"], row["codec"])
        groups.setdefault(key, []).append({**row, "gap": gap})
    return [
        {
            **group[0],
            **{name: statistics.fmean(row[name] for row in group) for name in COLUMNS[3:-1]},
            "seeds": len(group),
        }
        for group in groups.values()
    ]


def _cell(row: Row) -> tuple[Any, ...]:
    return row["task"], row["split"], row["seed"]


def duels(rows: Iterable[Row]) -> list[Row]:
    """Every other codec against the mbtc of most bits among those with no more than it has.

    The gain is in accuracy, or in loss avoided.
    """
    found = []
    rows = list(rows)
    for row in rows:
        rivals = [
            other
            for other in rows
            if other["codec"].startswith("mbtc:bits")
            and (other["task"], other["split"]) == (row["task"], row["split"])
            and other["bits"] <= SLACK * row["bits"]
        ]
        if row["codec"].startswith("mbtc") or not rivals:
            continue
        ours = max(rivals, key=lambda other: other["bits"])
        gain = ours["final"] - row["final"]
        found.append(
            {
                **row,
                "ours": ours["codec"],
                "our_bits": ours["bits"],
                "our_final": ours["final"],
                "gain": -gain if row["is_loss"] else gain,
            }
        )
    return found


def main() -> None:
    """Command line."""
    names = [*uplink_tasks.TASKS, GAUSSIAN]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=names, default=names)
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="iid, dirichletNUMBER, natural; default: some"
    )
    parser.add_argument(
        "--codecs", nargs="+", metavar="SPEC", default=list(CODECS), help="of tasks"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of tasks")
    parser.add_argument("--rounds", type=int, default=40, help="of tasks")
    parser.add_argument("--gaussian-rounds", type=int, default=4, help="two at least")
    parser.add_argument(
        "--clients", nargs="+", type=int, default=list(uplink_gaussian.COHORTS), help="Gaussian"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        *("--add",), nargs="+", type=Path, metavar="JSON", default=[],
        help="of earlier runs, whose rows are taken over where this one has none",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, help="JSON file; the plots go beside it")
    args = parser.parse_args()
    if min(args.rounds, 2 * args.gaussian_rounds) < 4:
        parser.error("--rounds must be at least 4, --gaussian-rounds at least 2")
    rows = run(jobs(args), args.processes)
    rows += added(rows, args.add)
    trained = [row for row in rows if "task" in row]
    sources = [row for row in rows if "task" not in row]
    table = over_seeds(trained)
    for columns, found in (
        (COLUMNS, table),
        (DUEL_COLUMNS, duels(table)),
        (uplink_gaussian.COLUMNS, sources),
    ):
        if found:
            harness.print_table(columns, found)
    if args.output:
        config = {n: value for n, value in vars(args).items() if n not in ("output", "add")}
        harness.save(args.output, config=config, results=rows)
        if table:
            plot_tasks(table, args.output.with_name(f"{args.output.stem}_tasks.png"))
        if sources:
            plot_gaussian(sources, args.output.with_name(f"{args.output.stem}_gaussian.png"))


# -- plots ----------------------------------------------------------------------------------------


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    return pyplot


def plot_tasks(rows: Sequence[Row], path: Path) -> None:
    """Accuracy or loss against the uplink's bytes so far, of the first seed."""
    pyplot = _pyplot()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    panels = {
        name: list(dict.fromkeys(row["split"] for row in rows if row["task"] == name))
        for name in tasks
    }
    width = max(map(len, panels.values()))
    figure, axes = pyplot.subplots(
        len(tasks), width, figsize=(5 * width, 4 * len(tasks)), layout="constrained", squeeze=False
    )
    palette = pyplot.get_cmap("tab20").colors
    codecs = dict.fromkeys(row["codec"] for row in rows)
    colors = {codec: palette[i % len(palette)] for i, codec in enumerate(codecs)}
    lines = {}
    for axis in axes.flat:
        axis.set_visible(False)
    for row in rows:
        axis = axes[tasks.index(row["task"])][panels[row["task"]].index(row["split"])]
        style = "-" if row["codec"].startswith("mbtc") else ":"
        sent, measures = zip(*row["curve"], strict=True)
        (line,) = axis.plot(sent, measures, style, color=colors[row["codec"]], marker=".")
        lines[row["codec"]] = line
        axis.set_visible(True)
        axis.set(xscale="log", xlabel="uplink bytes", title=f"{row['task']}, {row['split']}")
        axis.set_ylabel("loss, nats a byte" if row["is_loss"] else "accuracy")
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def plot_gaussian(rows: Sequence[Row], path: Path) -> None:
    """Bits against correlation, with both limits."""
    pyplot = _pyplot()
    cohorts = sorted({row["K"] for row in rows})
    figure, axes = pyplot.subplots(
        1, len(cohorts), figsize=(5 * len(cohorts), 4.5), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, num_clients in zip(axes[0], cohorts, strict=True):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            chosen = [r for r in rows if (r["K"], r["kind"]) == (num_clients, kind)]
            axis.plot([r["rho"] for r in chosen], [r["bits"] for r in chosen], "o-", label=kind)
        fine = [index / 200 for index in range(199)]
        limits = [
            uplink_gaussian.Source(num_clients, rho).limits(uplink_gaussian.NMSE) for rho in fine
        ]
        for index, (style, label) in enumerate((("k-", "Berger–Tung"), ("k--", "point to point"))):
            axis.plot(fine, [pair[index] for pair in limits], style, label=f"limit, {label}")
        axis.set(xlabel="correlation ρ", title=f"{num_clients} clients", ylim=(0, None))
    axes[0][0].set_ylabel(f"uplink bits a weight, at NMSE {uplink_gaussian.NMSE}")
    axes[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
