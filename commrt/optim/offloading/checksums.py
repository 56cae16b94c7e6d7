"""Whether tensors are what they were: versions do not count all that changes one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {4: torch.int32, 2: torch.int16}


def checksum(values: Tensor) -> Tensor:
    """Sum of the bits of an fp32, bf16 or fp16 tensor, int64; those of its parts add up to it."""
    return values.view(_INTEGERS[values.element_size()]).sum(dtype=torch.int64)


def differ(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether the checksums of each pair do; waits for the device once."""
    if not pairs:
        return []
    differences = torch.stack([one - other for one, other in pairs])
    return [bool(difference) for difference in differences.tolist()]
