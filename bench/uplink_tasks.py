"""Real tasks for `bench.uplink`: models, data split over clients, local training, the closed loop.

    digits-mlp   scikit-learn's 8x8 digits, 1,437 to train and 360 to test; 64-128-64-10, 17,226
                 weights
    digits-cnn   the same; two convolutions and a linear layer, 6,090 weights
    text         packages of the standard library; a byte-level GPT of 2 blocks and width 64,
                 120,576 weights

Splits: iid; dirichlet0.5 and the like, every digit shared out by a Dirichlet draw; natural, a
package a client. What is drawn depends on seed, round and client alone: all codecs see the same.
"""

import dataclasses
import functools
import re
import statistics
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from bench.uplink_round import Cohort
from commrt.codecs import derive_seed
from commrt.errors import ConfigError
from commrt.federated import Layout
from commrt.training.config import ModelConfig
from commrt.training.data import Corpus, load_corpus, train_batch, validation_batches
from commrt.training.model import GPT

NUM_CLIENTS = 16
NUM_TEST = 360
PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib"),
    *("json", "logging", "multiprocessing", "re", "unittest", "urllib", "xml", "xmlrpc"),
)
SEQ_LEN = 64
PAGE = 1024  # bytes of text that go to one client of an iid split
VALIDATION_WINDOWS = 256
WARM_LR = 3e-3
CURVE_POINTS = 10

Batch = tuple[Tensor, Tensor, Tensor]
"""Of all clients, a step: inputs and targets (K, B, ...), and the share (K, B) that each example
has of its client's loss: 0 for those that fill up a batch which has fewer."""


class Data(Protocol):
    """What the clients train on."""

    @property
    def sizes(self) -> Sequence[int]:
        """Of the clients, their weights in the mean."""

    def batches(self, seeds: Sequence[int]) -> Iterator[Batch]:
        """Of a round of local training, drawn by the clients' seeds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model to train, on data that are split over clients.

    Attributes:
        module: Initialised.
        data: Of the clients.
        validation: Inputs and targets.
        measure: Of logits and targets; what is plotted.
        is_loss: Whether less of it is better.
        lr: Of local SGD.
        clip: Largest norm of a gradient.
    """

    module: nn.Module
    data: Data
    validation: tuple[Tensor, Tensor]
    measure: Callable[[Tensor, Tensor], Tensor]
    is_loss: bool
    lr: float
    clip: float = 5.0

    @functools.cached_property
    def layout(self) -> Layout:
        """Of the model's weights."""
        return Layout.of(dict(self.module.named_parameters()))

    def start(self) -> Tensor:
        """The weights before training, flat."""
        return self.layout.flatten(dict(self.module.named_parameters()))

    def updates(self, weights_N: Tensor, seeds: Sequence[int]) -> Tensor:
        """What the clients' local training adds to the weights, (K, N); all clients at once."""
        now_KN = weights_N.expand(len(self.data.sizes), -1)
        gradients = vmap(grad(self._loss))
        for batch in self.data.batches(seeds):
            with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused ones
                grad_KN = gradients(now_KN, *batch)
            norm_K = grad_KN.norm(dim=1, keepdim=True)
            now_KN = now_KN - self.lr * grad_KN * (self.clip / norm_K.clamp(min=self.clip))
        return now_KN - weights_N

    @torch.no_grad()
    def evaluate(self, weights_N: Tensor) -> float:
        """The measure on validation data."""
        inputs, targets = self.validation
        return self.measure(self._logits(weights_N, inputs), targets).item()

    def _logits(self, weights_N: Tensor, inputs: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.module, self.layout.split(weights_N), (inputs,))
        return logits

    def _loss(self, weights_N: Tensor, inputs: Tensor, targets: Tensor, share_B: Tensor) -> Tensor:
        losses = _cross_entropy(self._logits(weights_N, inputs), targets, "none")
        return (losses.view(len(share_B), -1).mean(1) * share_B).sum()


