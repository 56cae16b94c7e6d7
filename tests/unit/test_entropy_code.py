"""Integers to bits and back: Elias gamma, rANS, the symbols that choose between them, pyramids."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commrt.errors import WireFormatError
from commrt.federated.baselines.elias import gamma_bits, gamma_size, read_gamma
from commrt.federated.baselines.pyramid import Pyramid
from commrt.federated.baselines.rans import TOTAL_BITS, num_lanes, rans_decode, rans_encode
from commrt.federated.baselines.symbols import decode_symbols, encode_symbols


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def entropy(symbols: np.ndarray) -> float:
    """Bits a symbol."""
    _, counts = np.unique(symbols, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def normal_integers(count: int, deviation: float) -> np.ndarray:
    return np.rint(np.random.default_rng(0).normal(0, deviation, count)).astype(np.int64)


# -- Elias gamma ----------------------------------------------------------------------------------


def test_gamma_of_small_numbers() -> None:
    """Elias 1975: 1, 010, 011, 00100; here the lengths 1, 01, 01, 001 come first, then the rest."""
    bits = gamma_bits(np.array([1, 2, 3, 4]))
    assert bits.tolist() == [1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0]


@given(st.lists(st.integers(1, 2**32 - 1), max_size=20), st.lists(st.integers(0, 1), max_size=9))
def test_gamma_comes_back(numbers: list[int], behind: list[int]) -> None:
    bits = gamma_bits(np.array(numbers, np.int64))
    assert len(bits) == gamma_size(np.array(numbers, np.int64)).sum()
    read, left = read_gamma(np.array([*bits, *behind], np.uint8), len(numbers))
    assert read.tolist() == numbers
    assert left.tolist() == behind


@pytest.mark.parametrize("bits", [[], [0] * 40, [0] * 33 + [1] * 80, [0, 0, 1, 1]])
def test_gamma_of_nothing_that_was_written(bits: list[int]) -> None:
    with pytest.raises(WireFormatError, match="number"):
        read_gamma(np.array(bits, np.uint8), 1)


# -- rANS -----------------------------------------------------------------------------------------


def frequencies_of(shares: list[float]) -> np.ndarray:
    frequencies = np.rint(np.array(shares) * (1 << TOTAL_BITS)).astype(np.int64)
    frequencies[0] += (1 << TOTAL_BITS) - frequencies.sum()
    return frequencies


@pytest.mark.parametrize("count", [1, 2, 4095, 8191, 8192, 8193, 30_001])
@pytest.mark.parametrize("shares", [[1.0], [0.999, 0.001], [0.25, 0.25, 0.5], [0.0, 0.3, 0.7]])
def test_rans_comes_back(count: int, shares: list[float]) -> None:
    symbols = np.random.default_rng(count).choice(len(shares), count, p=shares)
    frequencies = frequencies_of(shares)
    data = as_array(rans_encode(symbols, frequencies))
    assert np.array_equal(rans_decode(data, count, frequencies), symbols)


def test_rans_costs_what_its_model_says() -> None:
    count, shares = 1 << 17, [0.7, 0.2, 0.07, 0.03]
    symbols = np.random.default_rng(0).choice(4, count, p=shares)
    frequencies = frequencies_of(shares)
    model = float((TOTAL_BITS - np.log2(frequencies[symbols])).sum())
    bits = 8 * len(rans_encode(symbols, frequencies))
    assert model < bits < 1.001 * model + 32 * num_lanes(count)


@pytest.mark.parametrize("change", ["shorter", "longer", "flipped", "empty"])
def test_rans_of_other_data(change: str) -> None:
    frequencies = frequencies_of([0.3, 0.7])
    data = bytearray(rans_encode(np.arange(999) % 2, frequencies))
    if change == "flipped":
        data[5] ^= 4
    data = {"shorter": data[:-2], "longer": data + b"\1\1", "empty": b""}.get(change, data)
    with pytest.raises(WireFormatError):
        rans_decode(as_array(bytes(data)), 999, frequencies)


# -- symbols --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "symbols",
    [
        [],
        [0],
        [-7],
        [0] * 5000,
        [3] * 5000,
        [126, -127, 128, -(2**31) + 1] * 10,
        normal_integers(5000, 0.4),
        normal_integers(5000, 3.0),
        normal_integers(5000, 60.0),
        normal_integers(9000, 0.01),
        [*normal_integers(5000, 1.0), 400, -(2**20)],
    ],
    ids=lambda symbols: f"{len(symbols)}-{np.abs([0, *symbols]).max()}",
)
@pytest.mark.parametrize("is_signed", [True, False])
def test_symbols_come_back(symbols: list[int], is_signed: bool) -> None:
    array = np.array(symbols, np.int64)
    array = array if is_signed else np.abs(array)
    data = as_array(encode_symbols(array, is_signed=is_signed))
    assert np.array_equal(decode_symbols(data, len(array), is_signed=is_signed), array)


@pytest.mark.parametrize("deviation", [0.2, 0.5, 1.0, 4.0])
def test_symbols_cost_their_entropy(deviation: float) -> None:
    count = 1 << 16
    symbols = normal_integers(count, deviation)
    bits = 8 * len(encode_symbols(symbols))
    assert bits < (1.001 * entropy(symbols) + 0.01) * count


def test_a_few_symbols_do_without_a_table() -> None:
    """14 zeros and two ones in gamma code: a bit that says so, 14 * 1 + 2 * 3 bits, two signs."""
    symbols = np.array([0] * 14 + [1, -1])
    assert len(encode_symbols(symbols)) == math.ceil((1 + 14 + 6 + 2) / 8)


def test_many_bytes_for_few_symbols() -> None:
    with pytest.raises(WireFormatError, match="too many for 3"):
        decode_symbols(np.zeros(5000, np.uint8), 3)
    with pytest.raises(WireFormatError, match="too many for 0"):
        decode_symbols(np.zeros(1, np.uint8), 0)


# -- pyramids -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "pulses", "num_points"),
    [(1, 5, 2), (2, 3, 12), (3, 2, 18), (4, 2, 32), (8, 1, 16), (16, 2, 512), (16, 4, 44032)],
)
def test_numbers_of_points(block: int, pulses: int, num_points: int) -> None:
    """Fischer 1986, N(L, 1) = 2 L, N(L, 2) = 2 L**2, and his recursion by hand."""
    assert Pyramid(block, pulses).num_points == num_points


@pytest.mark.parametrize(("block", "pulses"), [(1, 3), (3, 4), (4, 3), (5, 2)])
def test_every_point_has_its_number(block: int, pulses: int) -> None:
    pyramid = Pyramid(block, pulses)
    axis = range(-pulses, pulses + 1)
    points = {
        point
        for point in itertools.product(axis, repeat=block)
        if sum(abs(x) for x in point) == pulses
    }
    found = pyramid.points(np.arange(pyramid.num_points))
    assert {tuple(point) for point in found.tolist()} == points
    assert np.array_equal(pyramid.number(found), np.arange(pyramid.num_points))


def test_the_nearest_point_is_near() -> None:
    """By exhaustion: within 0.2 % of the best cosine on average, and none far off."""
    pyramid = Pyramid(4, 5)
    values = np.random.default_rng(0).normal(size=(300, 4))
    every = pyramid.points(np.arange(pyramid.num_points)).astype(float)
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    best = (values @ every.T).max(axis=1)
    points, gain = pyramid.nearest(values)
    norm = np.linalg.norm(points, axis=1)
    cosine = (values * points).sum(axis=1) / norm
    assert np.all(np.abs(points).sum(axis=1) == 5)
    assert np.mean(cosine / best) > 0.998
    assert np.min(cosine / best) > 0.97
    assert np.allclose(gain, cosine / norm)
