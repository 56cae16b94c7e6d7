"""Machines that decode for one server together, each the updates of some clients."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """What a server asks of the machines it runs on; all of them make the same calls.

    Attributes:
        rank: Of this one, from 0. The first one decides what is decided once.
        size: How many there are.
    """

    rank: int
    size: int

    def broadcast(self, frames: Mapping[int, bytes] | None) -> dict[int, bytes]:
        """What the first one has for clients, on every one; None elsewhere."""

    def all_gather(self, part: bytes) -> list[bytes]:
        """What every one gives, by rank."""

    def sum_(self, flat: Tensor) -> None:
        """Replace a contiguous tensor by its sum over all; int64, or float64 of whole numbers."""


class Alone:
    """One machine without others."""

    rank, size = 0, 1

    def broadcast(self, frames: Mapping[int, bytes] | None) -> dict[int, bytes]:
        """See :meth:`Peers.broadcast`."""
        assert frames is not None
        return dict(frames)

    def all_gather(self, part: bytes) -> list[bytes]:
        """See :meth:`Peers.all_gather`."""
        return [part]

    def sum_(self, flat: Tensor) -> None:
        """See :meth:`Peers.sum_`: it is the sum."""


ALONE = Alone()