def train(task: Task, spec: str, *, rounds: int, seed: int) -> dict[str, Any]:
    """Train in a closed loop: the model gets what the server decodes. A row of figures."""
    sizes = task.data.sizes
    cohort, weights = Cohort(spec, task.layout, sizes, seed), task.start()
    outcomes, measures = [], []
    for index in range(rounds):
        seeds = [derive_seed("bench.uplink", seed, index, k) for k in range(len(sizes))]
        updates = task.updates(weights, seeds)
        outcomes.append(cohort.round(index, list(updates)))
        weights = weights + outcomes[-1].mean
        measures.append(task.evaluate(weights))

    def mean(name: str) -> float:
        return statistics.fmean(getattr(outcome, name) for outcome in outcomes)

    per_bit = task.layout.numel * len(sizes) / 8
    sent = np.cumsum([outcome.bits * per_bit for outcome in outcomes])
    points = np.linspace(0, rounds - 1, min(rounds, CURVE_POINTS)).round().astype(int)
    return {
        "bits": mean("bits"),
        "answers": mean("answer_bits"),
        "down": mean("down_bits"),
        "quarter": measures[rounds // 4 - 1],
        "half": measures[rounds // 2 - 1],
        "final": sum(measures[-3:]) / len(measures[-3:]),
        "distortion": mean("distortion"),
        "alignment": mean("alignment"),
        "enc_ms": 1e3 * mean("encode_s"),
        "dec_ms": 1e3 * mean("decode_s"),
        "is_loss": task.is_loss,
        "curve": [(round(sent[i]), measures[i]) for i in points],
    }


# -- digits ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Labelled pictures and those of each client; a round is an epoch."""

    inputs: Tensor
    targets: Tensor
    parts: Sequence[Tensor]
    batch_size: int = 16

    @property
    def sizes(self) -> Sequence[int]:
        return [len(part) for part in self.parts]

    def batches(self, seeds: Sequence[int]) -> Iterator[Batch]:
        orders = [
            part[torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))]
            for part, seed in zip(self.parts, seeds, strict=True)
        ]
        for begin in range(0, max(self.sizes), self.batch_size):
            chosen = [order[begin : begin + self.batch_size] for order in orders]
            counts = torch.tensor([len(some) for some in chosen])[:, None]
            index_KB = pad_sequence(chosen, batch_first=True)
            is_own_KB = torch.arange(index_KB.shape[1]) < counts
            yield self.inputs[index_KB], self.targets[index_KB], is_own_KB / counts.clamp(min=1)


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def digits(make: Callable[[], nn.Module], split: str, seed: int) -> Task:
    """scikit-learn's digits."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install -c constraints.txt -e '.[bench]'"
        ) from error
    inputs, targets = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    draw = np.random.default_rng(seed)
    order = torch.from_numpy(draw.permutation(len(targets)))
    inputs, targets = (inputs[order] / 16).float().view(-1, 1, 8, 8), targets[order]
    parts = _share_out(targets[:-NUM_TEST].numpy(), split, draw)
    torch.manual_seed(seed)
    return Task(
        module=make(),
        data=Pictures(inputs, targets, parts),
        validation=(inputs[-NUM_TEST:], targets[-NUM_TEST:]),
        measure=_accuracy,
        is_loss=False,
        lr=0.1,
    )


def _share_out(labels: Any, split: str, draw: np.random.Generator) -> list[Tensor]:
    """Indices of each client's examples; all have one at least."""
    if split == "iid":
        return [torch.from_numpy(p) for p in np.array_split(np.arange(len(labels)), NUM_CLIENTS)]
    concentration = float(split.removeprefix("dirichlet"))
    parts: list[list[int]] = [[] for _ in range(NUM_CLIENTS)]
    for label in range(10):
        found = np.flatnonzero(labels == label)
        shares = draw.dirichlet([concentration] * NUM_CLIENTS)
        cuts = (np.cumsum(shares) * len(found)).astype(int)[:-1]
        for part, some in zip(parts, np.split(found, cuts), strict=True):
            part += some.tolist()
    return [torch.tensor(part or [0]) for part in parts]


