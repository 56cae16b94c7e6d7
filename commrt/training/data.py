"""Text as bytes: where it is read from, how it is split, and how samples are drawn.

Everything is a pure function of its arguments. There is no iterator and hence no iterator state:
the samples of step k are the same in a run that was never stopped and in one resumed at k.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from commrt.errors import ConfigError

_VALIDATION_SHARE = 0.05
_NO_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests"})
_PROBE_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text of a run.

    Attributes:
        train: uint8 (num_bytes,), the training text.
        validation: uint8 (num_bytes,), text that is never trained on.
        source: Where it was read from.
    """

    train: Tensor
    validation: Tensor
    source: Path

    def check(self, seq_len: int) -> None:
        """Makes sure that both parts hold at least one window.

        Raises:
            ConfigError: A part is shorter than ``seq_len + 1`` bytes.
        """
        for name, part in (("training", self.train), ("validation", self.validation)):
            if len(part) <= seq_len:
                raise ConfigError(
                    f"{self.source} gives {len(part)} bytes of {name} text: "
                    f"seq_len {seq_len} needs at least {seq_len + 1}"
                )


def load_corpus(path: Path | None = None) -> Corpus:
    """Reads text and splits it. The split depends on nothing but the text and its file names.

    About 5 % is for validation: of a folder, whole files chosen by a hash of their relative path;
    of a single file, or of a folder with too few files for that, the tail.

    Args:
        path: A file, or a folder of which all text files are read (a file is text if it has no
            zero byte near its start). None for the Python source of the standard library, without
            its tests, since not every distribution ships them.

    Raises:
        ConfigError: The path is no file or folder, cannot be read, or holds no text.
    """
    if path is None:
        library = Path(sysconfig.get_path("stdlib"))
        return _load_folder(library, (p for p in _walk(library, _NO_LIBRARY) if p.suffix == ".py"))
    if path.is_dir():
        return _load_folder(path, _walk(path))
    if not path.is_file():
        raise ConfigError(f"{path} is neither a file nor a folder")
    return _split_tail(path, _read(path))


def train_batch(
    train: Tensor, *, seed: int, step: int, rank: int, batch_size: int, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Draws the training samples of one rank and step.

    Windows start anywhere, uniformly. The draw is counter-based (Philox on seed, step and the
    sequence's global index ``rank * batch_size + i``), so two ranks with batches of 4 train on the
    same sequences as one rank with a batch of 8.

    Returns:
        Inputs and targets, int64 (batch_size, seq_len); targets are inputs moved by one byte.
    """
    words = np.random.Philox(key=seed, counter=[0, step, 0, 0])
    drawn = words.random_raw((rank + 1) * batch_size)[rank * batch_size :]
    starts = torch.from_numpy((drawn % np.uint64(len(train) - seq_len)).astype(np.int64))
    return _windows(train, starts, seq_len)


def validation_batches(
    validation: Tensor,
    *,
    num_windows: int,
    rank: int,
    world_size: int,
    batch_size: int,
    seq_len: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields one rank's part of the validation windows, which are evenly spaced over the text.

    Every rank gets as many batches, the last perhaps empty: sharded models need all ranks.

    Yields:
        Indices of the windows (batch,), inputs and targets, int64 (batch, seq_len).
    """
    last = len(validation) - seq_len - 1
    starts = torch.linspace(0, last, num_windows, dtype=torch.float64).long()
    own = torch.arange(num_windows)[rank::world_size]
    for first in range(0, -(-num_windows // world_size), batch_size):
        indices = own[first : first + batch_size]
        yield indices, *_windows(validation, starts[indices], seq_len)


def _windows(text: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(seq_len + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _walk(folder: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(set(folders) - skipped)
        for name in sorted(files):
            path = Path(root, name)
            if path.is_file():
                yield path


def _load_folder(folder: Path, paths: Iterable[Path]) -> Corpus:
    train, validation = bytearray(), bytearray()
    for path in paths:
        part = validation if _is_validation(path.relative_to(folder).as_posix()) else train
        part += _read(path)
    if not train or not validation:
        return _split_tail(folder, train + validation)
    return Corpus(train=_tensor(train), validation=_tensor(validation), source=folder)


def _is_validation(relative_path: str) -> bool:
    digest = hashlib.blake2b(os.fsencode(relative_path), digest_size=8).digest()
    return int.from_bytes(digest, "big") < _VALIDATION_SHARE * 2**64


def _split_tail(source: Path, text: bytearray) -> Corpus:
    if not text:
        raise ConfigError(f"{source} holds no text: all is empty or binary")
    cut = len(text) - int(len(text) * _VALIDATION_SHARE)
    whole = _tensor(text)
    return Corpus(train=whole[:cut], validation=whole[cut:], source=source)


def _read(path: Path) -> bytearray:
    """Returns the bytes of a text file, none of a binary one."""
    try:
        text = bytearray(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return bytearray() if b"\0" in text[:_PROBE_BYTES] else text


def _tensor(text: bytearray) -> Tensor:
    return torch.frombuffer(text, dtype=torch.uint8)
