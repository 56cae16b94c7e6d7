"""Integers near zero to few bytes: a static table and rANS, or Elias gamma where that is less.

The payload starts with a bit that says which. With rANS, the table follows as gamma numbers, and
with it the magnitudes that have no entry of their own; a vector of a few hundred elements does not
repay its table. Magnitudes share an entry whatever their sign, which halves the table.
"""

import numpy as np

from commrt.errors import WireFormatError
from commrt.federated.baselines.elias import gamma_bits, gamma_size, read_gamma
from commrt.federated.baselines.rans import (
    LANE_BITS,
    TOTAL_BITS,
    num_lanes,
    rans_decode,
    rans_encode,
)

_TOTAL = 1 << TOTAL_BITS
# The largest magnitude with an entry of its own; it stands for all above it as well.
_CAP = 127
_GAMMA, _RANS = 0, 1
# More than any payload of encode_symbols has: 33 + 32 bits of gamma code a symbol, and a table.
_MAX_BYTES_A_SYMBOL = 16
_MAX_TABLE_BYTES = 1024


def encode_symbols(symbols: np.ndarray, *, is_signed: bool = True) -> bytes:
    """Code integers of magnitudes below 2**31, not negative unless ``is_signed``.

    Cost: their empirical entropy, where the sign of a magnitude costs a bit, plus about 10 bits for
    each magnitude up to the largest or 127, and 0.005 bits a symbol.
    """
    if not len(symbols):
        return b""
    magnitudes = np.abs(symbols)
    capped = np.minimum(magnitudes, _CAP)
    counts = np.bincount(capped)
    frequencies = _frequencies(counts, is_signed)
    table = _table_bits(frequencies)
    excess = _excess_bits(magnitudes)
    if _gamma_cost(magnitudes, is_signed) < _rans_cost(counts, frequencies) + table.size + len(
        excess
    ):
        signs = (symbols[symbols != 0] < 0).astype(np.uint8) if is_signed else []
        return _pack_bits([[_GAMMA], gamma_bits(magnitudes + 1), signs])
    top = len(counts) - 1
    indices = np.copysign(capped, symbols).astype(np.int64) + top if is_signed else capped
    head = _pack_bits([[_RANS], table, excess])
    return head + rans_encode(indices, _of_symbols(frequencies, is_signed))


def decode_symbols(data: np.ndarray, count: int, *, is_signed: bool = True) -> np.ndarray:
    """Decode ``count`` integers, int64, of all the bytes ``data``.

    Raises:
        WireFormatError: For bytes that no ``count`` integers have.
    """
    if len(data) > count * _MAX_BYTES_A_SYMBOL + (_MAX_TABLE_BYTES if count else 0):
        raise WireFormatError(f"payload has {len(data)} bytes: too many for {count} symbols")
    if not count:
        return np.empty(0, np.int64)
    bits = np.unpackbits(data, bitorder="little")
    if not len(bits):
        raise WireFormatError("payload ends before its symbols")
    read = _read_rans if bits[0] == _RANS else _read_gamma
    return read(data, bits[1:], count, is_signed)


def _read_gamma(data: np.ndarray, bits: np.ndarray, count: int, is_signed: bool) -> np.ndarray:
    del data
    numbers, bits = read_gamma(bits, count)
    symbols = numbers - 1
    if is_signed:
        is_other = symbols != 0
        num_signs = int(is_other.sum())
        signs, bits = bits[:num_signs], bits[num_signs:]
        if len(signs) < num_signs:
            raise WireFormatError("payload ends within its signs")
        symbols[is_other] *= 1 - 2 * signs.astype(np.int64)
    _check_padding(bits)
    return symbols


