"""CUDA streams without a GPU: what a program queued on each, run again in other orders.

On a GPU the order of two operations on different streams is decided by waits alone. Here the
program runs once, on CPU tensors and in its own order, while every operation is recorded together
with the stream it was queued on and the waits between them. Then memory is put back as it was, and
the operations run again in orders drawn from seeds that respect the streams and the waits, and
nothing else. If a wait is missing, some order gives other results.

Modelled: streams, events, futures that carry a device. A result that the host asks for, which on a
GPU would wait for the device, raises. Memory of one stream that another one uses, without
``Tensor.record_stream``, is listed. Not modelled: time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from commrt.errors import CommrtError

NONSENSE = 0xA5
aten = torch.ops.aten
HOST_READS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero),
    aten.allclose,
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount),
}


class HostWaitError(CommrtError):
    """The host asked for a value: on a GPU, and in a CUDA graph above all, a mistake."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A point in a stream: the number of operations recorded on all streams before it."""

    stream: Stream
    last: int | None


class Stream:
    """As ``torch.cuda.Stream``, as far as commrt uses it."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self.name = name
        self.last: int | None = None
        self.waits: set[int] = set()

    def wait_stream(self, other: Stream) -> None:
        """What is queued from now on begins after what ``other`` has queued until now."""
        self.wait_event(other.record_event())

    def record_event(self) -> Event:
        """A point behind all that is queued."""
        return Event(self, self.last)

    def wait_event(self, event: Event) -> None:
        """What is queued from now on begins after the event."""
        if event.last is not None:
            self.waits.add(event.last)

    def synchronize(self) -> None:
        """The host would wait."""
        raise HostWaitError(f"stream {self.name!r} is waited for by the host")


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something queued, and the operations that end before it begins."""

    stream: Stream
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    after: frozenset[int]


class Recorder(TorchDispatchMode):
    """Records what is done inside ``with``; :meth:`replay` does it again.

    Attributes:
        main: The stream that is current at first.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.main = Stream(self, "main")
        self._owners: dict[int, Stream] = {}  # of memory that was allocated meanwhile
        self._kept: set[tuple[int, Stream]] = set()
        self._current = [self.main]
        self._operations: list[Operation] = []
        self._before: dict[int, tuple[torch.UntypedStorage, Tensor | None]] = {}
        self._patches = contextlib.ExitStack()

    @property
    def current(self) -> Stream:
        """Where operations are queued now."""
        return self._current[-1]

    def __enter__(self) -> Self:
        """From now on ``torch.cuda`` and commrt take every tensor to be on a GPU."""
        patches = {
            "Stream": lambda device=None: Stream(self, "side"),
            "current_stream": lambda device=None: self.current,
            "stream": self._use,
        }
        for name, replacement in patches.items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, replacement))
        order = "commrt.collectives.order"
        self._patches.enter_context(mock.patch(f"{order}.is_queued", return_value=True))
        self._patches.enter_context(mock.patch(f"{order}.Future", self._make_future))

        def record_stream(tensor: Tensor, stream: Stream) -> None:
            self._kept.add((tensor.untyped_storage().data_ptr(), stream))

        def read(tensor: Tensor, *args: Any) -> None:
            raise HostWaitError("a value is read by the host: all of a tensor")

        methods = {"record_stream": record_stream, "tolist": read, "numpy": read}
        for name, method in methods.items():
            self._patches.enter_context(mock.patch.object(Tensor, name, method))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run it, and write down what it needs to be run again."""
        kwargs = kwargs or {}
        if _needs_a_value(func, args, kwargs):
            raise HostWaitError(f"a value is read by the host: {func}")
        for tensor in _tensors((args, kwargs)):
            self._remember(tensor)
        result = func(*args, **kwargs)
        if _is_view(func) or any(tensor.is_meta for tensor in _tensors(result)):
            return result
        stream = self.current
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = storage, None
                self._owners[storage.data_ptr()] = stream
        after = frozenset(stream.waits | ({stream.last} if stream.last is not None else set()))
        stream.waits = set()
        stream.last = len(self._operations)
        self._operations.append(Operation(stream, func, args, kwargs, result, after))
        return result

    @torch.no_grad()
    def replay(self, seed: int) -> None:
        """Put all memory back as it was and do everything again, in another order."""
        for storage, before in self._before.values():
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            flat.fill_(NONSENSE) if before is None else flat.copy_(before)
        chooser = random.Random(seed)
        waiting, done = list(range(len(self._operations))), set[int]()
        favourite = chooser.choice(self._streams())
        while waiting:
            ready = [index for index in waiting if self._operations[index].after <= done]
            if chooser.random() < 0.1:
                favourite = chooser.choice(self._streams())
            preferred = [i for i in ready if self._operations[i].stream is favourite] or ready
            index = chooser.choice(preferred)
            self._run(self._operations[index])
            waiting.remove(index)
            done.add(index)

    def forget_kept(self) -> None:
        """As if ``Tensor.record_stream`` had never been called."""
        self._kept.clear()

    def strays(self) -> list[str]:
        """Operations on memory of another stream, which could give it away while they run.

        Memory that existed before the recording is not listed.
        """
        found = []
        for operation in self._operations:
            for tensor in _tensors((operation.args, operation.kwargs)):
                address = tensor.untyped_storage().data_ptr()
                owner = self._owners.get(address, operation.stream)
                if owner is not operation.stream and (address, operation.stream) not in self._kept:
                    found.append(f"{operation.function} on {operation.stream.name}")
        return found

    def _streams(self) -> list[Stream]:
        return list(dict.fromkeys(operation.stream for operation in self._operations))

    @staticmethod
    def _run(operation: Operation) -> None:
        given = {id(tensor) for tensor in _tensors((operation.args, operation.kwargs))}
        again = operation.function(*operation.args, **operation.kwargs)
        for old, new in zip(_tensors(operation.result), _tensors(again), strict=True):
            if id(old) not in given:  # not the result of an operation in place
                old.copy_(new)

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if not tensor.is_meta and storage.data_ptr() not in self._before:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[storage.data_ptr()] = storage, flat.clone()

    def _make_future(self, devices: Sequence[Any]) -> Future:
        return Future(self)

    @contextlib.contextmanager
    def _use(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()


class Future:
    """As ``torch.futures.Future`` with a device: its result comes with an event."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._result: Any = None
        self._event: Event | None = None

    def set_result(self, result: Any) -> None:
        """Record an event on the current stream."""
        self._result = result
        self._event = self._recorder.current.record_event()

    def wait(self) -> Any:
        """Let the current stream wait for the event; the host goes on."""
        assert self._event is not None
        self._recorder.current.wait_event(self._event)
        return self._result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _needs_a_value(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the result, or its shape, depends on values that a GPU would have to send first."""
    packet = func.overloadpacket
    if packet in (aten.index, aten.index_put, aten.index_put_):
        return any(tensor.dtype == torch.bool for tensor in _tensors(args[1]))
    return packet in HOST_READS or (packet is aten._to_copy and "device" in kwargs)


def _is_view(func: Any) -> bool:
    """Whether it only gives another shape to the memory of an argument."""
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias and not alias.is_write for alias in aliases)
