"""Bytes and time of optimizers with their state in host memory, against what the link could do.

There is no GPU here. The link is EMULATED: a thread for each direction copies within host memory,
and takes at least the time that the rate gives. The "device" is one thread of the CPU, the host's
steps and the link's copies share the other core; copies that a GPU's copy engines would do for
nothing take time of the processor and of memory, so that times here are above, not below, those of
a machine with such a link. Bytes are those that the link has counted in the timed steps.

    phase    the optimizer's step, until everything has crossed the link: 100.7 M parameters in 111
             tensors, gradients that do not change, no forward or backward to hide behind
    train    a whole step of the main job's model, 25.5 M parameters: forward, backward and the
             optimizer's step, which overlaps both; from one step's begin to the next one's

    up(B), down(B)   bytes a parameter and step to the device, and to the host
    step_ms          median, with its quartiles
    plain_ms         the same with the state where the weights are, no link
    link_ms          bytes / rate, in the direction that has more
    to_limit         step_ms over the larger of the two
    speed_up         over streamed fp32 AdamW at the same rate, in the same rounds
    exact            train: whether the weights after a few steps are those of the optimizer without
                     a link, to the bit

All schemes take turns, in another order every round, at all rates.

    python -m bench.offload -o bench/results/offload.json
    python -m bench.offload --rates 2 --schemes AdamMini --workloads train

"layout of" are emulations of where others keep what, with torch's fused AdamW on the host, on the
same emulated link; they are not the packages, and are given more overlap than these have.
"""

import argparse
import copy
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import harness
from bench.offload_schemes import (
    ADAMW,
    SCHEMES,
    Scheme,
    Trained,
    set_rate,
    why_torchao_does_not_run,
)
from bench.optim import SMALL, Grads, Llama, Shape
from commrt.training.config import PRESETS, ModelConfig
from commrt.training.data import load_corpus, train_batch
from commrt.training.model import GPT, next_byte_losses

COLUMNS = (
    *("workload", "GB/s", "scheme", "up(B)", "down(B)", "bytes", "step_ms", "q1_ms", "q3_ms"),
    *("plain_ms", "link_ms", "to_limit", "speed_up", "exact", "n"),
)
LEAD_STEPS = 2  # of a turn of training, until what overlaps is in its rhythm
WARM_STEPS = 3  # make state and schedules
CHECK_STEPS = 4
SLOW_S = 0.25  # a step that takes longer takes part in every third round only
SELDOM = 3
NAN = float("nan")


class Subject:
    """A scheme with a model of its own, and its measurements by rate."""

    def __init__(
        self,
        scheme: Scheme,
        rates: Sequence[float | None],
        model: nn.Module,
        is_plain: bool,
        overlaps: bool,
    ) -> None:
        self.scheme, self.rates, self.model = scheme, tuple(rates), model
        self.name = scheme.plain if is_plain else scheme.name
        self.num_params = sum(p.numel() for p in model.parameters())
        self.warm_s = 0.0
        rate = rates[0] if scheme.is_planned else None
        self.trained: Trained = (
            scheme.make_plain(model) if is_plain else scheme.make(model, rate, overlaps)
        )
        self.times: dict[float | None, list[float]] = {rate: [] for rate in rates}
        self.bytes: dict[float | None, list[tuple[int, int]]] = {rate: [] for rate in rates}

    def turn(self, rate: float | None) -> None:
        """Measure some steps."""
        link = self.trained.link
        if link is not None:
            set_rate(link, rate)
            before = link.up.num_bytes, link.down.num_bytes
        num_steps, times = self._steps()
        self.times[rate] += times
        if link is not None:  # nothing is on its way now, nor was before
            up, down = link.up.num_bytes - before[0], link.down.num_bytes - before[1]
            self.bytes[rate].append((up / num_steps, down / num_steps))

    def _steps(self) -> tuple[int, list[float]]:
        """Take steps until nothing is on its way; returns how many, and times of some."""
        raise NotImplementedError


class Phase(Subject):
    """The optimizer alone."""

    def __init__(
        self,
        scheme: Scheme,
        rates: Sequence[float | None],
        source: nn.Module,
        grads: Grads,
        *,
        is_plain: bool = False,
    ) -> None:
        super().__init__(scheme, rates, copy.deepcopy(source).to(scheme.dtype), is_plain, False)
        grads.give(self.model, scheme.dtype)
        for _ in range(WARM_STEPS):
            self.warm_s = self._steps()[1][0]

    def _steps(self) -> tuple[int, list[float]]:
        begin = time.perf_counter()
        self.trained.step()
        self.trained.settle()
        return 1, [time.perf_counter() - begin]