# -- text -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Texts:
    """Bytes of each client; a round is some windows that begin anywhere."""

    texts: Sequence[Tensor]
    num_steps: int
    batch_size: int

    @property
    def sizes(self) -> Sequence[int]:
        return [len(text) for text in self.texts]

    def batches(self, seeds: Sequence[int]) -> Iterator[Batch]:
        share_KB = torch.full((len(seeds), self.batch_size), 1 / self.batch_size)
        for step in range(self.num_steps):
            drawn = [
                train_batch(
                    text, seed=seed, step=step, rank=0, batch_size=self.batch_size, seq_len=SEQ_LEN
                )
                for text, seed in zip(self.texts, seeds, strict=True)
            ]
            inputs, targets = (torch.stack(each) for each in zip(*drawn, strict=True))
            yield inputs, targets, share_KB


def text(
    split: str,
    seed: int,
    *,
    lr: float = 0.1,
    num_steps: int = 2,
    batch_size: int = 2,
    warm_steps: int = 100,
) -> Task:
    """A byte-level GPT on the standard library, which it has seen a little of."""
    texts = [corpus.train for corpus in _packages()]
    if split == "iid":
        pages = torch.cat(texts).split(PAGE)
        order = np.random.default_rng(seed).permutation(len(pages))
        texts = [
            torch.cat([pages[page] for page in order[k::NUM_CLIENTS]]) for k in range(NUM_CLIENTS)
        ]
    return Task(
        module=_warm(seed, warm_steps),
        data=Texts(texts, num_steps, batch_size),
        validation=_validation(),
        measure=_cross_entropy,
        is_loss=True,
        lr=lr,
    )


@functools.cache
def _warm(seed: int, num_steps: int) -> nn.Module:
    """The model after some steps in one place: from scratch, SGD would only learn frequencies."""
    torch.manual_seed(seed)
    module = GPT(ModelConfig(dim=64, num_layers=2, num_heads=4, seq_len=SEQ_LEN))
    everything = torch.cat([corpus.train for corpus in _packages()])
    optimizer = torch.optim.AdamW(module.parameters(), lr=WARM_LR)
    for step in range(num_steps):
        inputs, targets = train_batch(
            everything, seed=seed, step=step, rank=0, batch_size=8, seq_len=SEQ_LEN
        )
        optimizer.zero_grad()
        _cross_entropy(module(inputs), targets).backward()
        optimizer.step()
    return module


@functools.cache
def _packages() -> tuple[Corpus, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    return tuple(load_corpus(library / package) for package in PACKAGES)


@functools.cache
def _validation() -> tuple[Tensor, Tensor]:
    ((_, inputs, targets),) = validation_batches(
        torch.cat([corpus.validation for corpus in _packages()]),
        num_windows=VALIDATION_WINDOWS, rank=0, world_size=1,
        batch_size=VALIDATION_WINDOWS, seq_len=SEQ_LEN,
    )  # fmt: skip
    return inputs, targets


# -- both -----------------------------------------------------------------------------------------


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def _accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) == targets).float().mean()


TASKS: dict[str, tuple[Callable[[str, int], Task], str]] = {
    "digits-mlp": (functools.partial(digits, mlp), "iid|dirichlet[0-9.]+"),
    "digits-cnn": (functools.partial(digits, cnn), "iid|dirichlet[0-9.]+"),
    "text": (text, "iid|natural"),
}
"""By name: what makes the task of a split and a seed, and the splits that it has."""


def has_split(name: str, split: str) -> bool:
    """Whether a task can be split so.

    Raises:
        ConfigError: There is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"task {name!r}: must be one of {', '.join(TASKS)}")
    return re.fullmatch(TASKS[name][1], split) is not None
