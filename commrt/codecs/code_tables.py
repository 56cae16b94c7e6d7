"""Tables for the entropy coder: how probable each code of a dithered quantizer is.

A residual r is coded as n = round(r / step + u), with a dither u in [-1/2, 1/2) that the decoder
knows, so that n says less than it seems. Only the dither's phase is used, the cell of
:data:`PHASE_EDGES` that it lies in. If r / step has the distribution function F, and u is anywhere
in the phase [a, b),

    P(n) = 1 / (b - a) * (integral from a to b of F(n + 1/2 - u) - F(n - 1/2 - u) du)

r has a generalised Gaussian density, exp(-(abs(r) / alpha)^beta). Each shape beta, scale
sigma / step and phase has a row, ``(shape * NUM_SCALES + scale) * NUM_PHASES + phase``.

Sender and receiver must have the same tables to the bit. So they are made by additions,
multiplications, divisions and square roots of IEEE doubles alone, an element at a time: by no
function that a mathematical library rounds in its own way, and no sum in an order of its own.
"""

import functools
import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commrt.ops.rans import ESCAPE, MOST_CODE, SLOT_BITS, SLOTS, SYMBOLS

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Number = TypeVar("Number", float, Floats)

NUM_PHASES = 16
PHASE_EDGES = np.arange(NUM_PHASES + 1) / NUM_PHASES - 0.5

# sigma / step = 2**((scale - 44) / 4): from 2**-11, where one code in three thousand is not zero,
# to 2**4.75, where a quarter of Gaussian codes escape. What lies between two of them costs at most
# 0.01 bits more than its own table would.
NUM_SCALES = 64
SCALES_PER_OCTAVE = 4
UNIT_SCALE = 44

# A code whose probability is less than this share of a slot has none: to escape it now and then
# costs less than its slot would cost all others. If all 64 symbols had one, codes of 0.4 bits would
# take 1.2 % more.
LEAST_SHARE = 3 / 16
# What an escaped code takes beside the escape, in bits; most are near.
ESCAPED_BITS = 8

# exp(-t) is nothing any more; so many terms of a series in t are enough up to there.
MOST_T = 40.0
NUM_TERMS = 120
LOG2 = (6.93147180369123816490e-01, 1.90821492927058770002e-10)  # ln 2, the first of few bits
EXP_TERMS = 14


class Shape(NamedTuple):
    """A generalised Gaussian; with a = 1 / beta, the gamma function at a, 2 a and 3 a."""

    beta_eighths: int
    gamma_a: float
    gamma_2a: float
    gamma_3a: float


SHAPES = (
    Shape(2, 6.0, 5040.0, 39916800.0),
    Shape(3, 1.5045754882515563, 40.128955828544015, 5040.0),
    Shape(4, 1.0, 6.0, 120.0),
    Shape(5, 0.8935153492876903, 2.423965479935368, 17.83786198181363),
    Shape(6, 0.8929795115692495, 1.5045754882515563, 6.0),
    Shape(8, 1.0, 1.0, 2.0),
    Shape(12, 1.3541179394264005, 0.8929795115692495, 1.0),
    Shape(16, 1.7724538509055159, 1.0, 0.886226925452758),
)
NUM_SHAPES = len(SHAPES)
NUM_ROWS = NUM_SHAPES * NUM_SCALES * NUM_PHASES


def entropy_tables(device: torch.device | str = "cpu") -> Tensor:
    """Where the symbols' slots begin, see :mod:`commrt.ops.rans`: uint16 [NUM_ROWS, 64].

    The same to the bit on every machine. Made at the first call, in less than a second; 1 MiB.
    """
    return _tables_on(torch.device(device))


