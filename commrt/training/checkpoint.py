"""Checkpoints: folders ``step_0000500`` that are either whole or not there.

``model.pt`` holds what all ranks share (weights, optimizer, step, configuration), ``comm_R.pt``
what rank R alone has (its residuals). No random state is kept, since there is none: samples are
drawn by step, and nothing else is random after the start.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from commrt.errors import StateError

_SHARED = "model.pt"
_PARTIAL = ".partial"
_NUM_KEPT = 2


def save(out: Path, *, step: int, shared: dict[str, Any], own: dict[str, Any]) -> Path:
    """Writes a checkpoint and removes all but it and the one before it.

    It is written under a temporary name and renamed once every rank's files are on the disk, so a
    job that dies on the way leaves the older checkpoints as they were.

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
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    _write(partial / f"comm_{rank}.pt", own)
    if rank == 0:
        world = {"step": step, "world_size": dist.get_world_size()}
        _write(partial / _SHARED, {**world, **shared})
    dist.barrier()
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _prune(out, final)
    # No rank may leave, and have the launcher end the others, before the new name stands.
    dist.barrier()
    return final


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what ranks share and what is this rank's own, onto the CPU.

    Raises:
        StateError: The checkpoint was written by another number of ranks.
    """
    shared = torch.load(folder / _SHARED, map_location="cpu", weights_only=True)
    if shared["world_size"] != dist.get_world_size():
        raise StateError(
            f"{folder} was written by {shared['world_size']} ranks: "
            f"it cannot be resumed by {dist.get_world_size()}"
        )
    own = folder / f"comm_{dist.get_rank()}.pt"
    return shared, torch.load(own, map_location="cpu", weights_only=True)


def find(folder: Path) -> Path:
    """Returns ``folder`` if it is a checkpoint, else the newest one in it.

    Raises:
        StateError: There is none.
    """
    if (folder / _SHARED).exists() and not folder.name.endswith(_PARTIAL):
        return folder
    found = list_checkpoints(folder)
    if not found:
        raise StateError(f"{folder} holds no checkpoint to resume from")
    return found[-1]


def list_checkpoints(out: Path) -> list[Path]:
    """Returns the whole checkpoints of a run, oldest first."""
    found = [path for path in out.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _prune(out: Path, newest: Path) -> None:
    """Keeps the newest and its predecessor; later ones are of a run resumed from before them."""
    found = list_checkpoints(out)
    end = found.index(newest) + 1
    for old in found[: max(0, end - _NUM_KEPT)] + found[end:]:
        shutil.rmtree(old)


def _write(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
