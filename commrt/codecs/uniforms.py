"""Counter-based random numbers: element i has the same on any machine, whatever else is drawn.

Source: Philox4x32-10, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

import numpy as np
import torch
from torch import Tensor

from commrt.ops.reference import philox

_WORDS = 4  # of a counter
_WORD_BITS = 32
_STREAM = 0
# Counters at a time, so that what ten rounds write stays in cache.
_CHUNK = 1 << 14


def random_words(seed: int, count: int) -> Tensor:
    """Uniform words: int64 (count,) in [0, 2**32). Element i has word i % 4 of counter i // 4."""
    words = torch.empty(-(-count // _WORDS), _WORDS, dtype=torch.int64)
    for first in range(0, len(words), _CHUNK):
        part = words[first : first + _CHUNK]
        part.copy_(philox(seed, _STREAM, torch.arange(first, first + len(part))))
    return words.view(-1)[:count]


def uniforms(seed: int, count: int) -> Tensor:
    """Uniform numbers: float32 (count,), multiples of 2**-24 in [0, 1)."""
    return (random_words(seed, count) >> 8).float() * 2.0**-24


def random_signs(seed: int, count: int) -> Tensor:
    """Fair signs: float32 (count,) of -1 and 1. Element i has bit i % 32 of word i // 32."""
    words = random_words(seed, -(-count // _WORD_BITS)).numpy().astype("<u4")
    bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
    return 1.0 - 2.0 * torch.from_numpy(bits).float()