class Times(NamedTuple):
    """When a step began, and seconds of its parts."""

    begin: float
    forward: float
    backward: float
    call: float


class Training(Subject):
    """Whole steps."""

    def __init__(
        self,
        scheme: Scheme,
        rates: Sequence[float | None],
        data: "Data",
        num_steps: int,
        *,
        is_plain: bool = False,
    ) -> None:
        super().__init__(scheme, rates, data.model(scheme.dtype), is_plain, True)
        self._data, self._num_steps, self._step = data, num_steps, 0
        self.parts: dict[float | None, list[Times]] = {rate: [] for rate in rates}
        for _ in range(CHECK_STEPS):
            begin = time.perf_counter()
            self.train()
            self.warm_s = time.perf_counter() - begin
        self.trained.settle()
        self.weights = [p.detach().clone() for p in self.model.parameters()]

    def turn(self, rate: float | None) -> None:
        self._times: list[Times] = []
        super().turn(rate)
        self.parts[rate] += self._times

    def train(self) -> Times:
        """One step, which may go on into the next one."""
        begin = time.perf_counter()
        inputs, targets = self._data.batch(self._step)
        self.model.zero_grad()
        loss = next_byte_losses(self.model(inputs), targets).mean()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.trained.step()
        self._step += 1
        return Times(begin, forward - begin, backward - forward, time.perf_counter() - backward)

    def _steps(self) -> tuple[int, list[float]]:
        taken = [self.train() for _ in range(LEAD_STEPS + self._num_steps)]
        self.trained.settle()
        self._times = taken[LEAD_STEPS:-1]  # the last one does not overlap a next one
        times = [after.begin - one.begin for one, after in pairwise(taken[LEAD_STEPS:])]
        return len(taken), times


class Data:
    """The main job's model and text."""

    def __init__(self, args: argparse.Namespace) -> None:
        preset = PRESETS[args.preset]
        torch.manual_seed(0)
        self._source = GPT(
            ModelConfig(
                dim=preset.dim,
                num_layers=preset.num_layers,
                num_heads=preset.num_heads,
                seq_len=args.seq_len,
            )
        )
        self._text, self._args = load_corpus().train, args

    def model(self, dtype: torch.dtype) -> GPT:
        return copy.deepcopy(self._source).to(dtype)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        args = self._args
        return train_batch(
            self._text, seed=0, step=step, rank=0, batch_size=args.batch_size, seq_len=args.seq_len
        )


