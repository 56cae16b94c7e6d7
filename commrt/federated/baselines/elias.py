"""Elias gamma code, with the lengths of all numbers in front, so that no number waits for another.

Source: Elias, "Universal Codeword Sets and Representations of the Integers", IEEE Trans. Inf.
Theory 1975.
"""

import numpy as np

from commrt.errors import WireFormatError

_MAX_LENGTH = 32  # of a number in bits


def gamma_bits(numbers: np.ndarray) -> np.ndarray:
    """Code numbers from 1 to 2**32 - 1 in 2 * floor(log2 n) + 1 bits each: uint8 of 0 and 1."""
    lengths = _lengths(numbers)
    ends = np.cumsum(lengths)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    below, firsts = _places(lengths)
    tails = np.empty(int(below.sum()), np.uint8)
    for bit in range(int(below.max(initial=0))):
        has = below > bit
        tails[firsts[has] + bit] = numbers[has] >> bit & 1
    return np.concatenate([unary, tails])


def gamma_size(numbers: np.ndarray) -> np.ndarray:
    """Bits that each number costs."""
    return 2 * _lengths(numbers) - 1


def read_gamma(bits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Take ``count`` numbers off the front of ``bits``.

    Returns:
        The numbers, int64, and the bits that are left.

    Raises:
        WireFormatError: For too few bits, or a number of more than 32 bits.
    """
    ends = np.flatnonzero(bits[: count * _MAX_LENGTH])[:count] + 1
    if len(ends) < count:
        raise WireFormatError("payload has too few numbers, or one of more than 32 bits")
    lengths = np.diff(ends, prepend=0)
    if lengths.max(initial=1) > _MAX_LENGTH:
        raise WireFormatError("payload has a number of more than 32 bits")
    below, firsts = _places(lengths)
    tails = bits[int(lengths.sum()) :]
    used = int(below.sum())
    if used > len(tails):
        raise WireFormatError("payload ends within a number")
    numbers = np.left_shift(1, below)
    for bit in range(int(below.max(initial=0))):
        has = below > bit
        numbers[has] |= tails[firsts[has] + bit].astype(np.int64) << bit
    return numbers, tails[used:]


def _lengths(numbers: np.ndarray) -> np.ndarray:
    """Bits of each number: the exponent that a float of it has."""
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64)


def _places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits below the leading one of each number, and where its first of them lies."""
    below = lengths - 1
    return below, np.cumsum(below) - below
