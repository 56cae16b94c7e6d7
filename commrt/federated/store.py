"""What clients remember: in memory up to a limit, beyond it in files."""

import contextlib
import fcntl
import glob
import io
import math
import mmap
import os
import platform
import shutil
import struct
import tempfile
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from commrt.errors import ConfigError, StateError

State = dict[str, Any]
_HEAD = struct.Struct("<QI")  # bytes that follow, and their CRC-32
_LARGE_BYTES = 1 << 20
_PLAIN_BYTES = 32  # of a number and of what holds it, about
# Of folders of this machine, whose locks it knows.
_PREFIX = f"commrt-states-{platform.node()}-"
UNREADABLE = (OSError, struct.error, RuntimeError, EOFError, UnpicklingError, ValueError)


class StateStore(MutableMapping[int, State]):
    """State dicts by client, of which only so much is in memory.

    Beyond the limit those used least recently go to files, one a client, in a folder of their own,
    which goes when the store does. What is read from a file stays there: who reads a state
    mostly replaces it. Tensors come back to the bit. A state that cannot be written stays in
    memory, so none is ever lost.

    A state belongs to the store once it is in it: nobody may write to its tensors.

    Args:
        limit_bytes: Of the states in memory, at least 0.
        folder: Where the folder is made; default, where temporary files go, which on some machines
            is memory, too. What a process that was killed has left there, the next one on the
            machine that needs a folder removes.

    Raises:
        ConfigError: A limit below 0.
        StateError: From any method, for a file that cannot be written or read; names it.
    """

    def __init__(self, limit_bytes: float = math.inf, folder: Path | None = None) -> None:
        if not limit_bytes >= 0:
            raise ConfigError(f"limit_bytes is {limit_bytes}: must be at least 0")
        self._limit, self._parent = limit_bytes, folder
        self._memory = OrderedDict[int, State]()
        self._sizes = dict[int, int]()
        self._files = dict[int, Path]()
        self._folder: Path | None = None
        self.memory_bytes = 0

    def __getitem__(self, client: int) -> State:
        if client in self._memory:
            self._memory.move_to_end(client)
            return self._memory[client]
        path = self._files[client]
        try:
            with path.open("rb") as file:
                return read_state(file)
        except UNREADABLE as error:
            raise StateError(
                f"{path}, state of client {client}, cannot be read: {error}"
            ) from error

    def __setitem__(self, client: int, state: Mapping[str, Any]) -> None:
        self._forget(client)
        self._memory[client] = {name: _apart(value) for name, value in state.items()}
        self._sizes[client] = _size_of(self._memory[client])
        self.memory_bytes += self._sizes[client]
        while self.memory_bytes > self._limit:
            self._move_to_file(next(iter(self._memory)))

    def __delitem__(self, client: int) -> None:
        if client not in self:
            raise KeyError(client)
        self._forget(client)

    def __contains__(self, client: object) -> bool:
        return client in self._memory or client in self._files

    def __iter__(self) -> Iterator[int]:
        return iter([*self._memory, *self._files])

    def __len__(self) -> int:
        return len(self._memory) + len(self._files)

    def clear(self) -> None:
        """Forget all, and read nothing for it."""
        for client in list(self):
            self._forget(client)

    @property
    def num_files(self) -> int:
        """States that are in files."""
        return len(self._files)

    def _forget(self, client: int) -> None:
        if self._memory.pop(client, None) is not None:
            self.memory_bytes -= self._sizes.pop(client)
        if (path := self._files.pop(client, None)) is not None:
            with contextlib.suppress(OSError):  # it goes with the folder, or is written over
                path.unlink()

    def _move_to_file(self, client: int) -> None:
        path = self._own_folder() / str(client)
        try:
            with path.open("wb") as file:
                write_state(file, self._memory[client])
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise StateError(
                f"{path}, state of client {client}, cannot be written: {error}"
            ) from error
        del self._memory[client]
        self.memory_bytes -= self._sizes.pop(client)
        self._files[client] = path

    def _own_folder(self) -> Path:
        if self._folder is None:
            parent = Path(tempfile.gettempdir()) if self._parent is None else self._parent
            _remove_orphans(parent)
            try:
                self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            except OSError as error:
                raise StateError(f"no folder for states in {parent}: {error}") from error
            weakref.finalize(self, _remove, self._folder, _lock(self._folder, fcntl.LOCK_EX))
        return self._folder


def write_state(file: BinaryIO, state: State) -> None:
    """Append a state, with its length and a check.

    Cost: a copy of it in memory, for as long as this takes.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    file.write(_HEAD.pack(len(data), zlib.crc32(data)))
    file.write(data)


def read_state(file: BinaryIO) -> State:
    """The state that begins here; nothing in it is executed.

    Raises:
        ValueError: It has another check, or is cut off.
        OSError: Or any other of reading.
    """
    size, check = _read_head(file)
    data = file.read(size)
    if len(data) < size or zlib.crc32(data) != check:
        raise ValueError(f"damaged: {len(data)} of {size} bytes, or some of them changed")
    state: State = torch.load(io.BytesIO(data), weights_only=True)
    return state


def skip_state(file: BinaryIO) -> None:
    """Go past the state that begins here."""
    size, _ = _read_head(file)
    file.seek(size, io.SEEK_CUR)


def _read_head(file: BinaryIO) -> tuple[int, int]:
    size, check = _HEAD.unpack(file.read(_HEAD.size))
    return size, check


def _lock(folder: Path, how: int) -> int | None:
    """What holds a folder until it is closed, or the process ends; None where nothing can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, how)
        except OSError:
            os.close(descriptor)
        else:
            return descriptor
    return None


def _remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _remove_orphans(parent: Path) -> None:
    """The folders of this machine that nobody holds any more."""
    for folder in parent.glob(f"{glob.escape(_PREFIX)}*"):
        lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            continue
        # One that is empty may be new, and not held yet.
        if os.listdir(lock):
            _remove(folder, lock)
        else:
            os.close(lock)


def _apart(value: Any) -> Any:
    """A large tensor in pages of its own.

    Among temporary ones on the heap it would leave holes, nearly as large, that nothing fits.
    """
    if not isinstance(value, Tensor) or value.nbytes < _LARGE_BYTES:
        return value
    pages = mmap.mmap(-1, value.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=value.dtype).view(value.shape).copy_(value)


def _size_of(value: Any) -> int:
    """What it takes in memory, about; of tensors, all that they keep alive."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size_of(each) for each in value.values())
    if isinstance(value, list | tuple):
        return sum(map(_size_of, value))
    return _PLAIN_BYTES
