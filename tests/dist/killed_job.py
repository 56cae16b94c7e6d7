"""Program of test_train_faults: the main job, of which a rank is killed at each start but the last.

    torchrun ... tests/dist/killed_job.py PLAN -- train OPTIONS

PLAN is a JSON list of [rank, step, point]: entry i is for the i-th start by the launcher. The rank
ends itself by SIGKILL at that point of the first step from ``step`` on in which it comes by.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from commrt.__main__ import main
from commrt.training import checkpoint
from commrt.training.model import GPT
from commrt.training.trainer import Trainer

# Its gradient is made half way through backward: by then the first buckets are on their way.
MIDDLE = "blocks.1.norm_feed_forward.weight"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(act: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **options: Any) -> Any:
        act()
        return call(*args, **options)

    return both


def half_written(is_due: Callable[[], bool]) -> Callable[..., Any]:
    """A torch.save that leaves half of a file."""
    save = torch.save

    def write(state: object, file: Any) -> None:
        save(state, file)
        if is_due():
            file.flush()
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
            die()

    return write


def patches(point: str, is_due: Callable[[], bool]) -> Any:
    """What makes a due rank die at a point."""

    def die_if_due() -> None:
        if is_due():
            die()

    match point:
        case "start":
            return mock.patch.object(Trainer, "load", before(die_if_due, Trainer.load))
        case "forward":
            return mock.patch.object(GPT, "forward", before(die_if_due, GPT.forward))
        case "backward":
            return mock.patch.object(Trainer, "__init__", with_hook(Trainer.__init__, die_if_due))
        case "optimizer":
            step = torch.optim.AdamW.step
            return mock.patch.object(torch.optim.AdamW, "step", before(die_if_due, step))
        case "write":
            return mock.patch.object(torch, "save", half_written(is_due))
        case "rename":
            return mock.patch.object(checkpoint, "_sync", before(die_if_due, checkpoint._sync))
        case "prune":
            return mock.patch.object(checkpoint, "_prune", before(die_if_due, checkpoint._prune))
        case "end":
            return mock.patch.object(dist, "destroy_process_group", die_if_due)
    raise ValueError(f"no such point: {point}")


def with_hook(init: Callable[..., None], act: Callable[[], None]) -> Callable[..., None]:
    def init_with_hook(trainer: Trainer, *args: Any) -> None:
        init(trainer, *args)
        parameter = trainer.model.get_parameter(MIDDLE)
        parameter.register_hook(lambda _: act())

    return init_with_hook


def run(plan: list[tuple[int, int, str]], arguments: list[str]) -> int:
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start >= len(plan):
        return main(arguments)
    rank, step, point = plan[start]
    finished = [0]

    def count(trainer: Trainer) -> Any:
        finished[0] = trainer.step
        loss = take_step(trainer)
        finished[0] = trainer.step
        return loss

    take_step = Trainer.train_step
    own_rank = int(os.environ["RANK"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Trainer, "train_step", count))
        stack.enter_context(patches(point, lambda: own_rank == rank and finished[0] >= step))
        return main(arguments)


if __name__ == "__main__":
    split = sys.argv.index("--")
    sys.exit(run(json.loads(sys.argv[1]), sys.argv[split + 1 :]))
