"""The entropy coder's tables: the probabilities they should be, and the same bits for ever."""

import functools
import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from commrt.codecs import code_tables
from commrt.codecs.code_tables import NUM_PHASES, NUM_SCALES, NUM_SHAPES, SHAPES, Shape
from commrt.ops.rans import ESCAPE, MOST_CODE, SLOTS, SYMBOLS

# A difference means that payloads of another version cannot be read.
DIGEST = "46c52612b8d9abff3a0400be202d78716f76282f935e463fb30d7a0cd8a18a54"
LAPLACE, GAUSS = (SHAPES.index(shape) for shape in SHAPES if shape.beta_eighths in (8, 16))


probabilities = functools.cache(code_tables._probabilities)


@functools.cache
def slots() -> torch.Tensor:
    """By shape, scale, phase and symbol."""
    starts = code_tables.entropy_tables().long()
    found = torch.diff(starts, append=torch.full((len(starts), 1), SLOTS))
    return found.view(NUM_SHAPES, NUM_SCALES, NUM_PHASES, SYMBOLS)


def test_tables_are_what_they_were() -> None:
    tables = code_tables.entropy_tables().numpy().astype("<u2")
    assert tables.shape == (code_tables.NUM_ROWS, SYMBOLS)
    assert hashlib.sha256(tables.tobytes()).hexdigest() == DIGEST


def test_one_by_one_they_are_the_same() -> None:
    """To the bit: nothing depends on how many elements an operation has."""
    distance = np.array([0, 1 / 16, 0.5, 0.75, 1, 1.3, 2, 7, 31.5, 32, 0.1, 0.2, 0.3])
    for shape in SHAPES:
        for sigma in (0.01, 3.0):
            each = [code_tables._area(shape, one, sigma)[0] for one in distance[:, None]]
            assert code_tables._area(shape, distance, sigma).tolist() == each


def test_every_row_can_code_everything() -> None:
    """By slots for zero and what is near it, and for the escape."""
    found = slots()
    assert found.min() == 0
    assert torch.equal(found.sum(dim=3), torch.full(found.shape[:3], SLOTS))
    assert found[..., MOST_CODE].min() > 0
    assert found[..., ESCAPE].min() > 0
    lowest, highest = (ends.view(found.shape[:3]) for ends in code_tables.coded_range())
    codes = torch.arange(-MOST_CODE, MOST_CODE + 1)
    is_inside = (lowest[..., None] <= codes) & (codes <= highest[..., None])
    assert torch.equal(found[..., :ESCAPE] > 0, is_inside)


def test_phases_are_mirrored() -> None:
    """With -u for u a code's probability is that of its opposite."""
    for shape in SHAPES:
        inside = probabilities(shape)[0].reshape(NUM_SCALES, NUM_PHASES, ESCAPE)
        assert abs(inside - inside[:, ::-1, ::-1]).max() < 1e-9


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.beta_eighths}/8")
def test_gamma_functions(shape: Shape) -> None:
    a = 8 / shape.beta_eighths
    for k, given in enumerate(shape[1:], start=1):
        assert given == pytest.approx(math.gamma(k * a), rel=1e-14)


def test_exponential() -> None:
    t = np.linspace(0, code_tables.MOST_T, 1001)
    expected = [math.exp(-x) for x in t]
    assert code_tables._exp_of_minus(t) == pytest.approx(expected, rel=1e-15)


def gauss(x: float) -> float:
    """P(r <= x) of a Gaussian of variance 1."""
    return math.erfc(-x / math.sqrt(2)) / 2


def laplace(x: float) -> float:
    """P(r <= x) of a Laplacian of variance 1."""
    below = math.exp(-math.sqrt(2) * abs(x)) / 2
    return below if x < 0 else 1 - below


def heavy(x: float) -> float:
    """P(r <= x) of beta = 1 / 2 and variance 1, where alpha = 120**-0.5."""
    t = math.sqrt(abs(x) * math.sqrt(120))
    below = math.exp(-t) * (1 + t) / 2
    return below if x < 0 else 1 - below


@pytest.mark.parametrize(
    ("beta_eighths", "below"), [(16, gauss), (8, laplace), (4, heavy)], ids=["2", "1", "1/2"]
)
@pytest.mark.parametrize("scale", [20, 30, 44, 50, 63])
def test_probabilities(beta_eighths: int, below: Callable[[float], float], scale: int) -> None:
    """Those of a distribution function averaged over the phase, to 1e-7; slots, to one."""
    [index] = [i for i, shape in enumerate(SHAPES) if shape.beta_eighths == beta_eighths]
    sigma = 2.0 ** ((scale - 44) / 4)
    inside, outside = probabilities(SHAPES[index])
    places, weights = np.polynomial.legendre.leggauss(80)
    for phase in (0, 3, 8, 15):
        row, dither = scale * NUM_PHASES + phase, (phase + (places + 1) / 2) / 16 - 0.5
        for code in (-31, -5, -1, 0, 1, 2, 31):
            ends = (code + 0.5 - dither) / sigma, (code - 0.5 - dither) / sigma
            masses = [below(high) - below(low) for high, low in zip(*ends, strict=True)]
            expected = math.fsum(masses * weights) / 2
            assert inside[row, code + MOST_CODE] == pytest.approx(expected, abs=1e-7)
            found = int(slots()[index, scale, phase, code + MOST_CODE])
            assert abs(found - expected * SLOTS) <= 1 or code == 0
        assert inside[row].sum() + outside[row] == pytest.approx(1, abs=1e-9)


def test_a_code_length_near_the_entropy() -> None:
    """Slots cost at most 0.05 % of a code of 0.1 bits and more, or 0.0002 bits."""
    for shape, found in zip(SHAPES, slots(), strict=True):
        inside, outside = probabilities(shape)
        share = np.concatenate([inside, outside[:, None]], axis=1).clip(1e-300)
        share = torch.from_numpy(share).view(found.shape)
        bits = 14 - found.double().log2()
        escaped = bits[..., ESCAPE:] + code_tables.ESCAPED_BITS
        cost = (share * torch.where(found > 0, bits, escaped)).sum(dim=2).mean(dim=1)
        entropy = -(share * share.log2()).sum(dim=2).mean(dim=1)
        assert (cost - entropy <= 0.0005 * entropy + 0.0002).all()


# -- fitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 3, LAPLACE, GAUSS])
@pytest.mark.parametrize("scale", [20, 40, 52])
def test_a_class_gets_the_table_it_was_drawn_from(index: int, scale: int) -> None:
    """Of a million codes' expected counts; and each class its own."""
    counts = slots()[index, scale] * 61
    others = slots()[GAUSS, 44] * 3
    found = code_tables.fit_rows(torch.stack([counts, others, torch.zeros_like(counts)]))
    assert found.dtype == torch.int16
    first, second = ((i * NUM_SCALES + s) * NUM_PHASES for i, s in ((index, scale), (GAUSS, 44)))
    assert found[:2].tolist() == [first, second]


def test_a_symbol_without_slots_is_counted_as_an_escape() -> None:
    """So that a class of few but large codes is not given a narrow table."""
    counts = torch.zeros(1, NUM_PHASES, SYMBOLS)
    counts[0, :, MOST_CODE] = 1000
    counts[0, :, MOST_CODE + 20] = 400
    [row] = code_tables.fit_rows(counts).tolist()
    _, highest = code_tables.coded_range()
    assert highest[row : row + NUM_PHASES].min() >= 20
