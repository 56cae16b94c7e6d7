"""A run that is killed, or fails, while it writes a checkpoint goes on from the old or the new."""

import dataclasses
import io
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commrt.simulation import checkpoint
from commrt.simulation.config import Config
from commrt.simulation.run import Run
from commrt.simulation.transport import Ranks

SETTINGS = Config.make(
    {
        "uplink": "mbtc:nmse=0.5",
        "clients": {"count": 4},
        "schedule": {"cohort": 2},
        "run": {"aggregations": 5},
    }
)
EVENTS = ("open", "os.rename", "os.remove")


def carried_on(run: Run, aggregations: int, folder: Path | None = None) -> Run:
    """A new run, which goes on from there."""
    length = dataclasses.replace(SETTINGS.run, aggregations=aggregations)
    new = Run(dataclasses.replace(SETTINGS, run=length), Ranks())
    if folder is not None:
        run.save(folder)
        new.resume(folder)
    new.carry_out()
    return new


def save_failing(run: Run, folder: Path, operation: int, fail: Callable[[], None]) -> bool:
    """In a process of its own, save and fail just before an operation; whether there was one."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    torch.set_num_threads(1)  # a fork has none of the others, and would wait for them
    counted = itertools.count()

    def operate() -> None:
        if next(counted) == operation:
            fail()

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and str(folder) in str(arguments):
            operate()

    class Torn(io.FileIO):
        """Where a write that fails has written half."""

        def write(self, data: Any) -> int:
            view = memoryview(data)
            done = super().write(view[: len(view) // 2])
            operate()
            return done + super().write(view[done:])

    plain, flush = io.open, os.fsync

    def opened(path: Any, mode: str = "r", *arguments: Any) -> Any:
        torn = mode == "wb"
        return (
            io.BufferedWriter(Torn(path, mode), 1 << 17) if torn else plain(path, mode, *arguments)
        )

    def flushed(descriptor: int) -> None:
        operate()
        flush(descriptor)

    code = 1
    try:
        io.open, os.fsync = opened, flushed  # type: ignore[assignment]
        sys.addaudithook(heard)
        run.save(folder)
        code = 0
    finally:
        os._exit(code)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raised() -> None:
    raise OSError("no space left on device")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("fail", [killed, raised])
def test_saving_fails_at_any_moment(fail: Callable[[], None], tmp_path: Path) -> None:
    whole = carried_on(Run(SETTINGS, Ranks()), 5)
    old, copy, versions = tmp_path / "old", tmp_path / "copy", list[int]()
    second = carried_on(Run(SETTINGS, Ranks()), 2)
    fourth = carried_on(second, 4, old)
    for operation in itertools.count():
        shutil.copytree(old, copy)
        if not save_failing(fourth, copy, operation, fail):
            break
        again = Run(SETTINGS, Ranks())
        again.resume(copy)
        versions.append(again.schedule.version)
        again.save(copy)
        named = torch.load(copy / checkpoint.NAME, weights_only=True)["files"]
        assert {path.name for path in copy.glob("*.states")} == set(named)
        again.carry_out()
        assert torch.equal(again.weights, whole.weights)
        shutil.rmtree(copy)
    assert versions == sorted(versions)
    assert set(versions) == {2, 4}
    assert len(versions) > 10