class Bench:
    """Both workloads, and their rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rates = [None if rate == "none" else 1e9 * float(rate) for rate in args.rates]
        self.schemes = [s for s in SCHEMES if any(text in s.name for text in args.schemes)]
        self.order = random.Random(0)

    def phase(self) -> list[dict[str, Any]]:
        """The optimizer alone, fp32 and bf16 weights in turn: not all fit into memory."""
        torch.manual_seed(0)
        source = Llama(SMALL if self.args.small else Shape())
        grads = Grads(source)
        rows: list[dict[str, Any]] = []
        for dtype in dict.fromkeys(scheme.dtype for scheme in self.schemes):
            group = [s for s in self.schemes if s.dtype == dtype or s.name == ADAMW]
            found = self._measure(
                group,
                lambda scheme, rates, is_plain: Phase(
                    scheme, rates, source, grads, is_plain=is_plain
                ),
                2 * self.args.rounds,
            )
            seen = {row["scheme"] for row in rows}
            rows += [row for row in found if row["scheme"] not in seen]
            gc.collect()
        return [{"workload": "phase", **row} for row in rows]

    def train(self) -> list[dict[str, Any]]:
        """Whole steps."""
        data = Data(self.args)
        rows = self._measure(
            self.schemes,
            lambda scheme, rates, is_plain: Training(
                scheme, rates, data, self.args.steps, is_plain=is_plain
            ),
            self.args.rounds,
        )
        return [{"workload": "train", **row} for row in rows]

    def _measure(
        self, schemes: Sequence[Scheme], make: Callable[..., Any], rounds: int
    ) -> list[dict[str, Any]]:
        plain = {
            s.plain: make(s, [None], is_plain=True) for s in {s.plain: s for s in schemes}.values()
        }
        subjects = [
            make(scheme, rates, is_plain=False)
            for scheme in schemes
            for rates in self._rates_of(scheme)
        ]
        turns = [(s, rate) for s in [*plain.values(), *subjects] for rate in s.rates]
        for round_ in range(rounds):
            for subject, rate in self.order.sample(turns, len(turns)):
                if subject.warm_s < SLOW_S or round_ % SELDOM == 0:
                    subject.turn(rate)
        base = next((s for s in subjects if s.name == ADAMW), None)
        rows = []
        for subject in subjects:
            for rate in subject.rates:
                row = self._row(subject, rate, plain[subject.scheme.plain])
                reference = NAN if base is None else statistics.median(base.times[rate])
                rows.append({**row, "speed_up": 1e3 * reference / row["step_ms"]})
        return rows

    def _rates_of(self, scheme: Scheme) -> list[list[float | None]]:
        """One subject serves all rates, if it does not depend on them."""
        return [[rate] for rate in self.rates] if scheme.is_planned else [self.rates]

    def _row(self, subject: Any, rate: float | None, plain: Any) -> dict[str, Any]:
        q1, step, q3 = _quartiles(subject.times[rate])
        plain_s = statistics.median(plain.times[None])
        up, down = (
            statistics.median(pair[way] for pair in subject.bytes[rate]) for way in range(2)
        )
        link_s = 0.0 if rate is None else max(up, down) / rate
        limit_s = max(plain_s, link_s)
        params = subject.num_params
        row = {
            "GB/s": "none" if rate is None else rate / 1e9,
            "scheme": subject.name,
            "up(B)": up / params,
            "down(B)": down / params,
            "bytes": (up + down) / params,
            "most_bytes": subject.scheme.most_bytes,
            "step_ms": 1e3 * step,
            "q1_ms": 1e3 * q1,
            "q3_ms": 1e3 * q3,
            "plain_ms": 1e3 * plain_s,
            "link_ms": 1e3 * link_s,
            "to_limit": step / limit_s,
            "n": len(subject.times[rate]),
            "num_params": params,
            "exact": "",
        }
        if isinstance(subject, Training):
            row["exact"] = "yes" if _are_equal(subject.weights, plain.weights) else "no"
            for name in ("forward", "backward", "call"):
                for who, times in (("", subject.parts[rate]), ("plain_", plain.parts[None])):
                    row[f"{who}{name}_ms"] = 1e3 * statistics.median(
                        getattr(one, name) for one in times
                    )
        return row


def _quartiles(times: Sequence[float]) -> list[float]:
    return statistics.quantiles(times, n=4, method="inclusive")


def _are_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", default=["2", "12", "none"], help="GB/s each way")
    parser.add_argument("--schemes", nargs="+", metavar="TEXT", default=[""], help="in the name")
    parser.add_argument("--workloads", nargs="+", default=["phase", "train"])
    parser.add_argument(
        "--rounds", type=int, default=6, help="of training; a phase has twice as many"
    )
    parser.add_argument(
        "--steps", type=int, default=6, help="of training in a turn, the last one not timed"
    )
    parser.add_argument("--preset", default="25m", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("-t", "--threads", type=int, default=1, help="of the device's work")
    parser.add_argument("--small", action="store_true", help="a phase of 0.5 M: to try the bench")
    parser.add_argument("-o", "--output", type=Path, help="JSON file; the plot goes beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = os.getloadavg()
    bench, rows = Bench(args), []
    for workload in args.workloads:
        rows += getattr(bench, workload)()
        gc.collect()
    harness.print_table(COLUMNS, rows)
    not_run = {"scheme": "torchao CPUOffloadOptimizer", "not_run": why_torchao_does_not_run()}
    print(f"# {not_run['scheme']}: {not_run['not_run']}")
    print(f"# load average {began[0]:.2f} before, {os.getloadavg()[0]:.2f} after")
    if args.output:
        config = {name: value for name, value in vars(args).items() if name != "output"}
        config |= {"link": "emulated", "load_average": [began, os.getloadavg()]}
        harness.save(args.output, config=config, results=[*rows, not_run])
        plot(rows, args.output.with_suffix(".png"))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time of each scheme, workload by workload, rate by rate."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    rates = list(dict.fromkeys(row["GB/s"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(workloads), figsize=(6 * len(workloads), 5), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    height = 0.8 / len(rates)
    for axis, workload in zip(axes[0], workloads, strict=True):
        for index, rate in enumerate(rates):
            found = {r["scheme"]: r for r in rows if (r["workload"], r["GB/s"]) == (workload, rate)}
            places = [position + index * height for position in range(len(schemes))]
            label = "as fast as memory" if rate == "none" else f"{rate:g} GB/s"
            axis.barh(places, [found[name]["step_ms"] for name in schemes], height, label=label)
            limits = [max(found[name]["plain_ms"], found[name]["link_ms"]) for name in schemes]
            for place, limit in zip(places, limits, strict=True):
                axis.plot([limit] * 2, [place - height / 2, place + height / 2], color="black")
        axis.set(xscale="log", xlabel="ms a step; black: the limit", title=workload)
    axes[0][0].set_yticks([place + 0.4 - height / 2 for place in range(len(schemes))], schemes)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(title="emulated link", fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
