"""What both ends have: dithers, masks, contexts of frames, lists of clients."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from commrt.codecs import derive_seed
from commrt.codecs.uniforms import uniforms
from commrt.errors import WireFormatError
from commrt.federated.independent import MOST_CLIENTS
from commrt.federated.layout import Layout
from commrt.federated.wire import Reader, context_of, varint

if TYPE_CHECKING:
    from commrt.federated.secure.spec import SecureUplink

_WORD_BITS = 64

Pairs = Callable[[int], int]
"""By the other client's number: the secret that the two share, in [0, 2**63)."""


@dataclasses.dataclass(frozen=True)
class Ends:
    """What both ends have."""

    uplink: SecureUplink
    layout: Layout
    seed: int

    def context(self, round_index: int, client: int, previous: Tensor | None) -> bytes:
        """Of a client's frames; ``previous`` as :meth:`predicted` returned it."""
        state = 0 if previous is None else zlib.crc32(previous.numpy().tobytes())
        spec, digest = self.uplink.spec, self.layout.digest
        return context_of(spec, digest, self.seed, round_index, client, previous is None, state)

    def predicted(self, previous: Tensor | None) -> Tensor | None:
        """What predictions are made from; None where there are none."""
        if previous is None or not self.uplink.predict:
            return None
        return self.layout.check(previous, "previous").cpu()

    def rotation(self, round_index: int) -> int:
        """The seed of the round's rotation, which all share."""
        return derive_seed("secure rotation", self.seed, round_index)

    def dither(self, round_index: int, client: int) -> Tensor:
        """On [-1/2, 1/2), float64: sums of them are exact."""
        seed = derive_seed("secure dither", self.seed, round_index, client)
        return uniforms(seed, self.layout.numel).double().sub_(0.5)

    def mask(self, seed: int, one: int, other: int) -> Tensor:
        """What client ``one`` adds for ``other``: int64 (N,)."""
        bits, numel = self.uplink.bits, self.layout.numel
        shifts = np.arange(0, _WORD_BITS - bits + 1, bits, dtype=np.uint64)
        # Many masks are drawn: numpy's words take a tenth of the time of `random_words`.
        words = np.random.Philox(key=seed).random_raw(-(-numel // len(shifts)))
        fields = (words[:, None] >> shifts).reshape(-1)[:numel] & np.uint64(self.uplink.modulus - 1)
        mask = torch.from_numpy(fields.astype(np.int64))
        return mask if one < other else mask.neg_()


def write_clients(clients: tuple[int, ...]) -> bytes:
    """Ascending numbers, as their differences."""
    gaps = (client - before for client, before in zip(clients, (0, *clients), strict=False))
    return varint(len(clients)) + b"".join(map(varint, gaps))


def read_clients(reader: Reader) -> tuple[int, ...]:
    """What :func:`write_clients` wrote, to the end of the body.

    Raises:
        WireFormatError: It is no such list.
    """
    clients: list[int] = []
    for _ in range(reader.varint(MOST_CLIENTS)):
        gap = reader.varint(2**63 - 1)
        if clients and not gap:
            raise WireFormatError(f"client {clients[-1]} is said twice")
        clients.append(gap + (clients[-1] if clients else 0))
    reader.end()
    return tuple(clients)
