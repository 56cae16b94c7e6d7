"""Run a function on several ranks: real processes, one process group, no ports.

    caller --forkserver--> rank 0 .. N-1:  init_process_group(FileStore)  fn(*args)  barrier
           <---- pipe ---- value of each       <---- log file ---- output, tracebacks, stacks

The forkserver has torch and commrt loaded, and pytest and hypothesis if the caller has, so after
the first call in a process (which loads them, seconds) ranks start in a fraction of a second. The
store is a file in a temporary directory: tests can run in parallel under pytest-xdist.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# When a rank fails, its peers usually fail soon after (their connection breaks) and say where. Also
# how long a rank that is told to write its stacks and end may take.
_GRACE_S = 2.0
# Ranks whose parent was killed end themselves, this long after the parent would have ended them.
_ORPHAN_S = 30.0

# Of what a rank would import, what takes more than a tenth of a second.
_PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed", "torch.distributed.checkpoint"),
    *("torch.distributed.fsdp", "commrt.hooks", "commrt.optim", __name__),
)
_PRELOADED_IF_USED = ("pytest", "hypothesis")

Starting = ForkServerContext | SpawnContext


def _settings() -> dict[str, str]:
    """What commrt reads of the environment when it is loaded, and some more."""
    return {name: value for name, value in os.environ.items() if name.startswith("COMMRT_")}


_SETTINGS = _settings()


class RankError(RuntimeError):
    """A rank raised, died or did not finish in time.

    Attributes:
        failures: what happened, by rank, the most likely cause first: those that died without a
            word, then the others in the order in which they raised, then those that did not end.
    """

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"rank {rank} {what}" for rank, what in failures.items()))


def run_ranks(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int,
    timeout_s: float = 60.0,
    backend: str = "gloo",
) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks and return what each returned.

    Each rank is a process of its own with one torch thread, the caller's environment variables and
    an initialised default process group; `fn` asks `torch.distributed` for its rank. Arguments and
    values are copied, tensors too: ranks share no memory. What ranks print is printed again by the
    caller, rank by rank, once all have ended.

    Args:
        fn: picklable, so defined at the top level of a module that can be imported.
        *args: picklable, the same for every rank.
        world_size: number of ranks.
        timeout_s: seconds after which the ranks still running are killed.
        backend: of the process group. With "nccl", `fn` chooses the rank's device.

    Returns:
        The values, in rank order.

    Raises:
        RankError: a rank raised (with its traceback), died (with the signal or exit code) or did
            not finish in time (with the stacks of all its threads).
        ValueError: `world_size` is below 1.

    Example:
        A test of a codec of one's own::

            def average() -> float:
                x = torch.full((1000,), float(dist.get_rank()))
                my_all_reduce(x)
                return x.mean().item()

            def test_average():
                assert run_ranks(average, world_size=3) == [1.0, 1.0, 1.0]
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}")
    # Pickled here rather than by multiprocessing, which would put tensors in shared memory.
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="commrt-ranks-") as directory:
        ranks = _Ranks(Path(directory), _context())
        try:
            for rank in range(world_size):
                ranks.start(rank, world_size, backend, timeout_s, call)
            return ranks.collect(timeout_s)
        finally:
            ranks.kill()
            ranks.print_logs()


def _context() -> Starting:
    """Of the forkserver, unless what it has loaded was to be loaded with other settings."""
    if _settings() != _SETTINGS:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    used = [name for name in _PRELOADED_IF_USED if name in sys.modules]
    context.set_forkserver_preload([*_PRELOADED, *used])
    return context


@dataclass
class _Raised:
    """Sent in place of a value: when the rank raised, by the clock that all processes share.

    Of ranks that fail within moments, the parent may notice the last one first.
    """

    at: float


class _Ranks:
    """The processes of one call, as their parent sees them."""

    def __init__(self, directory: Path, context: Starting) -> None:
        self.directory, self.context = directory, context
        self.processes: list[BaseProcess] = []
        self.outcomes: list[Connection] = []
        self.failures: dict[int, str] = {}
        self.failed_at: dict[int, float] = {}

    def start(
        self, rank: int, world_size: int, backend: str, timeout_s: float, call: bytes
    ) -> None:
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_rank_main,
            args=(rank, world_size, backend, timeout_s, call, sender, self.directory),
            kwargs={"environ": dict(os.environ)},
            name=f"rank {rank}",
        )
        process.start()
        sender.close()
        self.processes.append(process)
        self.outcomes.append(receiver)

    def collect(self, timeout_s: float) -> list[Any]:
        """Wait until every rank has ended; return the values or raise what went wrong."""
        deadline = time.monotonic() + timeout_s
        values: dict[int, Any] = {}
        # First a rank sends its value or when it raised, or dies without; then its process ends.
        pending: dict[Any, int] = {outcome: rank for rank, outcome in enumerate(self.outcomes)}
        while pending:
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for event in ready:
                rank = pending.pop(event)
                if isinstance(event, Connection):
                    self._receive(rank, values)
                    pending[self.processes[rank].sentinel] = rank
                else:
                    self._check_exit(rank)
            if self.failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        self._give_up_on(list(pending.values()), timeout_s)
        if self.failures:
            order = sorted(self.failures, key=lambda rank: self.failed_at.get(rank, math.inf))
            raise RankError({rank: self.failures[rank] for rank in order})
        return [values[rank] for rank in range(len(self.processes))]

    def _receive(self, rank: int, values: dict[int, Any]) -> None:
        try:
            outcome = pickle.loads(self.outcomes[rank].recv_bytes())
        except (EOFError, OSError):  # before an outcome, or in the middle of it
            outcome = _Raised(-math.inf)
        if isinstance(outcome, _Raised):
            self.failures[rank] = "failed"  # its exit will tell more
            self.failed_at[rank] = outcome.at
        else:
            values[rank] = outcome

    def _check_exit(self, rank: int) -> None:
        process = self.processes[rank]
        process.join()
        assert process.exitcode is not None
        if process.exitcode < 0:
            end = f"was killed by {signal.Signals(-process.exitcode).name}"
        else:
            end = f"exited with code {process.exitcode}"
        if process.exitcode or rank in self.failures:
            self.failures[rank] = f"{end}\n{self._log(rank)}"

    def _give_up_on(self, stuck: list[int], timeout_s: float) -> None:
        """Note ranks that have not ended as failures, with the stacks of all their threads."""
        why = "did not end after another rank failed" if self.failures else "timed out"
        for rank in stuck:
            pid = self.processes[rank].pid
            assert pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)  # faulthandler writes the stacks
        for rank in stuck:
            self.processes[rank].join(_GRACE_S)
            self.failures[rank] = f"{why} (limit {timeout_s:g} s)\n{self._log(rank)}"

    def _log(self, rank: int) -> str:
        path = self.directory / f"{rank}.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return textwrap.indent(text, "    ")

    def kill(self) -> None:
        """End what still runs and free the processes; harmless after they ended."""
        for process in self.processes:
            process.kill()
        for process, outcome in zip(self.processes, self.outcomes, strict=True):
            process.join()
            process.close()
            outcome.close()

    def print_logs(self) -> None:
        for rank in set(range(len(self.processes))) - set(self.failures):
            for line in self._log(rank).splitlines():
                print(f"[rank {rank}] {line.removeprefix('    ')}")


def _rank_main(
    rank: int,
    world_size: int,
    backend: str,
    timeout_s: float,
    call: bytes,
    outcome: Connection,
    directory: Path,
    *,
    environ: dict[str, str],
) -> None:
    """What a rank's process runs."""
    # The forkserver's environment and standard output are those of the moment it was started.
    os.environ.clear()
    os.environ.update(environ)
    _redirect_output(directory / f"{rank}.log")
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout_s + _ORPHAN_S, exit=True)
    if Path("/sys/class/net/lo").exists():
        # Otherwise gloo looks up the host's name, which fails on machines without a network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    # An exception goes on to multiprocessing, which prints it (to the log) and exits with code 1;
    # the parent hears of it at once because the pipe closes here.
    with outcome:
        try:
            fn, args = pickle.loads(call)
            dist.init_process_group(
                backend,
                store=dist.FileStore(str(directory / "store"), world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
            value = fn(*args)
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            message = pickle.dumps(value)
        except BaseException:
            outcome.send_bytes(pickle.dumps(_Raised(time.monotonic())))
            raise
        outcome.send_bytes(message)


def _redirect_output(path: Path) -> None:
    """Send standard output and error, of C++ code too, to a file."""
    with path.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
