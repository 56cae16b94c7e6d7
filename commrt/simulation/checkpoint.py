"""A run's checkpoint: a file that is there whole or not at all, and files of clients that it names.

Each rank writes what its clients remember to a file with a number that no file there has yet. Once
all are on disk, the first rank replaces the checkpoint by one that names them, and removes the
others. So whenever a process is killed, the folder has all of the old checkpoint or of the new one.
"""

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from commrt.errors import StateError
from commrt.federated.store import UNREADABLE, State, read_state, skip_state, write_state

NAME = "checkpoint.pt"
_FILES = "{kind}-{number}-{rank}.states"
_CLIENT = struct.Struct("<q")


def write(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint of a folder, all of whose files of clients are there."""
    replace(folder / NAME, state)


def replace(path: Path, value: Any) -> None:
    """Write a file of torch in the place of another one: whole, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(value, file)
        _flush(file)
    _sync(path.parent)
    partial.replace(path)
    _sync(path.parent)


def read(folder: Path) -> dict[str, Any]:
    """The checkpoint of a folder; tensors are mapped, so what nobody looks at takes no memory.

    Raises:
        StateError: There is none, or it is damaged, or it is something else.

    Cost: reads the file once for its checks.
    """
    path = folder / NAME
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with zipfile.ZipFile(path) as file:
            changed = file.testzip()  # torch does not look at the checks that it writes
    except FileNotFoundError as error:
        raise StateError(f"no checkpoint at {path}") from error
    except (RuntimeError, EOFError, UnpicklingError, zipfile.BadZipFile) as error:
        raise StateError(f"{path} is damaged: {error}") from error
    if changed is not None:
        raise StateError(f"{path} is damaged: {changed} in it has changed")
    if not isinstance(state, dict) or "config" not in state:
        raise StateError(f"{path} is no checkpoint of such a run")
    return state


def new_number(folder: Path) -> int:
    """One above those of all files of clients that the folder, which is made, has."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name.split("-")[-2]) for path in _files_of_clients(folder)]
    return max(numbers, default=0) + 1


def pack(state: State) -> bytes:
    """A state, to be sent to another rank."""
    buffer = io.BytesIO()
    write_state(buffer, state)
    return buffer.getvalue()


def unpack(data: bytes) -> State:
    """What :func:`pack` was given; nothing in it is executed."""
    return read_state(io.BytesIO(data))


def write_clients(
    folder: Path, kind: str, number: int, rank: int, states: Mapping[int, State]
) -> tuple[str, int]:
    """Write what a rank keeps of clients, one after the other.

    Args:
        folder: The checkpoint's.
        kind: What of them; a word.
        number: See :func:`new_number`.
        rank: Whose.
        states: By client.

    Returns:
        The name of the file, and its bytes.
    """
    path = folder / _FILES.format(kind=kind, number=number, rank=rank)
    with path.open("wb") as file:
        for client in states:
            file.write(_CLIENT.pack(client))
            write_state(file, states[client])
        _flush(file)
        return path.name, file.tell()


def read_clients(
    folder: Path, kind: str, sizes: Mapping[str, int], is_own: Callable[[int], bool]
) -> Iterator[tuple[int, State]]:
    """Clients and what was kept of them, one after the other, of a checkpoint's files.

    Args:
        folder: The checkpoint's.
        kind: Of the files.
        sizes: Of the files, by name.
        is_own: Whose states to read.

    Raises:
        StateError: A file is not there, or damaged.
    """
    for name, size in sizes.items():
        if not name.startswith(f"{kind}-"):
            continue
        path = folder / name
        try:
            with path.open("rb") as file:
                if path.stat().st_size != size:
                    raise ValueError(f"{path.stat().st_size} bytes of {size}")
                while file.tell() < size:
                    (client,) = _CLIENT.unpack(file.read(_CLIENT.size))
                    if is_own(client):
                        yield client, read_state(file)
                    else:
                        skip_state(file)
        except UNREADABLE as error:
            raise StateError(f"{path} is damaged: {error}") from error


def remove(folder: Path) -> None:
    """Remove the checkpoint of a folder, if there is one."""
    (folder / NAME).unlink(missing_ok=True)
    remove_others(folder, {})


def remove_others(folder: Path, names: Mapping[str, int]) -> None:
    """Remove the files of clients that have other names: no checkpoint has them."""
    for path in _files_of_clients(folder):
        if path.name not in names:
            path.unlink()


def _files_of_clients(folder: Path) -> list[Path]:
    return list(folder.glob(_FILES.format(kind="*", number="[0-9]*", rank="[0-9]*")))


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Let the names of its files be on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
