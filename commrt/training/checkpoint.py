"""Checkpoints: folders ``step_0000500`` that are either whole or refused.

``model.pt`` holds what all ranks share (weights, optimizer, step, configuration), ``comm_R.pt``
what rank R alone has (its residuals). Beside each stands its SHA-256, as ``sha256sum`` writes it:
``sha256sum -c *.sha256`` checks a folder. No random state is kept, since there is none: samples are
drawn by step, and nothing else is random after the start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from commrt.collectives import gather_texts
from commrt.errors import StateError

_SHARED = "model.pt"
_SUM = ".sha256"
_NUM_KEPT = 2

# Folders that are no checkpoints any more or not yet. The next save clears them away.
_PARTIAL = ".partial"
_REMOVED = ".removed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read and found whole.

    Attributes:
        folder: Where it is.
        shared: What its ranks shared, with the keys "step" and "world_size".
        states: Of this rank alone if a world like this one wrote it, else of all its ranks, in
            rank order.
        is_own: Whether it is of this rank alone.
    """

    folder: Path
    shared: dict[str, Any]
    states: list[dict[str, Any]]
    is_own: bool

    @property
    def step(self) -> int:
        """Finished steps."""
        return int(self.shared["step"])

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return int(self.shared["world_size"])


def save(out: Path, *, step: int, shared: dict[str, Any], own: dict[str, Any]) -> Path:
    """Writes a checkpoint and removes all but it and the one before it.

    It is written under a temporary name and renamed once every rank's files are on the disk; only
    then older ones go. So a job that dies on the way leaves at least one whole checkpoint, if there
    was one: a run has nothing of the same step, but for what it saved after an older one.

    Args:
        out: The run's folder, seen by all ranks.
        step: Finished steps.
        shared: Written by rank 0: tensors and plain values.
        own: Written by each rank for itself.

    Returns:
        The checkpoint's folder.

    Ranks: all must call.
    """
    rank = dist.get_rank()
    final = out / f"step_{step:07d}"
    partial = final.with_suffix(_PARTIAL)
    if rank == 0:
        _clear(out)
        partial.mkdir(parents=True)
    dist.barrier()
    _write(partial / _own_name(rank), own)
    if rank == 0:
        world = {"step": step, "world_size": dist.get_world_size()}
        _write(partial / _SHARED, {**world, **shared})
    dist.barrier()
    if rank == 0:
        _sync(partial)
        if final.exists():
            _set_aside(final)
        partial.rename(final)
        _sync(out)
        _prune(out)
    # No rank may leave, and have the launcher end the others, before the new name stands.
    dist.barrier()
    return final


def load_newest(
    folders: Sequence[Path], device: torch.device, sharding: Mapping[str, Any]
) -> tuple[Checkpoint, list[str]]:
    """Reads the first of some checkpoints that every rank finds whole, onto the CPU.

    Every rank checks what it reads: what all share, and its own state or, if another world wrote
    the checkpoint, all states.

    Args:
        folders: The same on all ranks.
        device: Where the default group's backend wants its tensors.
        sharding: What of the configuration decides which state a rank has, besides the number of
            ranks.

    Returns:
        The checkpoint, and a line for each one before it on why it was refused.

    Raises:
        StateError: On every rank, if none is whole; names each, and the file that is not.

    Ranks: all must call.
    """
    refused: list[str] = []
    for folder in folders:
        found, fault = None, ""
        try:
            found = _load(folder, sharding)
        except (StateError, OSError) as error:
            fault = str(error)
        faults = [text for text in gather_texts(fault, None, device) if text]
        if found is not None and not faults:
            return found, refused
        refused.append(f"{folder} is refused: {'; '.join(dict.fromkeys(faults))}")
    raise StateError("no checkpoint is whole: " + ". ".join(refused))


def find(folder: Path) -> list[Path]:
    """Returns the folder alone if it is a checkpoint, else those in it, newest first."""
    if folder.name.endswith((_PARTIAL, _REMOVED)):
        return []
    if _is_named_by_step(folder) or (folder / _SHARED).exists():
        return [folder]
    return list_checkpoints(folder)[::-1]


def list_checkpoints(out: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first, without a look at their files."""
    return sorted(filter(_is_named_by_step, out.glob("step_*")), key=_step_of)


def set_aside_later(out: Path, step: int) -> None:
    """Takes away checkpoints of later steps: of a run that is now gone on with from ``step``.

    They keep their files, under other names, until the next one is saved.
    """
    for folder in list_checkpoints(out):
        if _step_of(folder) > step:
            _set_aside(folder)


def _load(folder: Path, sharding: Mapping[str, Any]) -> Checkpoint:
    """Reads what this rank needs, and checks it by itself."""
    shared = _read(folder / _SHARED)
    is_own = shared["world_size"] == dist.get_world_size() and all(
        shared["config"][name] == value for name, value in sharding.items()
    )
    if is_own:
        states = [_read(folder / _own_name(dist.get_rank()))]
    else:
        names = [_own_name(rank) for rank in range(shared["world_size"])]
        # Mapped: all states of many ranks together may be large.
        states = [_read(folder / name, mmap=True) for name in names]
    return Checkpoint(folder=folder, shared=shared, states=states, is_own=is_own)


def _read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Reads a file of a checkpoint; raises StateError unless it is as it was written."""
    sums = path.with_name(path.name + _SUM)
    for needed in (path, sums):
        if not needed.is_file():
            raise StateError(f"{needed.name} is missing")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sums.read_bytes() != _sum_line(found, path):
        raise StateError(f"{path.name} is cut short or corrupt: {sums.name} does not match it")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    return state


def _write(path: Path, state: dict[str, Any]) -> None:
    with _HashingWriter(path) as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    with path.with_name(path.name + _SUM).open("wb") as sums:
        sums.write(_sum_line(file.sha256.hexdigest(), path))
        sums.flush()
        os.fsync(sums.fileno())


class _HashingWriter(io.BufferedWriter):
    """A file that keeps the SHA-256 of what is meant to be in it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return super().write(data)


def _sum_line(digest: str, path: Path) -> bytes:
    return f"{digest}  {path.name}\n".encode()


def _own_name(rank: int) -> str:
    return f"comm_{rank}.pt"


def _is_named_by_step(folder: Path) -> bool:
    return re.fullmatch(r"step_\d+", folder.name) is not None


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _prune(out: Path) -> None:
    for old in list_checkpoints(out)[:-_NUM_KEPT]:
        _set_aside(old)
    _clear(out)


def _set_aside(folder: Path) -> None:
    """Ends a checkpoint at once: half deleted it would look like one that went bad."""
    target = folder.with_suffix(_REMOVED)
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)


def _clear(out: Path) -> None:
    for suffix in (_PARTIAL, _REMOVED):
        for folder in out.glob(f"step_*{suffix}"):
            shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
