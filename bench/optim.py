"""Time of one optimizer step on a CPU: commrt's, torch's and others', against what memory can do.

Weights of a Llama-like model, 100.7 M parameters in 111 tensors. All optimizers of a group take
turns in one run, each a step a round, in another order every round; where not all fit into memory
there are several groups, each with torch's fused AdamW and the scale. What is compared is compared
within a round. Times are medians; gradients do not change, so that nothing is timed but ``step()``.

    step_ms       wall time, with its quartiles; cpu_ms is CPU time of the process, which on a
                  machine that others use as well says more, with one thread
    speed_up      over torch's fused AdamW, fp32, with as many threads; cpu_ likewise by CPU time
    moved(B)      bytes a parameter that must be read and written
    to_floor      time over that of as many bytes by an in-place scale (torch's ``mul_``, 8 bytes a
                  parameter) with as many threads; cpu_ likewise by CPU time
    state(B)      bytes a parameter in ``optimizer.state``, master weights included
    scaling       wall time with one thread over that with these
    n             timed steps; of a slow optimizer fewer than rounds

    python -m bench.optim --threads 1 2 -o bench/results/optim.json
    python -m bench.optim --candidates commrt deepspeed --rounds 40

Thread counts are changed within a round: all follow ``torch.set_num_threads``, the others by
torch's OpenMP. Figures of several threads mean something only where nobody else uses the cores:
OpenMP's regions, one or more for each tensor, wait for the last of their threads.

Other packages are optional; what is not there or does not run is listed with the reason. None may
replace torch, so they go without their dependencies into a copy of an environment that has commrt
and torch. torchao compiles its steps by ``torch.compile``, and DeepSpeed by ninja, when they are
first used; both need a C++ compiler::

    pip install --no-deps adam-mini==1.1.1 bitsandbytes torchao
    pip install --no-deps --no-build-isolation deepspeed
    pip install einops hjson msgpack ninja packaging psutil py-cpuinfo pydantic tqdm
"""

import argparse
import copy
import dataclasses
import gc
import importlib
import importlib.metadata
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import harness
from commrt import optim

LR = 1e-3
HEAD_DIM = 64
REST_S = 0.01  # before a timed step: OpenMP's threads spin for some ms after the last one
SLOW_S = 1.0  # a step that takes longer takes part in every fourth round only
PACKAGES = ("adam-mini", "bitsandbytes", "deepspeed", "torchao")
COLUMNS = (
    *("group", "optimizer", "threads", "step_ms", "q1_ms", "q3_ms", "cpu_ms"),
    *("speed_up", "cpu_speed_up", "moved(B)", "to_floor", "cpu_to_floor", "state(B)"),
    *("scaling", "n"),
)
Make = Callable[[nn.Module], Any]


# -- the model ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    dim: int = 768
    num_layers: int = 12
    ffn: int = 2048
    vocab: int = 10240


SMALL = Shape(dim=128, num_layers=2, ffn=256, vocab=512)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads, self.head_dim = shape.dim // HEAD_DIM, HEAD_DIM
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(shape.dim, shape.dim, bias=False))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.dim, bias=False)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.dim)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.dim)
        self.mlp = MLP(shape)


class Llama(nn.Module):
    """Parameters only, in modules and by names that every optimizer here recognises."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.dim)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.dim)
        self.lm_head = nn.Linear(shape.dim, shape.vocab, bias=False)


# -- the candidates -------------------------------------------------------------------------------


class Scale:
    """The yardstick, with an optimizer's face."""

    def __init__(self, model: nn.Module) -> None:
        self.state: dict[str, Tensor] = {}
        self.values = torch.ones(sum(parameter.numel() for parameter in model.parameters()))

    def step(self) -> None:
        self.values.mul_(0.9999)


def _torch(**options: Any) -> Make:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=LR, **options)


def _ours(name: str, **options: Any) -> Make:
    def make(model: nn.Module) -> Any:
        if not hasattr(optim, name):
            raise ImportError(f"commrt.optim has no {name}")
        return getattr(optim, name)(model, lr=LR, **options)

    return make


def _peer(module: str, name: str, **options: Any) -> Make:
    def make(model: nn.Module) -> Any:
        peer = getattr(importlib.import_module(module), name)
        return peer(model.parameters(), lr=LR, weight_decay=1e-2, **options)

    return make


