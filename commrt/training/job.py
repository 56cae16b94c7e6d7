"""The reference job from start to end, on every rank: ``python -m commrt train``.

On a CPU ranks talk over gloo. On GPUs they talk over NCCL, each on the GPU that ``LOCAL_RANK``
names; that path has never been run, for want of a GPU.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import commrt
from commrt.errors import ConfigError
from commrt.metrics import check_tensorboard
from commrt.training import checkpoint
from commrt.training.config import TrainConfig
from commrt.training.data import load_corpus
from commrt.training.loop import Loop
from commrt.training.reporter import Reporter
from commrt.training.signals import StopRequest
from commrt.training.trainer import Trainer

_NUM_WARM_STEPS = 5


def run_job(config: TrainConfig) -> int:
    """Trains, and writes metrics, checkpoints and a summary into ``config.out``.

    Joins the ranks that ``torchrun`` (or another launcher that sets its variables) started, uses a
    process group that exists already, or runs alone. SIGINT or SIGTERM to any rank ends all of
    them after the same step, with a checkpoint.

    Returns:
        The exit code: 0, or 128 plus the signal's number.

    Raises:
        ConfigError: The text, the folder or an option cannot be used.
        StateError: There is no checkpoint to resume from, or it is of another run.

    Ranks: all must call.
    """
    # Mistakes that show on one rank alone come before ranks wait for each other.
    commrt.Comm(config.codec, config.gather)
    if config.tensorboard:
        check_tensorboard()
    corpus = load_corpus(config.data)
    corpus.check(config.seq_len)
    start = _find_start(config)
    device = _pick_device(config.device)
    with _process_group(device), StopRequest() as stop:
        trainer = Trainer(config, corpus, device)
        if start is not None:
            trainer.load(start)
        reporter = Reporter(config, rank=dist.get_rank(), first_step=trainer.step)
        with contextlib.closing(reporter):
            return _train(trainer, reporter, stop)


def _train(trainer: Trainer, reporter: Reporter, stop: StopRequest) -> int:
    config = trainer.config
    environment = _environment(trainer)
    reporter.write({"kind": "config", **config.to_dict(), **environment})
    loop = Loop(trainer, reporter.write, lambda: stop.received is not None)
    if not loop.run():
        reporter.say(f"Stopped at step {trainer.step}. To go on: --out {config.out} --resume")
        return stop.exit_code
    summary = {**config.to_dict(), **environment, **_results(trainer, loop)}
    reporter.finish(summary, trainer.comm.report())
    return 0


def _results(trainer: Trainer, loop: Loop) -> dict[str, Any]:
    stats, num_steps = trainer.comm.stats(), len(loop.step_ms)
    step_ms = statistics.median(loop.step_ms[_NUM_WARM_STEPS:] or loop.step_ms)
    return {
        "gather": None if trainer.config.codec == "none" else trainer.comm.gather.spec,
        "val_loss": loop.newest["val"]["val_loss"],
        "train_loss": loop.newest["train"]["loss"],
        "bytes_per_step": stats.wire_bytes / num_steps,
        "dense_bytes_per_step": stats.dense_bytes / num_steps,
        "ratio": stats.ratio,
        "step_ms": step_ms,
        "codec_ms": 1000 * stats.codec_s / num_steps,
        "network_ms": 1000 * stats.network_s / num_steps,
        "tokens_per_s": 1000 * trainer.tokens_per_step / step_ms,
    }


def _environment(trainer: Trainer) -> dict[str, Any]:
    return {
        "world_size": dist.get_world_size(),
        "num_params": trainer.num_params,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(trainer.device),
        "host_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _find_start(config: TrainConfig) -> Path | None:
    """Returns the checkpoint to go on from; checks that none in ``out`` is of another run."""
    start = None if config.resume is None else checkpoint.find(config.resume)
    stays = start is not None and start.parent.resolve() == config.out.resolve()
    if not stays and checkpoint.list_checkpoints(config.out):
        raise ConfigError(
            f"out is {config.out}, which holds checkpoints of an earlier run: "
            "go on from them with --resume, or choose another folder"
        )
    return start


def _pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda: no GPU is available, so it must be cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
