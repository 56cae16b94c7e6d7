"""Codes of the points of E8 as integers that the tables of a scalar quantizer fit.

A point lambda of E8, near t + u of eight residuals t in steps and their dithers u, is told by

- whether its coordinates are whole or halves, a bit;
- seven coordinates, whole numbers m with lambda = m or m + 1/2;
- the eighth: all m add up to an even number, so that the parity of the seven is known and only
  j of m = 2 j + parity is left to say, in a lattice twice as coarse.

A coordinate m is near t + c with c = u or u - 1/2, a dither that both ends know. With the nearest
integer s of c, m - s is the code of a scalar quantizer with the dither c - s, in [-1/2, 1/2): the
residual and the phase of that dither give its table. At low rates a point of E8 is near to fewer
others than a cube has neighbours, and the bit costs 1/8 a coordinate: E8 is for a bit and more.

Source: Conway and Sloane, "Sphere Packings, Lattices and Groups", chapter 4.8, for E8 as two cosets
of D8.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from commrt.codecs.code_tables import NUM_PHASES, NUM_SCALES, SCALES_PER_OCTAVE
from commrt.codecs.entropy import decode_codes, encode_codes
from commrt.errors import WireFormatError

DIMENSION = 8
LENGTH_BYTES = 4
# Of codes, twice the coordinates.
MOST_COORDINATE = 32767


class Scales(NamedTuple):
    """What the tables of a vector of points depend on.

    Attributes:
        dither: u, fp32 (N,), N a multiple of 8.
        firsts: int16 (N,), the first of the 16 rows that each residual has.
    """

    dither: Tensor
    firsts: Tensor


class _Folded(NamedTuple):
    """Dithers c as those of a scalar quantizer: s, the nearest integers, and the rows of c - s."""

    nearest: Tensor
    rows: Tensor


def encode_points(codes: Tensor, scales: Scales) -> bytes:
    """The payload of points. Lossless and deterministic.

    Args:
        codes: int16 (N,), twice the coordinates, as :func:`commrt.ops.dither_quantise` has them.
        scales: Of the residuals.

    Cost: an eighth of a bit a coordinate, what the tables say, and about 10 bytes.
    """
    points = codes.view(-1, DIMENSION)
    halves = points[:, :1] & 1
    whole = points - halves >> 1
    seven, parity = _seven(halves, scales), whole[:, :-1].sum(dim=1, keepdim=True) & 1
    eighth = _eighth(halves, parity, scales)
    first = _encode(whole[:, :-1], seven)
    second = _encode(whole[:, -1:] - parity >> 1, eighth)
    bits = np.packbits(halves.cpu().numpy().astype(np.uint8), bitorder="little").tobytes()
    return b"".join((bits, len(first).to_bytes(LENGTH_BYTES, "little"), first, second))


def decode_points(payload: bytes, scales: Scales) -> Tensor:
    """The codes that :func:`encode_points` was given, int16 (N,).

    Raises:
        WireFormatError: The payload is not one of N coordinates of these scales.
    """
    count = scales.dither.numel() // DIMENSION
    begin = -(-count // 8) + LENGTH_BYTES
    if len(payload) < begin:
        raise WireFormatError(f"{len(payload)} bytes of points: {begin} are the least")
    bits = np.frombuffer(payload, dtype=np.uint8, count=begin - LENGTH_BYTES)
    halves = torch.from_numpy(np.unpackbits(bits, count=count, bitorder="little").astype(np.int16))
    halves = halves.view(-1, 1).to(scales.dither.device)
    end = begin + int.from_bytes(payload[begin - LENGTH_BYTES : begin], "little")
    body = _decode(payload[begin:end], _seven(halves, scales))
    parity = body.sum(dim=1, keepdim=True) & 1
    last = 2 * _decode(payload[end:], _eighth(halves, parity, scales)) + parity
    points = 2 * torch.cat([body, last], dim=1) + halves.long()
    if points.numel() and int(points.abs().max()) > MOST_COORDINATE:
        raise WireFormatError(f"a point at {int(points.abs().max()) / 2}: has no such coordinate")
    return points.to(torch.int16).view(-1)


def scalar_codes(codes: Tensor, dither: Tensor) -> tuple[Tensor, Tensor]:
    """Each coordinate as the code and the phase, int16 (N,), that a scalar quantizer would have.

    For what is learned from them: that the eighth follows in part from the others is left out.
    """
    points = codes.view(-1, DIMENSION)
    halves = points[:, :1] & 1
    nearest, phases = _fold(dither.view(-1, DIMENSION) - halves * 0.5)
    return ((points - halves >> 1) - nearest).view(-1), phases.view(-1)


def _seven(halves: Tensor, scales: Scales) -> _Folded:
    """Of the first seven coordinates, (B, 7)."""
    dither, firsts = (each.view(-1, DIMENSION)[:, :-1] for each in scales)
    nearest, phases = _fold(dither - halves * 0.5)
    return _Folded(nearest, firsts + phases)


def _eighth(halves: Tensor, parity: Tensor, scales: Scales) -> _Folded:
    """Of the last one, (B, 1): the residual is of half as many steps."""
    dither, firsts = (each.view(-1, DIMENSION)[:, -1:] for each in scales)
    nearest, phases = _fold((dither - halves * 0.5 - parity) * 0.5)
    scale = firsts // NUM_PHASES % NUM_SCALES
    lower = firsts - NUM_PHASES * scale.clamp(max=SCALES_PER_OCTAVE)
    return _Folded(nearest, lower + phases)


def _fold(dither: Tensor) -> tuple[Tensor, Tensor]:
    nearest = torch.floor(dither + 0.5)
    phases = torch.floor((dither - nearest + 0.5) * NUM_PHASES).clamp(0, NUM_PHASES - 1)
    return nearest.to(torch.int16), phases.to(torch.int16)


def _encode(whole: Tensor, folded: _Folded) -> bytes:
    codes = whole.long() - folded.nearest
    return encode_codes(codes.to(torch.int16).reshape(-1), folded.rows.reshape(-1))


def _decode(payload: bytes, folded: _Folded) -> Tensor:
    """int64, of the shape of the rows."""
    codes = decode_codes(payload, folded.rows.reshape(-1), folded.rows.numel())
    return codes.view(folded.rows.shape).long() + folded.nearest
