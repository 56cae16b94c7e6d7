"""Lanes: what is queued on one runs in its order, beside the training thread.

Without a GPU a lane is a thread; on one it is a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from commrt.collectives import order
from commrt.errors import CommrtError

Job = Callable[[], "Done | None"]
"""What a lane runs; if it has queued more elsewhere, it returns when that is done."""


class Done(Protocol):
    """A point in a lane."""

    def wait(self) -> None:
        """What the calling thread gives its device from now on comes after it.

        Raises:
            Exception: What the job has raised, on a lane that is a thread.
        """

    def settle(self) -> None:
        """Return when it is reached. Raises as :meth:`wait` does."""


class Lane(Protocol):
    """See the module."""

    def run(self, job: Job, after: Sequence[Done] = ()) -> Done:
        """Queue a job, to begin when these are done; if one of them has failed, it fails, too."""

    def now(self) -> Done:
        """In a job: all that it has done until now."""

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """Keep memory that others may free until what is queued now has ended."""

    def close(self) -> None:
        """End, after what is queued."""


class ThreadLane:
    """A thread.

    Args:
        name: Of the thread.
        num_threads: That operators may use in it.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self._worker = ThreadPoolExecutor(1, name)
        before = torch.get_num_threads()
        self._worker.submit(torch.set_num_threads, num_threads).result()
        torch.set_num_threads(before)  # for threads to come, which take the last number set

    def run(self, job: Job, after: Sequence[Done] = ()) -> Done:
        """See :class:`Lane`."""
        return _OfThread(self._worker.submit(_run, job, after))

    def now(self) -> Done:
        """See :class:`Lane`."""
        return Nothing()

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """Jobs hold what they use."""

    def close(self) -> None:
        """See :class:`Lane`."""
        self._worker.shutdown()


class NotBegunError(CommrtError):
    """A job was not begun, since one that it comes after has failed: the cause."""


@torch.no_grad()
def _run(job: Job, after: Sequence[Done]) -> Done | None:
    for done in after:
        try:
            done.settle()
        except Exception as error:  # noqa: BLE001 - goes on as a cause
            raise NotBegunError from first_cause(error)
    return job()


def first_cause(error: BaseException) -> BaseException:
    """What has failed first."""
    is_begun = not isinstance(error, NotBegunError)
    return error if is_begun or error.__cause__ is None else error.__cause__


class _OfThread:
    def __init__(self, future: Future[Done | None]) -> None:
        self._future = future

    def wait(self) -> None:
        inner = self._future.result()
        if inner is not None:
            inner.wait()

    def settle(self) -> None:
        inner = self._future.result()
        if inner is not None:
            inner.settle()


class StreamLane:
    """A stream of a GPU. Never yet run on one; commrt.testing.streams runs it in all its orders."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, job: Job, after: Sequence[Done] = ()) -> Done:
        """See :class:`Lane`; returns when the job is launched."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            for done in after:
                done.wait()
            return job() or self.now()

    def now(self) -> Done:
        """See :class:`Lane`."""
        return _OfStream(self._device)

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """See :class:`Lane`."""
        for tensor in tensors:
            if order.is_queued(tensor.device):
                tensor.record_stream(self._stream)

    def close(self) -> None:
        """See :class:`Lane`."""
        self._stream.synchronize()


class _OfStream:
    """All that the current stream has been given until now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.current_stream(device).record_event()

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def settle(self) -> None:
        self._event.synchronize()


class Nothing:
    """A point that is always reached."""

    def wait(self) -> None:
        """See :class:`Done`."""

    def settle(self) -> None:
        """See :class:`Done`."""


class Both:
    """A point behind two others."""

    def __init__(self, one: Done, other: Done) -> None:
        self._points = one, other

    def wait(self) -> None:
        """See :class:`Done`."""
        for point in self._points:
            point.wait()

    def settle(self) -> None:
        """See :class:`Done`."""
        for point in self._points:
            point.settle()


def until_now(device: torch.device) -> Done:
    """All that the calling thread has given a device."""
    return _OfStream(device) if order.is_queued(device) else Nothing()
