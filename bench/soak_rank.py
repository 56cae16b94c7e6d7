"""Program of the ranks of bench.soak: the main job, with a ledger of some parameters' gradients.

    torchrun ... -m bench.soak_rank train --gather none OPTIONS

What was given (the mean over ranks of each step's own gradients) must be what was received (the
averaged gradients) and what is still owed (the mean of the residuals, divided by 1 - beta). The
sums are kept in fp64 in the checkpoint, so that they follow the run through restarts.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.__main__ import main
from commrt.codecs import LocoCodec
from commrt.training import checkpoint
from commrt.training.checkpoint import Checkpoint
from commrt.training.trainer import Trainer

NAMES = ("embedding.weight", "blocks.1.qkv.weight", "blocks.3.down.weight")
LEDGER_FILE = "ledger.jsonl"

# Scales are bfloat16, rounded up: by less than 1/128. A step of 8 bits is 1/127 of the scale.
STEP_OF_STORAGE = (1 + 1 / 128) / 127


class Ledger:
    """Sums over the effective steps of a run: those that lead to where it is.

    Attributes:
        sums: By name: "given", "received", and "forgone", what would be missing if every restart
            had begun without residuals.
        bounds: By name: how far rounding can have driven given from received and owed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.comm = trainer.comm
        codec = self.comm.codec
        assert isinstance(codec, LocoCodec)
        self.codec = codec
        self.parameters = {name: trainer.model.get_parameter(name) for name in NAMES}
        self.sums = {
            name: torch.zeros(3, parameter.numel(), dtype=torch.float64)
            for name, parameter in self.parameters.items()
        }
        self.bounds = dict.fromkeys(NAMES, 0.0)
        self.own: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            parameter.register_hook(functools.partial(self.own.__setitem__, name))

    def end_step(self) -> None:
        """Adds this step's gradients; call between backward and clipping. Ranks: all."""
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            own = self.own.pop(name).flatten().double()
            largest = torch.stack((own.abs().max(), self._residual(name).abs().max()))
            means = _mean_over_ranks(torch.cat((own, largest)))
            given, received, _ = self.sums[name]
            given += means[:-2]
            received += parameter.grad.flatten()
            if dist.get_world_size() > 1:
                rounding = float(means[-1]) * STEP_OF_STORAGE / 2 / (1 - self.codec.beta)
                self.bounds[name] += rounding + 1e-6 * float(means[-2])

    def owed(self, name: str) -> Tensor:
        """What the mean gradient is still due. Ranks: all."""
        return _mean_over_ranks(self._residual(name)) / (1 - self.codec.beta)

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint. Ranks: all."""
        owed = {name: self.owed(name) for name in NAMES}
        return {"sums": self.sums, "bounds": self.bounds, "owed": owed}

    def load(self, state: dict[str, Any], former_world_size: int) -> list[dict[str, Any]]:
        """Goes on from a checkpoint; returns how far what is owed has changed by it. Ranks: all."""
        rows = []
        for name, owed in state["owed"].items():
            self.sums[name].copy_(state["sums"][name])
            is_same = dist.get_world_size() == former_world_size
            bound = 0.0 if is_same else float(owed.abs().max()) * STEP_OF_STORAGE
            self.bounds[name] = state["bounds"][name] + bound
            self.sums[name][2] += owed
            jump = float((self.owed(name) - owed).abs().max())
            rows.append(
                {"name": name, "jump": jump, "bound": bound, "owed": float(owed.abs().max())}
            )
        return rows

    def balance(self) -> list[dict[str, Any]]:
        """By name: the error of the balance, its bound, and what it would be. Ranks: all."""
        rows = []
        for name, (given, received, forgone) in self.sums.items():
            owed = self.owed(name)
            rows.append(
                {
                    "name": name,
                    "error": float((given - received - owed).abs().max()),
                    "bound": self.bounds[name],
                    "owed": float(owed.abs().max()),
                    "forgone": float(forgone.abs().max()),
                    "given": float(given.abs().max()),
                }
            )
        return rows

    def _residual(self, name: str) -> Tensor:
        flat = torch.empty(self.parameters[name].numel())
        self.codec.decode_residual(self.comm.state_dict()["residuals"][name], flat)
        return flat.double()


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


@contextlib.contextmanager
def keeping_a_ledger() -> Iterator[None]:
    """Makes the trainer keep a ledger, in its checkpoints and in a file of events."""
    ledgers: list[Ledger] = []
    init, load = Trainer.__init__, Trainer.load
    save, clip = checkpoint.save, torch.nn.utils.clip_grad_norm_

    def init_with_ledger(trainer: Trainer, *args: Any) -> None:
        init(trainer, *args)
        ledgers.append(Ledger(trainer))

    def clip_noted(*args: Any) -> Tensor:
        ledgers[0].end_step()
        return clip(*args)

    def load_with_ledger(trainer: Trainer, found: Checkpoint) -> None:
        load(trainer, found)
        rows = ledgers[0].load(found.shared["ledger"], found.world_size)
        _note(trainer.config.out, "load", found.step, rows, was=found.world_size)

    def save_with_ledger(out: Path, *, step: int, shared: dict[str, Any], **rest: Any) -> Path:
        shared = shared | {"ledger": ledgers[0].state_dict()}
        folder = save(out, step=step, shared=shared, **rest)
        _note(out, "save", step, ledgers[0].balance())
        return folder

    with (
        mock.patch.object(Trainer, "__init__", init_with_ledger),
        mock.patch.object(Trainer, "load", load_with_ledger),
        mock.patch.object(checkpoint, "save", save_with_ledger),
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip_noted),
    ):
        yield


def _note(out: Path, kind: str, step: int, rows: list[dict[str, Any]], **rest: Any) -> None:
    if dist.get_rank() == 0:
        row = {"kind": kind, "step": step, "world_size": dist.get_world_size(), **rest}
        with (out / LEDGER_FILE).open("a") as file:
            file.write(json.dumps({**row, "parameters": rows}) + "\n")


def run(act: Callable[[], int]) -> int:
    """Runs the job with a ledger; returns its exit code."""
    with keeping_a_ledger():
        return act()


if __name__ == "__main__":
    sys.exit(run(main))
