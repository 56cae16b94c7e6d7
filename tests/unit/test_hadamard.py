"""Rotations and what they make possible: the levels of a normal."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from commrt.codecs.hadamard import rotate, unrotate, walsh_hadamard
from commrt.codecs.lloyd import normal_edges, normal_levels
from commrt.codecs.sums import tree_sum
from commrt.codecs.uniforms import random_signs, random_words, uniforms

WIDTHS = [1, 2, 3, 8, 10, 63, 64, 1000, 1024, 17_226]


def sylvester(width: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(width)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 32, 128, 512])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_transform_is_the_matrix(width: int, num_rows: int) -> None:
    rows = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0))
    before = rows.clone()
    assert torch.allclose(walsh_hadamard(rows), rows @ sylvester(width), atol=1e-5)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotation_keeps_lengths_and_can_be_undone(width: int) -> None:
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(0)) ** 3
    rotated = rotate(rows, seed=5)
    assert torch.allclose(rotated.norm(dim=1), rows.norm(dim=1), rtol=1e-5)
    assert torch.allclose(unrotate(rotated, seed=5), rows, atol=1e-5 * float(rows.abs().max()))


@pytest.mark.parametrize("width", [1024, 1500, 17_226, 30_000])
@pytest.mark.parametrize("place", [0, -1])
def test_a_rotated_spike_looks_normal(width: int, place: int) -> None:
    """Wherever it is: every quarter has its share of the energy, and the kurtosis is near 3."""
    rows = torch.zeros(1, width)
    rows[0, place] = math.sqrt(width)
    rotated = rotate(rows, seed=1)[0]
    quarters = [float(part.square().mean()) for part in rotated.chunk(4)]
    assert min(quarters) > 0.7
    assert max(quarters) < 1.3
    assert float(rotated.pow(4).mean()) == pytest.approx(3.0, abs=0.75)


def test_rows_are_rotated_by_signs_of_their_own() -> None:
    rotated = rotate(torch.ones(2, 64), seed=1)
    assert not torch.equal(rotated[0], rotated[1])
    assert not torch.equal(rotated, rotate(torch.ones(2, 64), seed=2))


@pytest.mark.parametrize(
    ("bits", "positive", "error"),
    [
        (1, [0.7980], 0.3634),
        (2, [0.4528, 1.510], 0.1175),
        (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    ],
)
def test_levels_of_a_normal(bits: int, positive: list[float], error: float) -> None:
    """Max 1960, table I: 2, 4, 8 and 16 output levels."""
    levels = normal_levels(bits)
    assert levels[len(levels) // 2 :].tolist() == pytest.approx(positive, abs=6e-4)
    assert torch.equal(levels, -levels.flip(0))
    normal = NormalDist()
    edges = [-math.inf, *normal_edges(bits).tolist(), math.inf]
    mass = np.diff([normal.cdf(edge) for edge in edges])
    # Of levels that are centroids, the error is what they lack of the variance.
    assert 1 - float(mass @ levels.square().numpy()) == pytest.approx(error, abs=6e-5)


def test_eight_bits_of_a_normal() -> None:
    """Each level is the mean of the normal between its edges."""
    normal = NormalDist()
    levels, edges = normal_levels(8).tolist(), normal_edges(8).tolist()
    edges = [-math.inf, *edges, math.inf]
    for level, low, high in zip(levels, edges, edges[1:], strict=False):
        mean = (normal.pdf(low) - normal.pdf(high)) / (normal.cdf(high) - normal.cdf(low))
        assert level == pytest.approx(mean, abs=2e-5)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_tree_sums(count: int) -> None:
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tree_sum(values), values.double().sum(dim=1))


@pytest.mark.parametrize("count", [0, 1, 5, 33, 70_000])
def test_random_numbers_depend_on_place_only(count: int) -> None:
    for draw in (random_words, uniforms, random_signs):
        assert draw(3, count).shape == (count,)
        assert torch.equal(draw(3, count), draw(3, 70_001)[:count])


def test_random_numbers_are_fair() -> None:
    """Mean and variance within five standard errors; seeds make them other ones."""
    count = 1 << 16
    values, signs = uniforms(1, count), random_signs(1, count)
    assert float(values.min()) >= 0.0
    assert float(values.max()) < 1.0
    assert float(values.mean()) == pytest.approx(0.5, abs=5 * 0.289 / math.sqrt(count))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / math.sqrt(count)
    assert not torch.equal(random_signs(2, count), signs)
