"""Where a run begins: anew, or at the newest whole checkpoint of an earlier try."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from commrt.collectives import check_agreement, gather_texts
from commrt.errors import ConfigError, StateError
from commrt.training import checkpoint
from commrt.training.checkpoint import Checkpoint
from commrt.training.config import TrainConfig
from commrt.training.data import Corpus
from commrt.training.trainer import Trainer

# What each rank may choose for itself. All else decides what ranks do together.
_OWN_FIELDS = {"data", "device", "log_every", "no_progress", "tensorboard"}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What ranks agreed to begin with.

    Attributes:
        folders: Checkpoints to go on from, the best first; none to begin anew.
        num_restarts: How often ``torchrun --max-restarts`` has started the ranks again.
    """

    folders: list[Path]
    num_restarts: int


def check_same_run(config: TrainConfig, corpus: Corpus, device: torch.device) -> None:
    """Makes sure that all ranks train the same model on the same text in the same way.

    Raises:
        PeerMismatchError: On every rank; names an option that differs and each rank's value.

    Ranks: all must call.
    """
    settings: dict[str, str | int | float] = {
        name: str(value) for name, value in config.to_dict().items() if name not in _OWN_FIELDS
    }
    sizes = {"train_bytes": len(corpus.train), "validation_bytes": len(corpus.validation)}
    check_agreement(settings | sizes, None, device)


def find_start(config: TrainConfig, device: torch.device) -> Start:
    """Chooses the checkpoints to go on from.

    Those in ``config.out`` after a restart by the launcher, which has no other options than at
    first; those of ``config.resume`` where it is given; else there must be none in ``config.out``.

    Raises:
        ConfigError: ``config.out`` holds checkpoints that the run does not go on from.
        StateError: ``config.resume`` is another folder than ``config.out`` and holds none.

    Ranks: all must call. What rank 0 sees counts, as folders on a network may look older elsewhere.
    A launcher of several nodes counts the restarts of each for itself.
    """
    view = {
        "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "out": [path.name for path in reversed(checkpoint.list_checkpoints(config.out))],
        "resume": _names(config.resume) if config.resume else [],
    }
    views = [json.loads(text) for text in gather_texts(json.dumps(view), None, device)]
    num_restarts = max(view["restarts"] for view in views)
    in_out = [config.out / name for name in views[0]["out"]]
    given = [config.resume / name for name in views[0]["resume"]] if config.resume else []
    if num_restarts and in_out:
        return Start(folders=in_out, num_restarts=num_restarts)
    if config.resume and not given and not _is_same(config.resume, config.out):
        raise StateError(f"{config.resume} holds no checkpoint to resume from")
    if in_out and not (given and _is_in(given[0], config.out)):
        raise ConfigError(
            f"out is {config.out}, which holds checkpoints of an earlier run: "
            "go on from them with --resume, or choose another folder"
        )
    return Start(folders=given, num_restarts=num_restarts)


def begin(trainer: Trainer, start: Start) -> list[str]:
    """Loads what the run goes on from, if anything.

    Returns:
        Lines to tell the user.

    Raises:
        StateError: No checkpoint is whole, or it is of another run.

    Ranks: all must call.
    """
    config = trainer.config
    prefix = f"Restart {start.num_restarts}: " if start.num_restarts else ""
    if not start.folders:
        is_said = config.resume is not None or start.num_restarts > 0
        return [f"{prefix}No checkpoint in {config.out} yet: begins anew"] if is_said else []
    sharding = {"parallel": config.parallel, "hierarchy": config.hierarchy}
    found, refused = checkpoint.load_newest(start.folders, trainer.device, sharding)
    trainer.load(found)
    if dist.get_rank() == 0 and _is_in(found.folder, config.out):
        checkpoint.set_aside_later(config.out, found.step)
    return [*refused, f"{prefix}Goes on from {found.folder}", *_changes(found, config)]


def _changes(found: Checkpoint, config: TrainConfig) -> list[str]:
    """Says what another number of ranks means, if it is another."""
    before, now = found.world_size, dist.get_world_size()
    if before == now:
        return []
    line = f"It was written by {before} ranks and goes on with {now}: residuals are redistributed"
    sequences = before * found.shared["config"]["batch_size"], now * config.batch_size
    if sequences[0] == sequences[1]:
        return [line]
    return [
        line,
        f"A step takes {sequences[1]} sequences, no longer {sequences[0]}; all else stays",
    ]


def _names(folder: Path) -> list[str]:
    """The checkpoints in a folder, newest first; of a checkpoint itself a dot."""
    return [str(path.relative_to(folder)) for path in checkpoint.find(folder)]


def _is_in(folder: Path, parent: Path) -> bool:
    return _is_same(folder.parent, parent)


def _is_same(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()