def _official_adam_mini(model: nn.Module) -> Any:
    peer = importlib.import_module("adam_mini").Adam_mini
    dim = model.shape.dim
    return peer(
        model.named_parameters(),
        lr=LR,
        weight_decay=1e-2,
        dim=dim,
        n_heads=dim // HEAD_DIM,
        verbose=False,
    )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An optimizer with its options.

    Attributes:
        name: Of the row.
        moved: Bytes a parameter that a step must read and write: weights both ways, the gradient,
            moments both ways. Second moments of Adam-mini, less than 0.01, do not count.
        make: From a model.
        dtype: Of weights and gradients.
    """

    name: str
    moved: float
    make: Make
    dtype: torch.dtype = torch.float32


BF16 = torch.bfloat16
INT8 = 2 * (1 + 4 / 256)  # a moment read and written, with an fp32 scale for 256 elements
FLOOR = Candidate("in-place scale", 8, Scale)
REFERENCE = Candidate("torch AdamW fused", 8 + 4 + 16, _torch(fused=True))
# An fp32 master is read and written (8), and bf16 weights written (2).
CANDIDATES = (
    Candidate("torch AdamW foreach", 8 + 4 + 16, _torch(foreach=True)),
    Candidate("torch AdamW default", 8 + 4 + 16, _torch()),
    Candidate("torch AdamW fused, all bf16", 4 + 2 + 8, _torch(fused=True), BF16),
    Candidate("commrt AdamMini", 8 + 4 + 8, _ours("AdamMini")),
    Candidate("commrt AdamMini bf16 m", 8 + 4 + 4, _ours("AdamMini", momentum_dtype="bf16")),
    Candidate("commrt AdamMini int8 m", 8 + 4 + INT8, _ours("AdamMini", momentum_dtype="int8")),
    Candidate("commrt AdamMini bf16 w+g, master", 8 + 2 + 2 + 8, _ours("AdamMini"), BF16),
    Candidate(
        "commrt AdamMini bf16 w+g, master, int8 m",
        8 + 2 + 2 + INT8,
        _ours("AdamMini", momentum_dtype="int8"),
        BF16,
    ),
    Candidate(
        "commrt AdamMini bf16 w+g, residual, int8 m",
        4 + 2 + 2 + INT8,
        _ours("AdamMini", momentum_dtype="int8", weight_mode="residual"),
        BF16,
    ),
    Candidate(
        "commrt AdamMini bf16 w+g, stochastic, int8 m",
        4 + 2 + INT8,
        _ours("AdamMini", momentum_dtype="int8", weight_mode="stochastic"),
        BF16,
    ),
    Candidate("commrt AdamW8bit", 8 + 4 + 2 * INT8, _ours("AdamW8bit")),
    Candidate("commrt Lion", 8 + 4 + 8, _ours("Lion")),
    Candidate("commrt Adan", 8 + 4 + 32, _ours("Adan")),  # four moments
    Candidate("commrt MoFO", 8 + 4 + 16, _ours("MoFO")),
    Candidate("adam-mini (official)", 8 + 4 + 8, _official_adam_mini),
    Candidate("DeepSpeedCPUAdam", 8 + 4 + 16, _peer("deepspeed.ops.adam", "DeepSpeedCPUAdam")),
    Candidate(  # moments in fp32
        "DeepSpeedCPUAdam bf16 w+g",
        4 + 2 + 16,
        _peer("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
        BF16,
    ),
    Candidate("bitsandbytes AdamW", 8 + 4 + 16, _peer("bitsandbytes.optim", "AdamW")),
    Candidate("bitsandbytes AdamW8bit", 8 + 4 + 2 * INT8, _peer("bitsandbytes.optim", "AdamW8bit")),
    Candidate("torchao AdamW8bit", 8 + 4 + 2 * INT8, _peer("torchao.optim", "AdamW8bit")),
    Candidate("torchao AdamWFp8", 8 + 4 + 2 * INT8, _peer("torchao.optim", "AdamWFp8")),
    Candidate(  # half a byte, and an fp32 scale for 128 elements
        "torchao AdamW4bit", 8 + 4 + 4 * (0.5 + 4 / 128), _peer("torchao.optim", "AdamW4bit")
    ),
)


# -- one candidate --------------------------------------------------------------------------------


class Grads:
    """Gradients that all candidates with weights of a dtype share."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        drawn = [1e-2 * torch.randn(p.shape, generator=generator) for p in model.parameters()]
        self.of = {torch.float32: drawn, BF16: [grad.to(BF16) for grad in drawn]}
        self._sums = {dtype: self._sum(dtype) for dtype in self.of}

    def give(self, model: nn.Module, dtype: torch.dtype) -> None:
        for parameter, grad in zip(model.parameters(), self.of[dtype], strict=True):
            parameter.grad = grad

    def are_changed(self, dtype: torch.dtype) -> bool:
        return self._sum(dtype) != self._sums[dtype]

    def _sum(self, dtype: torch.dtype) -> int:
        bits = torch.int32 if dtype.itemsize == 4 else torch.int16  # whose sum is exact
        return sum(int(grad.view(bits).sum()) for grad in self.of[dtype])


