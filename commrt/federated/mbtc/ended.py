"""What is left of an update once it is in the mean: what the server learns from."""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from commrt.federated.mbtc.rate import Coded, Energy
from commrt.federated.peers import Peers

_FORM = struct.Struct("<qdddd?qqq")


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
    """Those of all peers, in the order of clients; without joint decoding."""
    if peers.size == 1:
        return list(ended)
    parts = peers.all_gather(b"".join(map(_pack, ended)))
    return sorted((each for part in parts for each in _unpacked(part)), key=lambda e: e.client)


def _pack(each: Ended) -> bytes:
    coded = each.coded
    residual = b"" if each.residual is None else each.residual.numpy().tobytes()
    head = _FORM.pack(
        each.client,
        coded.noise,
        coded.bits,
        *coded.energy,
        coded.is_chosen,
        each.tag,
        each.missing,
        len(residual),
    )
    return head + residual


def _unpacked(part: bytes) -> list[Ended]:
    found, at = list[Ended](), 0
    while at < len(part):
        client, noise, bits, update, left, is_chosen, tag, missing, size = _FORM.unpack_from(
            part, at
        )
        at += _FORM.size + size
        residual = None
        if size:
            residual = torch.frombuffer(bytearray(part[at - size : at]), dtype=torch.float32)
        coded = Coded(noise, bits, Energy(update, left), is_chosen)
        found.append(Ended(client, coded, tag, missing, residual))
    return found