def coded_range(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The lowest and the highest code that have slots in each row, as all between have: 2 int16."""
    return _range_on(torch.device(device))


def code_costs(device: torch.device | str = "cpu") -> Tensor:
    """Bits that each symbol takes, the escape with what follows it: fp32 [NUM_ROWS, 64]."""
    return _costs_on(torch.device(device)).T.reshape(NUM_ROWS, SYMBOLS)


def fit_rows(counts: Tensor, columns: Tensor | None = None) -> Tensor:
    """The table of each class that codes its symbols in the fewest bits.

    Args:
        counts: [C, 16, 64] of any dtype: how often each class had each symbol in each phase.
        columns: int64 [K], if ``counts`` is [C, K]: which of the 16 * 64 these are, where all
            others are zero.

    Returns:
        int16 [C]: the first of the 16 consecutive rows, a phase each. What the receiver needs to
        know; it cannot work it out, since sums of floats differ between machines.
    """
    if columns is None:
        counts = counts.reshape(-1, NUM_PHASES * SYMBOLS)
        columns = used_columns(counts)
        counts = counts.index_select(1, columns)
    bits = counts.float() @ _costs_on(counts.device).index_select(0, columns)
    return (bits.argmin(dim=1) * NUM_PHASES).to(torch.int16)


def used_columns(counts: Tensor) -> Tensor:
    """Which columns of counts [C, K] are not all zeros, int64: few, of codes of few bits."""
    return counts.sum(dim=0).nonzero()[:, 0]


@functools.cache
def _tables_on(device: torch.device) -> Tensor:
    bounds = np.zeros((NUM_ROWS, SYMBOLS), dtype=np.uint16)
    bounds[:, 1:] = np.cumsum(_all_frequencies(), axis=1)[:, :-1]
    return torch.from_numpy(bounds).to(device)


@functools.cache
def _range_on(device: torch.device) -> tuple[Tensor, Tensor]:
    has_slots = _all_frequencies()[:, :ESCAPE] > 0
    lowest = has_slots.argmax(axis=1) - MOST_CODE
    highest = MOST_CODE - has_slots[:, ::-1].argmax(axis=1)
    ends = torch.from_numpy(np.stack([lowest, highest])).to(device, torch.int16)
    return ends[0], ends[1]


@functools.cache
def _costs_on(device: torch.device) -> Tensor:
    """Bits of each symbol: fp32 [phases * symbols, shapes * scales]."""
    slots = torch.from_numpy(_all_frequencies()).to(device, torch.float32)
    bits = SLOT_BITS - slots.log2()
    escape = bits[:, ESCAPE:] + ESCAPED_BITS
    bits[:, ESCAPE:] = escape
    costs = torch.where(slots > 0, bits, escape)
    return costs.view(-1, NUM_PHASES * SYMBOLS).T.contiguous()


@functools.cache
def _all_frequencies() -> Integers:
    """[NUM_ROWS, 64]."""
    return np.concatenate([_frequencies_of(*_probabilities(shape)) for shape in SHAPES])


def _frequencies_of(inside: Floats, outside: Floats) -> Integers:
    """Of probabilities [R, 63] and [R], as whole slots [R, 64], at least one for the escape."""
    share = inside * SLOTS
    slots = np.where(share < LEAST_SHARE, 0.0, np.maximum(np.floor(share + 0.5), 1.0))
    escaping = outside * SLOTS
    for column, has_slots in zip(share.T, slots.T > 0, strict=True):
        escaping = escaping + np.where(has_slots, 0.0, column)
    escape = np.maximum(np.floor(escaping + 0.5), 1.0)
    found = np.concatenate([slots, escape[:, None]], axis=1).astype(np.int64)
    likeliest = (np.arange(len(found)), found.argmax(axis=1))
    found[likeliest] += SLOTS - found.sum(axis=1)
    return found


def _probabilities(shape: Shape) -> tuple[Floats, Floats]:
    """Of codes -31 to 31, [R, 63], and of all others, [R]; rows are (scale, phase)."""
    middle = np.arange(-MOST_CODE - 1, MOST_CODE + 1) + 0.5  # between two codes
    distance, index = np.unique(abs(middle - PHASE_EDGES[:, None]), return_inverse=True)
    index = index.reshape(len(PHASE_EDGES), len(middle))
    areas = [_area(shape, distance, _sigma(scale))[index] for scale in range(NUM_SCALES)]
    area = np.stack(areas)
    width = np.diff(PHASE_EDGES)
    per_code = np.diff(area, axis=2)
    inside = (per_code[:, :-1] - per_code[:, 1:]) / (2 * width[:, None])
    whole = area[:, :, -1] - area[:, :, 0]
    outside = 1 - (whole[:, :-1] - whole[:, 1:]) / (2 * width)
    return inside.reshape(-1, 2 * MOST_CODE + 1), outside.reshape(-1)


def _sigma(scale: int) -> float:
    """In steps."""
    octaves, quarters = divmod(scale - UNIT_SCALE, SCALES_PER_OCTAVE)
    root = math.sqrt(math.sqrt(2.0))
    return math.ldexp((1.0, root, root * root, root * root * root)[quarters], octaves)


def _area(shape: Shape, distance: Floats, sigma: float) -> Floats:
    """The integral of P(abs(r) <= x) over x from 0 to each distance; all in steps.

    By parts, distance * P(abs(r) <= distance) less the mean of abs(r) over abs(r) <= distance,
    which are incomplete gamma functions of t = (distance / alpha)^beta.
    """
    a = 8 / shape.beta_eighths
    alpha = sigma * math.sqrt(shape.gamma_a / shape.gamma_3a)
    mean = alpha * (shape.gamma_2a / shape.gamma_a)
    t, power = _powers(distance / alpha, shape.beta_eighths)
    within = _incomplete_gamma(a, t, power) / (a * shape.gamma_a)
    moment = _incomplete_gamma(2 * a, t, power * power) / (2 * a * shape.gamma_2a)
    return distance * within - mean * moment


def _powers(x: Floats, eighths: int) -> tuple[Floats, Floats]:
    """The t = x^(eighths / 8), at most about MOST_T, and the x that belongs to it."""
    most = 1.0
    while _power(most, eighths) < MOST_T:
        most *= 1.01
    root = np.minimum(np.sqrt(np.sqrt(np.sqrt(x))), most)
    return _power(root, eighths), _power(root, 8)


def _power(x: Number, exponent: int) -> Number:
    power = x
    for _ in range(exponent - 1):
        power = power * x
    return power


def _incomplete_gamma(a: float, t: Floats, power: Floats) -> Floats:
    """The lower one of a and t, times a, where ``power`` is t^a."""
    term = np.ones_like(t)
    total = term
    for n in range(1, NUM_TERMS):
        term = term * (t / (a + n))
        total = total + term
    return power * _exp_of_minus(t) * total


def _exp_of_minus(t: Floats) -> Floats:
    """exp(-t), to the last bits."""
    octaves = np.rint(t / LOG2[0])
    rest = (octaves * LOG2[0] - t) + octaves * LOG2[1]
    total = np.ones_like(t)
    for n in range(EXP_TERMS, 0, -1):
        total = total * rest / n + 1.0
    return np.ldexp(total, -octaves.astype(np.int64))
