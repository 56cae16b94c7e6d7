"""Machines that decode for one server together, each the updates of some clients."""

from collections.abc import Mapping, Sequence
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

    def all_to_all(self, parts: Sequence[bytes]) -> list[bytes]:
        """Give every one a part; what every one has for this one, by rank."""

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

    def all_to_all(self, parts: Sequence[bytes]) -> list[bytes]:
        """See :meth:`Peers.all_to_all`."""
        return list(parts)

    def sum_(self, flat: Tensor) -> None:
        """See :meth:`Peers.sum_`: it is the sum."""


ALONE = Alone()


def gather(peers: Peers, part: bytes) -> list[bytes]:
    """What every one gives, by rank, at the first one; nothing elsewhere."""
    found = peers.all_to_all([part] + [b""] * (peers.size - 1))
    return [] if peers.rank else found
