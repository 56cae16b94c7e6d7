"""One order of collectives over all ranks, while backward goes on.

A DDP hook may not wait: backward would stall. Nor may it launch a second collective from the
callback of the first: on gloo the callbacks run in another order on every rank, and the collectives
cross. Both mechanisms here take jobs in the order in which DDP hands out buckets, which is the same
on every rank, and run the two legs of each in that order:

* :class:`ThreadPipeline` (gloo): a thread and a process group for each leg. The reduce leg of one
  bucket overlaps the gather leg of the one before; within a leg the order is first in, first out.
* :class:`StreamPipeline` (NCCL): both legs on one side stream, in launch order.
"""

import abc
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from commrt.errors import CollectiveError

Leg = Callable[[], Any]
SecondLeg = Callable[[Any], Tensor]


def is_queued(device: torch.device) -> bool:
    """Whether work on the device is queued on streams, so that to read a value is to wait."""
    return device.type == "cuda"


class Pipeline(abc.ABC):
    """Runs two-legged jobs in the order of submission."""

    @abc.abstractmethod
    def submit(self, first: Leg, second: SecondLeg) -> Future[Tensor]:
        """Queue ``second(first())``; the future has its result, or raises what it raised.

        DDP reads the future in C++ and raises a RuntimeError that names the error.
        """

    @abc.abstractmethod
    def close(self, *, wait: bool = True) -> None:
        """Finish what is queued and end threads; without ``wait``, later and by themselves."""


class FifoWorker:
    """A daemon thread that runs jobs one by one, in order.

    After a job has failed its group is in an unknown state, so every later job fails as well, with
    the first error as its cause, instead of waiting for peers that will not come.

    Args:
        name: Of the thread.
        capacity: Jobs that may wait; submitting more blocks. 0: no limit.
    """

    def __init__(self, name: str, capacity: int = 0) -> None:
        self._jobs: queue.Queue[tuple[Leg, Callable[[Any, BaseException | None], None]] | None]
        self._jobs = queue.Queue(capacity)
        self._failure: BaseException | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Leg, done: Callable[[Any, BaseException | None], None]) -> None:
        """Run ``job()``, then ``done(result, error)``, both on the worker's thread.

        Raises:
            CollectiveError: After :meth:`close`.
        """
        if self._is_closed:
            raise CollectiveError("closed: no more collectives after close()")
        self._jobs.put((job, done))

    def close(self, *, wait: bool = True) -> None:
        """Finish what is queued and end the thread."""
        self._is_closed = True
        self._jobs.put(None)
        if wait:
            self.join()

    def join(self) -> None:
        """Wait for the thread to end, after :meth:`close`."""
        self._thread.join()

    def _run(self) -> None:
        with torch.no_grad():
            while (item := self._jobs.get()) is not None:
                job, done = item
                result, error = self._attempt(job)
                done(result, error)
                del item, job, done, result, error  # frees buffers while the queue is empty

    def _attempt(self, job: Leg) -> tuple[Any, BaseException | None]:
        if self._failure is not None:
            error = CollectiveError(f"an earlier collective failed: {self._failure}")
            error.__cause__ = self._failure
            return None, error
        try:
            return job(), None
        except BaseException as error:  # noqa: BLE001 - raised again where the future is read
            self._failure = error
            return None, error


class ThreadPipeline(Pipeline):
    """Two threads, for process groups whose collectives block (gloo)."""

    def __init__(self) -> None:
        self._is_closed = False
        self._first = FifoWorker("commrt-reduce")
        # One received payload may wait for the gather leg while the next one is on its way.
        self._second = FifoWorker("commrt-gather", capacity=1)

    def submit(self, first: Leg, second: SecondLeg) -> Future[Tensor]:
        """See :class:`Pipeline`."""
        outcome: Future[Any] = Future()

        def finish(result: Any, error: BaseException | None) -> None:
            outcome.set_result((result, error))

        def hand_over(received: Any, error: BaseException | None) -> None:
            if error is not None:
                finish(None, error)
            else:
                self._second.submit(lambda: second(received), finish)

        self._first.submit(first, hand_over)
        # Future.set_exception would reach DDP as a failed cast; raising in then() arrives intact.
        return outcome.then(_unwrap)

    def submit_first(self, job: Leg) -> Future[Tensor]:
        """Queue a job of one leg among the first legs."""
        return submit_to(self._first, job)

    def close(self, *, wait: bool = True) -> None:
        """See :class:`Pipeline`; closing again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        # By the first worker, after its last job, which may still need the second.
        self._first.submit(lambda: None, lambda *_: self._second.close(wait=False))
        self._first.close(wait=wait)
        if wait:
            self._second.join()


class StreamPipeline(Pipeline):
    """One side stream, for process groups whose collectives are stream-ordered (NCCL).

    Never yet run on a GPU; commrt.testing.streams runs what it queues in all orders it allows.

    Args:
        device: The CUDA device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def submit(self, first: Leg, second: SecondLeg) -> Future[Tensor]:
        """See :class:`Pipeline`; returns when the work is launched, not when it is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            result = second(first())
            result.record_stream(self._stream)
            future: Future[Tensor] = Future(devices=[self._device])
            future.set_result(result)  # records an event on the side stream for those who wait
        return future

    def close(self, *, wait: bool = True) -> None:
        """See :class:`Pipeline`; there is no thread to end."""
        if wait:
            self._stream.synchronize()


def submit_to(worker: FifoWorker, job: Leg) -> Future[Tensor]:
    """Queue a job; the future has its result, or raises what it raised."""
    outcome: Future[Any] = Future()
    worker.submit(job, lambda result, error: outcome.set_result((result, error)))
    return outcome.then(_unwrap)


def _unwrap(outcome: Future[Any]) -> Tensor:
    result, error = outcome.value()
    if error is not None:
        raise error
    assert isinstance(result, Tensor)
    return result
