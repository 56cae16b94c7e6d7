"""Data sets that are split over clients, and the models that are trained on them.

digits-mlp   scikit-learn's 8x8 digits, 1,437 to train and 360 to test; 64-128-64-10, 17,226
             weights
digits-cnn   the same; two convolutions and a linear layer, 6,090 weights
text         windows of the standard library's source, grouped by package; a byte-level GPT of 2
             blocks and width 64, 120,576 weights
text-files   the same, grouped by file
PATH.npz     arrays of yours, with a model of yours
"""

import dataclasses
import functools
import importlib
import importlib.util
import sysconfig
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from commrt.errors import ConfigError
from commrt.training.config import ModelConfig
from commrt.training.data import load_corpus, validation_batches
from commrt.training.model import GPT

PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib"),
    *("json", "logging", "multiprocessing", "re", "unittest", "urllib", "xml", "xmlrpc"),
)
SEQ_LEN = 64
NUM_TEST_DIGITS = 360
_DIGITS_FILE = "data/digits.csv.gz"
NUM_TEST_WINDOWS = 256
TEST_SHARE = 0.2  # of arrays that come without examples to test on


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Examples, and the model that is trained on them.

    Attributes:
        name: What it was loaded as.
        inputs: To train on, fp32 or int64 (n, ...).
        targets: int64 or fp32 (n, ...).
        labels: What a partition goes by, (n,); None where examples have no label.
        groups: An example's origin, (n,); None where it has none.
        test_inputs: Never trained on.
        test_targets: Of these.
        metric: ``"accuracy"`` or ``"loss"``, what is measured on them.
        model: Initialised by a seed.
        loss: Of outputs and targets, the losses (B,) of B examples.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    labels: NDArray[Any] | None
    groups: NDArray[Any] | None
    test_inputs: Tensor
    test_targets: Tensor
    metric: str
    model: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> "Dataset":
        """The same, with its examples on a device."""
        return dataclasses.replace(
            self,
            inputs=self.inputs.to(device), targets=self.targets.to(device),
            test_inputs=self.test_inputs.to(device), test_targets=self.test_targets.to(device),
        )  # fmt: skip


def load(name: str, *, seed: int = 0, model: str | None = None) -> Dataset:
    """A data set by name.

    Args:
        name: ``digits-mlp``, ``digits-cnn``, ``text``, ``text-files``, or the path of an ``.npz``
            file with arrays ``inputs`` and ``targets``, and perhaps ``groups``, ``test_inputs``,
            ``test_targets``. Targets that are whole numbers are classes (cross-entropy), others
            values (squared error). Without arrays to test on a fifth is held out.
        seed: Of what is held out to test on.
        model: ``package.module:function`` for an ``.npz`` file; it returns a ``torch.nn.Module``
            and may draw from torch's global generator, which is seeded.

    Raises:
        ConfigError: An unknown name, a file or model that cannot be had, arrays that do not fit;
            or the digits, without scikit-learn.
    """
    if name.endswith(".npz"):
        return _arrays(Path(name), model, seed)
    if name not in _BUILT_IN:
        raise ConfigError(f"data={name!r}: must be {', '.join(_BUILT_IN)} or the path of an .npz")
    if model is not None:
        raise ConfigError(f"model={model!r}: {name} has a model; only an .npz file needs one")
    return _BUILT_IN[name](name, seed)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits (B, ..., C) and classes (B, ...), an example's mean in nats: (B,)."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).mean(1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of outputs and targets (B, ...), an example's mean: (B,)."""
    return (outputs.reshape(targets.shape) - targets).square().view(len(targets), -1).mean(1)


def seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """What draws a model's weights from a seed, and leaves torch's global generator as it was."""

    def model(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    return model


# -- digits ----------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """64-128-64-10, for 8x8 pictures."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def cnn() -> nn.Module:
    """Two convolutions and a linear layer, for 8x8 pictures."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def _digits(make: Callable[[], nn.Module], name: str, seed: int) -> Dataset:
    # Importing scikit-learn takes longer than a short training, and no more of it is needed.
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ConfigError(f"{name} comes with scikit-learn: pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).with_name("datasets") / _DIGITS_FILE, delimiter=",")
    inputs, targets = torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(targets)))
    inputs, targets = (inputs[order] / 16).float().view(-1, 1, 8, 8), targets[order].long()
    cut = len(targets) - NUM_TEST_DIGITS
    return Dataset(
        name=name,
        inputs=inputs[:cut], targets=targets[:cut], labels=targets[:cut].numpy(), groups=None,
        test_inputs=inputs[cut:], test_targets=targets[cut:],
        metric="accuracy", model=seeded(make), loss=cross_entropy,
    )  # fmt: skip


# -- text ------------------------------------------------------------------------------------------


def gpt() -> nn.Module:
    """A byte-level GPT of 2 blocks and width 64."""
    return GPT(ModelConfig(dim=64, num_layers=2, num_heads=4, seq_len=SEQ_LEN))


def _text(by_file: bool, name: str, seed: int) -> Dataset:
    """Windows that do not overlap. What is tested on is other text, the same for every seed."""
    del seed
    library = Path(sysconfig.get_path("stdlib"))
    sources: Iterable[Path] = [library / package for package in PACKAGES]
    if by_file:
        found = [path for package in sources for path in sorted(package.rglob("*.py"))]
        sources = [path for path in found if path.stat().st_size > 2 * SEQ_LEN]
    corpora = [load_corpus(source) for source in sources]
    windows = [_windows(corpus.train) for corpus in corpora]
    groups = np.repeat(np.arange(len(windows)), [len(some) for some in windows])
    ((_, test_inputs, test_targets),) = validation_batches(
        torch.cat([corpus.validation for corpus in corpora]),
        num_windows=NUM_TEST_WINDOWS, rank=0, world_size=1,
        batch_size=NUM_TEST_WINDOWS, seq_len=SEQ_LEN,
    )  # fmt: skip
    tokens = torch.cat(windows).long()
    return Dataset(
        name=name,
        inputs=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(),
        labels=None, groups=groups, test_inputs=test_inputs, test_targets=test_targets,
        metric="loss", model=seeded(gpt), loss=cross_entropy,
    )  # fmt: skip


def _windows(text: Tensor) -> Tensor:
    """Inputs and targets in one: (n, SEQ_LEN + 1), the last byte of one is the next one's first."""
    if len(text) <= SEQ_LEN:
        return text.new_empty(0, SEQ_LEN + 1)
    return text.unfold(0, SEQ_LEN + 1, SEQ_LEN)


