"""The command line's run: settings, a progress bar, metrics, the model at the end."""

import contextlib
import os
import platform
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from commrt.errors import ConfigError, StateError
from commrt.metrics import JsonLines, Row, Sink, TensorBoard, check_tensorboard
from commrt.simulation import checkpoint
from commrt.simulation.config import Config
from commrt.simulation.run import Run
from commrt.simulation.transport import Ranks, all_ranks

METRICS = "metrics.jsonl"
MODEL = "model.pt"


def run_job(
    config: Path,
    assignments: Sequence[str] = (),
    *,
    out: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
) -> int:
    """Simulate federated training; on all ranks that mpiexec started.

    Args:
        config: A TOML file.
        assignments: ``"section.key=value"``, which replace what it says.
        out: Folder for ``metrics.jsonl``, ``model.pt``, checkpoints.
        resume: Go on from the checkpoint there. Otherwise what is there is written anew, and a
            checkpoint removed.
        tensorboard: Write an event file there as well.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: Settings that are wrong, or none where ``out`` is needed.
        StateError: No checkpoint to go on from, or one of other settings.
    """
    ranks = all_ranks()
    with _failing_together(ranks), _agreeing(ranks):
        # A result must not depend on how many threads a machine has.
        torch.set_num_threads(1)
        settings = Config.load(config, assignments)
        if out is None and (resume or tensorboard or settings.run.checkpoint_every):
            raise ConfigError("--out is not given: resuming, checkpoints and TensorBoard need it")
        if out is not None and out.exists() and not out.is_dir():
            raise ConfigError(f"--out is {out}: must be a folder, or nothing yet")
        if tensorboard:
            check_tensorboard()
        run = Run(settings, ranks)
        if resume:
            assert out is not None
            run.resume(out)
    with _failing_together(ranks):
        with _reporting(run, ranks, out, tensorboard=tensorboard) as report:
            run.carry_out(report, out)
        if ranks.is_root and out is not None:
            checkpoint.replace(out / MODEL, run.layout.split(run.weights.cpu()))
    return 0


class _MistakeError(Exception):
    """A mistake that all ranks know of.

    Args:
        mistake: This rank's own, or one that says whose it is.
    """

    def __init__(self, mistake: Exception) -> None:
        super().__init__(str(mistake))
        self.mistake = mistake


@contextlib.contextmanager
def _failing_together(ranks: Ranks) -> Iterator[None]:
    """A rank that fails says why and ends all; mistakes that all know of are said by one."""
    try:
        yield
    except _MistakeError as known:
        if ranks.is_root:
            raise known.mistake from None
        sys.exit(2)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        ranks.abort()
        raise


@contextlib.contextmanager
def _agreeing(ranks: Ranks) -> Iterator[None]:
    """Where one rank finds a mistake, all know; there must be nothing between ranks within.

    Raises:
        _MistakeError: A rank has found one.
    """
    own: Exception | None = None
    try:
        yield
    except (ConfigError, StateError) as error:
        own = error
    said = ranks.all_gather(repr(own).encode() if own else b"")
    if any(said):
        first = next(rank for rank, each in enumerate(said) if each)
        raise _MistakeError(own or StateError(f"rank {first}: {said[first].decode()}"))


@contextlib.contextmanager
def _reporting(run: Run, ranks: Ranks, out: Path | None, *, tensorboard: bool) -> Iterator[Any]:
    """Takes rows, at the first rank."""
    if not ranks.is_root:
        yield None
        return
    sinks = list[Sink]()
    done = run.schedule.version
    if out is not None:
        if not done:
            # Who went on from an earlier run's checkpoint would not have the rows up to it.
            checkpoint.remove(out)
        sinks.append(JsonLines(out / METRICS, keep_to_step=done or None))
        if tensorboard:
            sinks.append(TensorBoard(out))
    for sink in sinks:
        sink.write({"kind": "config", **run.config.to_dict(), **_environment(run, ranks)})
    total = run.config.run.aggregations
    with tqdm(total=total, initial=done, unit="round", disable=not sys.stderr.isatty()) as bar:

        def report(row: Row) -> None:
            for sink in sinks:
                sink.write(row)
            bar.update(row["kind"] == "round")
            shown = {k: row[k] for k in ("accuracy", "loss", "bits", "virtual_s") if k in row}
            bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})

        yield report
    for sink in sinks:
        sink.close()


def _environment(run: Run, ranks: Ranks) -> Row:
    return {
        "world_size": ranks.size,
        "num_params": run.layout.numel,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host_cpus": os.cpu_count(),
    }
