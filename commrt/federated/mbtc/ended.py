"""What is left of an update once it is in the mean: what the server learns from."""

import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from commrt.federated.mbtc.rate import Coded, Energy
from commrt.federated.peers import Peers, gather
from commrt.federated.wire import Reader

_FORM = "<qdddd?qqqqq"


class Ended(NamedTuple):
    """Of a client's update.

    Attributes:
        client: Whose.
        coded: How it was coded.
        tag: Of the client's new history; 0 if none was kept.
        missing: Blocks that could not be decoded.
        residual: fp32 (N,), what was not predicted; None of a large cohort.
        predicted: fp32 (N,), what was; None unless the mean is estimated.
        bits_alone: Bits a weight that the codes of each group take without the other clients; empty
            where there can be no joint decoding.
    """

    client: int
    coded: Coded
    tag: int
    missing: int
    residual: Tensor | None
    predicted: Tensor | None = None
    bits_alone: tuple[float, ...] = ()


def gathered(peers: Peers, ended: Sequence[Ended]) -> list[Ended]:
    """Those of all peers, in the order of clients, at the first one; nothing elsewhere.

    Cost: of each client 4 bytes a weight to the first peer, and 4 more if its mean is estimated;
    none of those in a large cohort.
    """
    if peers.size == 1:
        return list(ended)
    if peers.rank:
        gather(peers, b"".join(itertools.chain.from_iterable(map(_packed, ended))))
        return []
    others = itertools.chain.from_iterable(map(_unpacked, gather(peers, b"")))
    return sorted([*ended, *others], key=lambda each: each.client)


def _packed(each: Ended) -> Iterator[bytes | memoryview]:
    coded = each.coded
    flats = [
        b"" if flat is None else flat.numpy().data.cast("B")
        for flat in (each.residual, each.predicted)
    ]
    yield struct.pack(
        _FORM,
        each.client,
        coded.noise,
        coded.bits,
        *coded.energy,
        coded.is_chosen,
        each.tag,
        each.missing,
        *map(len, flats),
        len(each.bits_alone),
    )
    yield from flats
    yield struct.pack(f"<{len(each.bits_alone)}d", *each.bits_alone)


def _unpacked(part: bytes) -> Iterator[Ended]:
    reader = Reader(part)
    while reader.left:
        head = struct.unpack(_FORM, reader.take(struct.calcsize(_FORM)))
        client, noise, bits, update, left, is_chosen, tag, missing, *sizes, num_alone = head
        residual, predicted = (_tensor(reader.take(size)) for size in sizes)
        alone = reader.unpack(f"{num_alone}d")
        coded = Coded(noise, bits, Energy(update, left), is_chosen)
        yield Ended(client, coded, tag, missing, residual, predicted, alone)


def _tensor(data: bytes) -> Tensor | None:
    return torch.frombuffer(bytearray(data), dtype=torch.float32) if data else None