# -- arrays ----------------------------------------------------------------------------------------


def _arrays(path: Path, model: str | None, seed: int) -> Dataset:
    arrays = _read(path)
    inputs, targets = _tensor(arrays["inputs"]), _tensor(arrays["targets"])
    groups = arrays.get("groups")
    if "test_inputs" in arrays:
        train = torch.arange(len(inputs))
        test_inputs, test_targets = _tensor(arrays["test_inputs"]), _tensor(arrays["test_targets"])
    else:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
        train, test = order.split([len(inputs) - (held := int(TEST_SHARE * len(inputs))), held])
        train = train.sort().values
        test_inputs, test_targets = inputs[test], targets[test]
    if not len(train) or not len(test_inputs):
        raise ConfigError(f"{path} has {len(inputs)} examples: too few to train and to test on")
    targets = targets[train]
    is_class = targets.dtype == torch.int64
    return Dataset(
        name=str(path),
        inputs=inputs[train], targets=targets,
        labels=targets.numpy() if is_class and targets.dim() == 1 else None,
        groups=None if groups is None else groups[train.numpy()],
        test_inputs=test_inputs, test_targets=test_targets,
        metric="accuracy" if is_class and targets.dim() == 1 else "loss",
        model=seeded(_function(path, model)), loss=cross_entropy if is_class else squared_error,
    )  # fmt: skip


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays: of numbers but for groups; those that belong together have the same length."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.atleast_1d(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"data={str(path)!r} cannot be read: {error}") from error
    for names in (("inputs", "targets", "groups"), ("test_inputs", "test_targets")):
        sizes = {name: len(arrays[name]) for name in names if name in arrays}
        if (names[0] == "inputs" or sizes) and (
            not set(names[:2]) <= sizes.keys() or len(set(sizes.values())) > 1
        ):
            raise ConfigError(f"{path} has {sizes}: must have {names[0]} and {names[1]}, as many")
        for name in names[:2]:
            if name in arrays and arrays[name].dtype.kind not in "biuf":
                raise ConfigError(f"{path}: {name} is of {arrays[name].dtype}: must be numbers")
    return arrays


def _tensor(array: NDArray[Any]) -> Tensor:
    """Whole numbers as int64, others as fp32."""
    whole = np.issubdtype(array.dtype, np.integer)
    return torch.from_numpy(np.ascontiguousarray(array, np.int64 if whole else np.float32))


def _function(path: Path, name: str | None) -> Callable[[], nn.Module]:
    if name is None or ":" not in name:
        raise ConfigError(f"model={name!r}: {path} needs a model, package.module:function")
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"model={name!r} cannot be had: {error}") from error
    if not callable(make):
        raise ConfigError(f"model={name!r} is no function")
    found: Callable[[], nn.Module] = make
    return found


_BUILT_IN: dict[str, Callable[[str, int], Dataset]] = {
    "digits-mlp": functools.partial(_digits, mlp),
    "digits-cnn": functools.partial(_digits, cnn),
    "text": functools.partial(_text, False),
    "text-files": functools.partial(_text, True),
}
