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
from typing import Any

import torch
import torch.distributed as dist

from commrt.errors import ConfigError
from commrt.metrics import check_tensorboard, read_rows
from commrt.training import parallel
from commrt.training.config import METRICS_FILE, TrainConfig
from commrt.training.data import load_corpus
from commrt.training.loop import Loop
from commrt.training.rendezvous import join
from commrt.training.reporter import Reporter
from commrt.training.signals import StopRequest
from commrt.training.start import begin, check_same_run, find_start
from commrt.training.trainer import Trainer

_NUM_WARM_STEPS = 5


def run_job(config: TrainConfig) -> int:
    """Trains, and writes metrics, checkpoints and a summary into ``config.out``.

    Joins the ranks that ``torchrun`` (or another launcher that sets its variables) started, uses a
    process group that exists already, or runs alone. SIGINT or SIGTERM to any rank ends all of
    them after the same step, with a checkpoint. When ``torchrun --max-restarts`` starts the ranks
    again, since one of them died, they go on from the newest whole checkpoint by themselves.

    Returns:
        The exit code: 0, or 128 plus the signal's number.

    Raises:
        ConfigError: The text, the folder or an option cannot be used.
        PeerMismatchError: Ranks were given different options or texts.
        StateError: No checkpoint to resume from is whole, or it is of another run.

    Ranks: all must call.
    """
    # Mistakes that show on one rank alone come before ranks wait for each other.
    parallel.check(config)
    if config.tensorboard:
        check_tensorboard()
    corpus = load_corpus(config.data)
    corpus.check(config.seq_len)
    device = _pick_device(config.device)
    with _process_group(device, config.timeout_s):
        check_same_run(config, corpus, device)
        start = find_start(config, device)
        trainer = Trainer(config, corpus, device)
        notes = begin(trainer, start)
        reporter = Reporter(config, rank=dist.get_rank(), first_step=trainer.step)
        # Not before: until steps are taken a signal ends a rank as it ends any program.
        with contextlib.closing(reporter), StopRequest() as stop:
            for note in notes:
                reporter.say(note)
            return _train(trainer, reporter, stop)


def _train(trainer: Trainer, reporter: Reporter, stop: StopRequest) -> int:
    config = trainer.config
    environment = _environment(trainer)
    reporter.write({"kind": "config", **config.to_dict(), **environment})
    loop = Loop(trainer, reporter.write, lambda: stop.received is not None)
    if not loop.run():
        reporter.say(f"Stopped at step {trainer.step}. To go on: --out {config.out} --resume")
        return stop.exit_code
    if dist.get_rank() == 0:
        results = _results(config, trainer)
        reporter.finish({**config.to_dict(), **environment, **results}, trainer.report())
    return 0


def _results(config: TrainConfig, trainer: Trainer) -> dict[str, Any]:
    """Sums up the metrics of the whole run, however often it was resumed. On rank 0."""
    rows = read_rows(config.out / METRICS_FILE)
    steps = [row for row in rows if row["kind"] == "train"]
    validations = [row for row in rows if row["kind"] == "val"]

    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in steps)

    step_ms = statistics.median([row["step_ms"] for row in steps[_NUM_WARM_STEPS:] or steps])
    return {
        "gather": parallel.gather_spec(trainer.comm),
        "val_loss": validations[-1]["val_loss"],
        "train_loss": steps[-1]["loss"],
        "bytes_per_step": mean("bytes_sent"),
        "node_bytes_per_step": mean("node_bytes"),
        "dense_bytes_per_step": mean("dense_bytes"),
        "ratio": mean("dense_bytes") / mean("bytes_sent") if mean("bytes_sent") else 1.0,
        "step_ms": step_ms,
        "codec_ms": mean("codec_ms"),
        "network_ms": mean("network_ms"),
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


def _pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda: no GPU is available, so it must be cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _process_group(device: torch.device, timeout_s: int) -> Iterator[None]:
    if dist.is_initialized():
        yield
        return
    join("nccl" if device.type == "cuda" else "gloo", timeout_s)
    try:
        yield
    finally:
        dist.destroy_process_group()