@dataclasses.dataclass(frozen=True)
class Times:
    wall_s: float
    cpu_s: float


class Subject:
    """A candidate with weights of its own, and its times by threads and round."""

    def __init__(
        self, candidate: Candidate, source: nn.Module, grads: Grads, threads: Sequence[int]
    ) -> None:
        self.candidate = candidate
        self.times: dict[int, dict[int, Times]] = {count: {} for count in threads}
        model = copy.deepcopy(source).to(candidate.dtype)
        grads.give(model, candidate.dtype)
        watched = next(p for p in model.parameters() if p.dim() == 2)
        before = watched.detach().clone()
        self.optimizer = candidate.make(model)
        warm = []
        for count in threads:
            torch.set_num_threads(count)
            self.optimizer.step()  # makes state; compiles
            warm.append(self._time().wall_s)
        self.warm_s = min(warm)
        moved = float((watched.detach() - before).float().abs().mean()) / (2 * len(threads))
        if candidate is not FLOOR and not 0 < moved < 10 * LR:
            raise RuntimeError(f"weights move by {moved} a step at a learning rate of {LR}")
        if grads.are_changed(candidate.dtype):
            raise RuntimeError("its step changes the gradients")
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.state_bytes = state_bytes(self.optimizer)
        self.memory_bytes = weights + self.state_bytes

    def time_step(self, threads: int, round_: int) -> None:
        self.times[threads][round_] = self._time()

    def _time(self) -> Times:
        time.sleep(REST_S)
        wall, cpu = time.perf_counter(), time.process_time()
        self.optimizer.step()
        return Times(time.perf_counter() - wall, time.process_time() - cpu)

    def row(self, threads: int, num_params: int, reference: "Subject", floor: "Subject") -> dict:
        """Of this candidate with so many threads."""
        own, theirs, least = (s.times[threads] for s in (self, reference, floor))
        alone = self.times.get(1, {}) if threads > 1 else {}
        walls = [times.wall_s for times in own.values()]
        quartiles = statistics.quantiles(walls, n=4, method="inclusive")
        passes = self.candidate.moved / floor.candidate.moved
        speed_ups = [theirs[i].wall_s / own[i].wall_s for i in own]
        speed_up_quartiles = statistics.quantiles(speed_ups, n=4, method="inclusive")
        return {
            "optimizer": self.candidate.name,
            "threads": threads,
            "step_ms": 1e3 * statistics.median(walls),
            "q1_ms": 1e3 * quartiles[0],
            "q3_ms": 1e3 * quartiles[2],
            "cpu_ms": 1e3 * statistics.median(times.cpu_s for times in own.values()),
            "speed_up": statistics.median(speed_ups),
            "speed_up_q1": speed_up_quartiles[0],
            "speed_up_q3": speed_up_quartiles[2],
            "cpu_speed_up": statistics.median(theirs[i].cpu_s / own[i].cpu_s for i in own),
            "moved(B)": self.candidate.moved,
            "to_floor": statistics.median(own[i].wall_s / least[i].wall_s / passes for i in own),
            "cpu_to_floor": statistics.median(own[i].cpu_s / least[i].cpu_s / passes for i in own),
            "state(B)": self.state_bytes / num_params,
            "scaling": (
                statistics.median(alone[i].wall_s / own[i].wall_s for i in own) if alone else "-"
            ),
            "n": len(own),
        }