def _read_rans(data: np.ndarray, bits: np.ndarray, count: int, is_signed: bool) -> np.ndarray:
    frequencies, bits = _read_table(bits, is_signed)
    excess, bits = _read_excess(bits, count, len(frequencies))
    num_bytes = len(bits) // 8  # whole ones; the symbols start with the first of them
    _check_padding(bits[: len(bits) % 8])
    of_symbols = _of_symbols(frequencies, is_signed)
    indices = rans_decode(data[len(data) - num_bytes :], count, of_symbols)
    symbols = indices - (len(frequencies) - 1) if is_signed else indices
    is_capped = np.abs(symbols) == _CAP
    if int(is_capped.sum()) != len(excess):
        raise WireFormatError("payload has another number of large symbols than it says")
    symbols[is_capped] += np.sign(symbols[is_capped]) * excess
    return symbols


def _frequencies(counts: np.ndarray, is_signed: bool) -> np.ndarray:
    """Of one symbol of each magnitude; the zeros have what the others leave of 2**14."""
    copies = np.where((np.arange(len(counts)) > 0) & is_signed, 2, 1)
    shares = np.rint(counts / (copies * counts.sum()) * _TOTAL).astype(np.int64)
    frequencies = np.where(counts > 0, np.maximum(shares, 1), 0)
    frequencies[0] = 0
    least = int(counts[0] > 0)
    while (left := _TOTAL - int((copies * frequencies).sum())) < least:
        # Rounding gave too much away: the most frequent miss it least.
        largest = int(frequencies.argmax())
        surplus = -((left - least) // int(copies[largest]))
        frequencies[largest] -= min(surplus, int(frequencies[largest]) // 2)
    frequencies[0] = left
    return frequencies


def _of_symbols(frequencies: np.ndarray, is_signed: bool) -> np.ndarray:
    """Frequencies of the symbols in ascending order."""
    return np.concatenate([frequencies[:0:-1], frequencies]) if is_signed else frequencies


def _table_bits(frequencies: np.ndarray) -> np.ndarray:
    length = gamma_bits(np.array([len(frequencies)]))
    return np.concatenate([length, gamma_bits(frequencies[1:] + 1)])


def _read_table(bits: np.ndarray, is_signed: bool) -> tuple[np.ndarray, np.ndarray]:
    (length,), bits = read_gamma(bits, 1)
    if length > _CAP + 1:
        raise WireFormatError(f"payload has a table of {length}: at most {_CAP + 1} are allowed")
    numbers, bits = read_gamma(bits, int(length) - 1)
    others = numbers - 1
    left = _TOTAL - int(others.sum()) * (2 if is_signed else 1)
    if left < 0:
        raise WireFormatError(f"payload has frequencies that sum to more than {_TOTAL}")
    return np.array([left, *others]), bits


def _excess_bits(magnitudes: np.ndarray) -> np.ndarray:
    """How many magnitudes the cap holds, and how far each is above it; nothing where none is."""
    above = magnitudes[magnitudes >= _CAP] - _CAP
    if not len(above):
        return np.empty(0, np.uint8)
    return np.concatenate([gamma_bits(np.array([len(above)])), gamma_bits(above + 1)])


def _read_excess(bits: np.ndarray, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    if length <= _CAP:
        return np.empty(0, np.int64), bits
    (num_above,), bits = read_gamma(bits, 1)
    if num_above > count:
        raise WireFormatError(f"payload has {num_above} large symbols of {count}")
    numbers, bits = read_gamma(bits, int(num_above))
    return numbers - 1, bits


def _gamma_cost(magnitudes: np.ndarray, is_signed: bool) -> int:
    signs = int(np.count_nonzero(magnitudes)) if is_signed else 0
    return int(gamma_size(magnitudes + 1).sum()) + signs


def _rans_cost(counts: np.ndarray, frequencies: np.ndarray) -> float:
    used = counts > 0
    bits = TOTAL_BITS - np.log2(frequencies[used])
    return float(counts[used] @ bits) + LANE_BITS * num_lanes(int(counts.sum()))


def _pack_bits(parts: list[np.ndarray | list[int]]) -> bytes:
    bits = np.concatenate([np.asarray(part, np.uint8) for part in parts])
    return np.packbits(bits, bitorder="little").tobytes()


def _check_padding(bits: np.ndarray) -> None:
    """At most seven zeros fill the last byte."""
    if len(bits) > 7 or bits.any():
        raise WireFormatError("payload has bits after its last number")
