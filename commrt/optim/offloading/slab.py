"""Host memory for state, or a file: one piece, so that what lies together is copied together."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from commrt.collectives import order
from commrt.errors import OffloadError
from commrt.optim.offloading.link import Copy, FileRange, copy

_ALIGN = 64


def aligned(offset: int) -> int:
    """The next offset at which a tensor may begin."""
    return -(-offset // _ALIGN) * _ALIGN


class Slab:
    """Bytes that tensors are cut from, one after the other, and never given back.

    Args:
        num_bytes: In all; see :meth:`bytes_for`.
        device: Whose link its contents cross: where that is real, the memory is pinned.
        folder: Keep it in a file there, without a name, instead of in memory.

    Attributes:
        memory: All bytes; of a file, mapped.
        is_file: Whether it is one.

    Raises:
        OffloadError: There is not as much memory, or room on the disk.
    """

    def __init__(self, num_bytes: int, device: torch.device, folder: Path | None = None) -> None:
        self._file = -1 if folder is None else _make_file(folder, num_bytes)
        self.memory = (
            _allocate(num_bytes, device) if folder is None else _map(self._file, num_bytes)
        )
        self._used = 0
        self._close = weakref.finalize(self, os.close, self._file) if self.is_file else None

    @property
    def is_file(self) -> bool:
        """Whether it is one."""
        return self._file >= 0

    def between(self, begin: int, end: int) -> Tensor | FileRange:
        """Some of its bytes, to copy."""
        return FileRange(self._file, begin, end) if self.is_file else self.memory[begin:end]

    def leave_the_file(self) -> None:
        """Keep all in memory from now on; the file has failed.

        Raises:
            OffloadError: There is not as much.
        """
        mapped = self.memory
        self.memory = _allocate(mapped.numel(), torch.device("cpu"))
        copy([Copy(self.memory, FileRange(self._file, 0, mapped.numel()))])
        assert self._close is not None
        self._close()
        self._file, self._used = -1, 0

    @staticmethod
    def bytes_for(tensors: Sequence[Tensor]) -> int:
        """How many these tensors take."""
        return sum(aligned(tensor.nbytes) for tensor in tensors)

    def cut(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor, whose storage begins with it: a copy of it is not one of all."""
        num_bytes = math.prod(shape) * dtype.itemsize
        part = self.memory.numpy()[self._used : self._used + num_bytes]
        self._used += aligned(num_bytes)
        assert self._used <= self.memory.numel()
        return torch.from_numpy(part).view(dtype).view(tuple(shape))

    def range_of(self, tensor: Tensor) -> tuple[int, int] | None:
        """Where a contiguous tensor begins and ends in it, if it is in it."""
        begin = tensor.data_ptr() - self.memory.data_ptr()
        end = begin + tensor.nbytes
        return (begin, end) if 0 <= begin < end <= self.memory.numel() else None


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    free = _available()
    if free is not None and num_bytes > free:  # the system would kill the process later
        raise OffloadError(
            f"offloading needs {_size(num_bytes)} of host memory, and {_size(free)} are free"
        )
    try:
        return torch.zeros(
            num_bytes, dtype=torch.uint8, device="cpu", pin_memory=order.is_queued(device)
        )
    except RuntimeError as error:
        raise OffloadError(f"no {_size(num_bytes)} of host memory: {error}") from error


def _make_file(folder: Path, num_bytes: int) -> int:
    """A file with all its room, gone when it is closed."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
            return os.dup(file.fileno())
    except OSError as error:
        raise OffloadError(f"no {_size(num_bytes)} for state in {folder}: {error}") from error


def _map(file: int, num_bytes: int) -> Tensor:
    mapped = mmap.mmap(file, max(1, num_bytes))
    return torch.frombuffer(mapped, dtype=torch.uint8)[:num_bytes]


def _available() -> int | None:
    """Bytes that can be had without swapping, where Linux says so."""
    try:
        with open("/proc/meminfo") as lines:
            sizes = dict(line.split(":", 1) for line in lines)
    except OSError:
        return None
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
