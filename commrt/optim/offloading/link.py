"""The link between host and device: copies in both directions, counted and, if asked, slowed."""

from __future__ import annotations

import errno
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from commrt.collectives import order
from commrt.errors import ConfigError
from commrt.optim.offloading.lanes import Done, Lane, StreamLane, ThreadLane


class FileRange(NamedTuple):
    """Bytes of a file, which are copied by system calls: they say if the disk fails.

    Attributes:
        file: Its descriptor.
        begin: The first.
        end: After the last.
    """

    file: int
    begin: int
    end: int

    def read(self, to: Tensor) -> None:
        """Into contiguous memory of as many bytes."""
        self._transfer(to, os.preadv)

    def write(self, source: Tensor) -> None:
        """From contiguous memory of as many bytes."""
        self._transfer(source, os.pwritev)

    def _transfer(self, memory: Tensor, call: Callable[[int, list[Any], int], int]) -> None:
        view, done = memoryview(memory.numpy().data), 0
        while done < self.end - self.begin:
            count = call(self.file, [view[done:]], self.begin + done)
            if count == 0:
                raise OSError(errno.EIO, "the file of the state has become shorter")
            done += count


class Copy(NamedTuple):
    """Where bytes are copied to, and from.

    Attributes:
        to: Contiguous.
        source: Contiguous, of as many bytes and the same dtype.
        through: Host memory between a file and a device.
    """

    to: Tensor | FileRange
    source: Tensor | FileRange
    through: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """That are copied."""
        tensor = self.source if isinstance(self.source, Tensor) else self.to
        assert isinstance(tensor, Tensor)
        return tensor.nbytes


Copies = Sequence[Copy]

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def copy(copies: Copies) -> None:
    """Where a GPU is at one end, on the current stream."""
    for to, source, through in copies:
        if isinstance(source, FileRange):
            assert isinstance(to, Tensor)
            there = to if through is None else through
            source.read(there)
            if through is not None:
                to.copy_(through, non_blocking=True)
        elif isinstance(to, FileRange):
            if through is not None:
                through.copy_(source)
            to.write(source if through is None else through)
        else:
            to.copy_(source, non_blocking=True)


class Mover(Protocol):
    """Copies in one direction."""

    def move(
        self, copies: Copies, after: Sequence[Done] = (), then: Callable[[], None] | None = None
    ) -> Done:
        """Queue copies.

        Args:
            copies: Which.
            after: What has to be done before.
            then: What is to be done with them on arrival.
        """


class Direction:
    """A copy engine: copies one after the other.

    Args:
        lane: Where it copies.
        rate: Bytes a second that it is held to; infinite for as fast as it goes.

    Attributes:
        num_bytes: That have been copied, or are queued.
    """

    def __init__(self, lane: Lane, rate: float) -> None:
        self._lane, self._rate = lane, rate
        self._free_at = 0.0
        self.num_bytes = 0

    def move(
        self,
        copies: Copies,
        after: Sequence[Done] = (),
        then: Callable[[], None] | None = None,
    ) -> Done:
        """See :class:`Mover`; of tensors."""
        num_bytes = sum(one.num_bytes for one in copies)
        self.num_bytes += num_bytes
        ends = [end for one in copies for end in (one.to, one.source)]
        self._lane.uses([end for end in ends if isinstance(end, Tensor)])

        def carry() -> None:
            begin = time.perf_counter()
            copy(copies)
            self._wait_for_the_link(begin, num_bytes)
            if then is not None:
                then()

        return self._lane.run(carry, after)

    def close(self) -> None:
        """End, after what is queued."""
        self._lane.close()

    def _wait_for_the_link(self, begin: float, num_bytes: int) -> None:
        if not math.isfinite(self._rate):
            return
        self._free_at = max(begin, self._free_at) + num_bytes / self._rate
        left = self._free_at - time.perf_counter()
        if left > 0:
            time.sleep(left)


class Link:
    """Both directions between the host and a device.

    On a GPU a stream for each. On a CPU it is emulated: a thread copies for each direction, and
    takes at least the time that the rate gives.

    Args:
        device: Of the parameters.
        rate: Bytes a second in each direction; None for that of the hardware.

    Attributes:
        device: Of the parameters.
        up: From the host to the device.
        down: From the device to the host.
        is_emulated: Whether there is no such link here.

    Raises:
        ConfigError: A rate is given where there is a GPU.
    """

    def __init__(self, device: torch.device, rate: float | None) -> None:
        self.device = device
        self.is_emulated = not order.is_queued(device)
        if rate is not None and not self.is_emulated:
            raise ConfigError(f"link_rate={rate:g}: must be None on {device}, whose link is real")
        self.rate = math.inf if rate is None else rate
        self.up, self.down = (
            Direction(_lane(device, name), self.rate) for name in ("commrt-up", "commrt-down")
        )

    def close(self) -> None:
        """End, after what is queued."""
        self.up.close()
        self.down.close()


class Reading:
    """From a file through host memory to the device.

    Args:
        up: The link.
    """

    def __init__(self, up: Direction) -> None:
        self._up, self._lane = up, ThreadLane("commrt-read", num_threads=1)

    def move(
        self, copies: Copies, after: Sequence[Done] = (), then: Callable[[], None] | None = None
    ) -> Done:
        """See :class:`Mover`."""

        def read() -> Done:
            copy([Copy(_memory(one), one.source) for one in copies])
            return self._up.move([Copy(one.to, _memory(one)) for one in copies], (), then)

        return self._lane.run(read, after)

    def close(self) -> None:
        """End, after what is queued."""
        self._lane.close()


class Writing:
    """From the device through host memory to a file.

    Args:
        down: The link.
    """

    def __init__(self, down: Direction) -> None:
        self._down, self._lane = down, ThreadLane("commrt-write", num_threads=1)

    def move(
        self, copies: Copies, after: Sequence[Done] = (), then: Callable[[], None] | None = None
    ) -> Done:
        """See :class:`Mover`."""

        def write() -> None:
            copy([Copy(one.to, _memory(one)) for one in copies])
            if then is not None:
                then()

        here = self._down.move([Copy(_memory(one), one.source) for one in copies], after)
        return self._lane.run(write, (here,))

    def close(self) -> None:
        """End, after what is queued."""
        self._lane.close()


def _memory(one: Copy) -> Tensor:
    assert one.through is not None
    return one.through


def _lane(device: torch.device, name: str) -> Lane:
    return StreamLane(device) if order.is_queued(device) else ThreadLane(name, num_threads=1)


def parse_rate(rate: float | str | None) -> float | None:
    """Bytes a second, of a number or a text such as "12GB/s".

    Raises:
        ConfigError: It is neither.
    """
    if rate is None:
        return None
    match = re.fullmatch(r"([0-9.]+(?:e[+]?[0-9]+)?) *([kMGT]?)(?:B/s)?", str(rate))
    try:
        value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ConfigError(f"link rate {rate!r}: must be bytes a second, such as 12GB/s")
    return value
