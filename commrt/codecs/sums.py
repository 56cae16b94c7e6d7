"""Sums in a fixed order, so that every machine and number of threads gets the same bits."""

import torch
from torch import Tensor


def tree_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, in fp64: halves are added until one element is left.

    Args:
        values: Any shape (..., K) and float dtype.

    Returns:
        float64 (...).
    """
    total = values.double()
    while total.shape[-1] > 1:
        if total.shape[-1] % 2:
            total = torch.nn.functional.pad(total, (0, 1))
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total.sum(dim=-1)  # of one element, or none
