"""Whether tensors are what they were: versions do not count all that changes one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 8


def checksum(values: Tensor, start: int = 0) -> Tensor:
    """Sum of a tensor's bits, in words of 64 of them; those of its parts add up to it.

    Args:
        values: fp32, bf16 or fp16.
        start: Place of the first element in the whole tensor.
    """
    flat = values.contiguous().view(-1)
    size = flat.element_size()
    phase = start * size % _WORD
    if phase or flat.storage_offset() * size % _WORD or flat.numel() * size % _WORD:
        before, words = phase // size, -(-(phase + flat.numel() * size) // _WORD)
        padded = flat.new_zeros(words * _WORD // size)
        padded[before : before + flat.numel()] = flat
        flat = padded
    return flat.view(torch.int64).sum()


def differ(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether the checksums of each pair do; waits for the device once."""
    if not pairs:
        return []
    differences = torch.stack([one - other for one, other in pairs])
    return [bool(difference) for difference in differences.tolist()]
