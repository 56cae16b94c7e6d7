"""A vector in pieces that are rotated one by one: whole ones of a power of two, and a last one."""

import torch
from torch import Tensor

PIECE = 1 << 14
"""Elements of a whole piece. The last one has up to twice as many, so that none is short."""


def split(flat: Tensor) -> list[Tensor]:
    """Views of ``flat`` as rows: whole pieces (B, 16384), and the last piece (1, K); none if empty.

    A vector shorter than two pieces is one piece.
    """
    num_whole = max(flat.numel() // PIECE - 1, 0)
    whole, last = flat[: num_whole * PIECE], flat[num_whole * PIECE :]
    parts = [whole.view(num_whole, PIECE), last.view(1, -1)]
    return [part for part in parts if part.numel()]


def join(pieces: list[Tensor]) -> Tensor:
    """What :func:`split` cut, in one."""
    return torch.cat([torch.empty(0), *(rows.reshape(-1) for rows in pieces)])