def state_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state; what tensors share is counted once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(optimizer.state)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # torchao's
        yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, Tensor):
        yield value


# -- all of them ----------------------------------------------------------------------------------


class Bench:
    """Groups of candidates, and their rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(0)
        self.source = Llama(SMALL if args.small else Shape())
        self.grads = Grads(self.source)
        self.num_params = sum(parameter.numel() for parameter in self.source.parameters())
        self.num_tensors = len(list(self.source.parameters()))
        self.order = random.Random(0)
        self.rows: list[dict[str, Any]] = []
        self.not_run: list[dict[str, Any]] = []

    def run(self, candidates: Sequence[Candidate]) -> None:
        """Fill groups up to the memory allowed, and measure each."""
        waiting, num_groups = list(candidates), 0
        while waiting or not num_groups:
            group = [self._subject(REFERENCE), self._subject(FLOOR)]
            while waiting and (len(group) == 2 or self._fits(group)):
                candidate = waiting.pop(0)
                try:
                    group.append(self._subject(candidate))
                except ImportError as error:
                    self._leave_out(candidate, f"not installed: {error}")
                except Exception as error:
                    if candidate.name.startswith("commrt"):
                        raise
                    self._leave_out(candidate, f"does not run: {type(error).__name__}: {error}")
            num_groups += 1
            self._measure(group)
            for row in self._group_rows(group):
                self.rows.append({**row, "group": num_groups})
            del group
            gc.collect()

    def _fits(self, group: list[Subject]) -> bool:
        """Whether one more may join."""
        return sum(subject.memory_bytes for subject in group) < self.args.memory * 2**30

    def _subject(self, candidate: Candidate) -> Subject:
        return Subject(candidate, self.source, self.grads, self.args.threads)

    def _leave_out(self, candidate: Candidate, reason: str) -> None:
        self.not_run.append({"optimizer": candidate.name, "not_run": reason.splitlines()[0]})
        gc.collect()

    def _measure(self, group: list[Subject]) -> None:
        seldom = min(4, self.args.rounds // 2)
        for round_ in range(self.args.rounds):
            is_for_all = round_ % seldom == 0
            turns = [s for s in group if is_for_all or s in group[:2] or s.warm_s < SLOW_S]
            for threads in self.order.sample(self.args.threads, len(self.args.threads)):
                torch.set_num_threads(threads)
                for subject in self.order.sample(turns, len(turns)):
                    subject.time_step(threads, round_)

    def _group_rows(self, group: list[Subject]) -> Iterator[dict[str, Any]]:
        reference, floor = group[:2]
        for threads in self.args.threads:
            for subject in group:
                yield subject.row(threads, self.num_params, reference, floor)


def _installed() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _free_gib() -> float:
    """Memory that others leave."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "MemAvailable" in line) / 2**20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-t", "--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=24, help="at least 4")
    parser.add_argument("--candidates", nargs="+", metavar="TEXT", help="those with it in the name")
    parser.add_argument("--small", action="store_true", help="a model of 0.5 M: to try the bench")
    parser.add_argument(
        "--memory", type=float, help="GiB of weights and state in a group; default: half of free"
    )
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.rounds < 4:
        parser.error(f"--rounds {args.rounds}: must be at least 4")
    args.memory = round(_free_gib() / 2, 1) if args.memory is None else args.memory
    texts = args.candidates or [""]
    bench = Bench(args)
    began = os.getloadavg()
    bench.run([c for c in CANDIDATES if any(text in c.name for text in texts)])
    harness.print_table(COLUMNS, bench.rows)
    for left_out in bench.not_run:
        print(f"# {left_out['optimizer']}: {left_out['not_run']}")
    if args.output:
        config = {
            **{name: value for name, value in vars(args).items() if name != "output"},
            "num_params": bench.num_params,
            "num_tensors": bench.num_tensors,
            "packages": _installed(),
            "load_average": [began, os.getloadavg()],
        }
        harness.save(args.output, config=config, results=[*bench.rows, *bench.not_run])


if __name__ == "__main__":
    main()
