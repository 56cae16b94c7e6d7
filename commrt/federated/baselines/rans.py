"""Interleaved range asymmetric numeral systems, vectorised over lanes: symbols to 16-bit words.

Symbol j belongs to lane j % lanes, which all write to one stream of words.

Source: Duda, "Asymmetric numeral systems", arXiv 1311.2540; Giesen, "Interleaved entropy coders",
arXiv 1402.3392.
"""

import numpy as np

from commrt.errors import WireFormatError

TOTAL_BITS = 14
"""Frequencies of all symbols sum to 2**14."""
LANE_BITS = 32
"""What a lane costs: its last state."""

_SYMBOLS_A_LANE = 4096
_WORD_BITS = 16
_LOW = 1 << 16  # states are in [_LOW, _LOW << 16)
_FULL_SHIFT = 32 - TOTAL_BITS


def num_lanes(count: int) -> int:
    """Lanes of ``count`` symbols: few enough that their states are under 0.01 bit a symbol."""
    return max(1, count // _SYMBOLS_A_LANE)


def rans_encode(symbols: np.ndarray, frequencies: np.ndarray) -> bytes:
    """Code symbols in log2(2**14 / frequency) bits each.

    Args:
        symbols: Integers (N,), indices into ``frequencies``.
        frequencies: Integers (A,) that sum to 2**14; above 0 for each symbol that occurs.

    Returns:
        The lanes' states, then the words in the order of decoding.
    """
    count, lanes = len(symbols), num_lanes(len(symbols))
    starts = np.cumsum(frequencies) - frequencies
    frequency = frequencies.astype(np.uint32)[symbols]
    start = starts.astype(np.uint32)[symbols]
    rest = (1 << TOTAL_BITS) - frequency
    states = np.full(lanes, _LOW, np.uint32)
    words = []
    for first in reversed(range(0, count, lanes)):
        now = slice(first, min(first + lanes, count))
        state = states[: now.stop - first]  # in place
        is_full = state >> _FULL_SHIFT >= frequency[now]
        words.append(state[is_full].astype("<u2"))
        state >>= is_full.astype(np.uint32) * _WORD_BITS
        state += state // frequency[now] * rest[now] + start[now]
    return b"".join([states.astype("<u4").tobytes(), *(part.tobytes() for part in words[::-1])])


def rans_decode(data: np.ndarray, count: int, frequencies: np.ndarray) -> np.ndarray:
    """Decode ``count`` symbols, int64, of all the bytes ``data``.

    Raises:
        WireFormatError: Unless the words are used up and all lanes are back where they started.
    """
    lanes = num_lanes(count)
    head = lanes * LANE_BITS // 8
    if len(data) < head or len(data) % 2:
        raise WireFormatError(f"payload has {len(data)} bytes of symbols: needs {head} and words")
    states = data[:head].view("<u4").astype(np.uint32)
    words = data[head:].view("<u2").astype(np.uint32)
    symbol_of, frequency_of, offset_of = _slots(frequencies)
    symbols = np.empty(count, np.int64)
    at = 0
    for first in range(0, count, lanes):
        state = states[: min(lanes, count - first)]  # in place
        slot = state & ((1 << TOTAL_BITS) - 1)
        symbols[first : first + lanes] = symbol_of[slot]
        state[:] = frequency_of[slot] * (state >> TOTAL_BITS) + offset_of[slot]
        is_low = state < _LOW
        num_low = int(np.count_nonzero(is_low))
        if at + num_low > len(words):
            raise WireFormatError("payload ends before its last symbol")
        state[is_low] = state[is_low] << _WORD_BITS | words[at : at + num_low]
        at += num_low
    if at != len(words) or bool((states != _LOW).any()):
        raise WireFormatError("payload has symbols that nothing encodes to")
    return symbols


def _slots(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By slot: its symbol, that symbol's frequency, and how far into the symbol the slot lies."""
    symbol = np.repeat(np.arange(len(frequencies)), frequencies)
    starts = np.cumsum(frequencies) - frequencies
    offset = np.arange(1 << TOTAL_BITS) - starts[symbol]
    return symbol, frequencies.astype(np.uint32)[symbol], offset.astype(np.uint32)
