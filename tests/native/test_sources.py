"""source_energies, source_prediction, source_products, source_history: the same bits everywhere.

Both ends of an update work these out for themselves.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops.sources import LEAST_ENERGY, MOST_ENERGY, MOST_PREDICTED, NUM_PRODUCTS
from tests.native import cases
from tests.native.test_dither import ends_of
from tests.native.test_threads import threads

SIZES = (0, 1, 2, 15, 16, 17, 100, 1023, 1025, 3001)
SHAPES = (
    [(0, 3)],
    [(1, 1)],
    [(1, 100), (0, 0), (7, 1)],
    [(2, 2), (3, 0), (17, 5)],
    [(5, 300), (1, 300), (300, 5), (64, 65)],
    [(1025, 3), (1, 1), (2, 1031)],
)
Make = Callable[[int, int], Tensor]


def normal(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def spread(numel: int, seed: int) -> Tensor:
    """Numbers of every size, too large and too small to be squared among them, and zeros."""
    values = normal(numel, seed) * torch.exp2((40 * normal(numel, seed + 99)).round())
    values[::7] = 0.0
    values[3::11] = -0.0
    return values.clamp(-3e38, 3e38)


def small(numel: int, seed: int) -> Tensor:
    """Too small to be squared."""
    return 1e-30 * normal(numel, seed)


def sources_of(make: Make, numel: int, seed: int) -> list[tuple[Tensor | None, Tensor | None]]:
    previous, own = make(numel, seed), make(numel, seed + 1)
    return [
        (previous, own.bfloat16()),
        (cases.unaligned(previous), cases.unaligned(own)),
        (previous.bfloat16(), None),
        (None, cases.unaligned(own.bfloat16())),
        (None, None),
    ]


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 42.0, dtype=dtype)


# -- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [normal, spread, small])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_energies_are_the_same_everywhere(make: Make, index: int) -> None:
    shapes = SHAPES[index]
    numel = sum(rows * cols for rows, cols in shapes)
    for previous, own in sources_of(make, numel, index):
        for energies in (filled(numel), cases.unaligned(filled(numel))):
            cases.run_everywhere(ops.source_energies, previous, own, 0.3, shapes, energies)


@pytest.mark.parametrize("make", [normal, spread])
@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_predictions_are_the_same_everywhere(make: Make, num_groups: int) -> None:
    for index, numel in enumerate(SIZES):
        weights = [(group / 3 - 1, -0.1 * group) for group in range(1, num_groups)] + [(0.0, -0.5)]
        ends = ends_of(numel, num_groups)
        for previous, own in sources_of(make, numel, index):
            predicted = cases.unaligned(filled(numel))
            cases.run_everywhere(ops.source_prediction, previous, own, weights, ends, predicted)


@pytest.mark.parametrize("make", [normal, spread])
@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_products_are_the_same_everywhere(make: Make, num_groups: int) -> None:
    for index, numel in enumerate(SIZES):
        update, ends = make(numel, index + 9), ends_of(numel, num_groups)
        for previous, own in sources_of(make, numel, index):
            products = filled(num_groups, NUM_PRODUCTS, dtype=torch.float64)
            cases.run_everywhere(ops.source_products, update, previous, own, ends, products)


@pytest.mark.parametrize("make", [normal, spread])
def test_histories_are_the_same_everywhere(make: Make) -> None:
    for index, numel in enumerate(SIZES):
        decoded, predicted = make(numel, index), make(numel, index + 1)
        rows = torch.arange(numel, dtype=torch.int16) * 5
        for num_shares in (1, 2, 64, 128):
            shares, kept = torch.rand(num_shares), filled(numel, dtype=torch.bfloat16)
            for place in (kept, cases.unaligned(kept)):
                cases.run_everywhere(ops.source_history, decoded, predicted, rows, shares, place)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_threads(count: int) -> None:
    """All four: bit-identical to one thread."""
    one = every_op()
    with threads(count):
        assert all(map(torch.equal, every_op(), one))


def every_op() -> list[Tensor]:
    shapes = [(100, 900)] + 30 * [(20, 30)] + [(1, 50_000)]
    numel = sum(rows * cols for rows, cols in shapes)
    previous, own = normal(numel, 0), normal(numel, 1).bfloat16()
    ends = torch.tensor([30, 50_000, 90_001, numel])
    weights, rows = 2 * [(0.5, -0.3), (1.5, 0.1)], torch.arange(numel).short() % 4096
    energies, predicted = torch.empty(2, numel)
    products, kept = torch.empty(4, NUM_PRODUCTS).double(), torch.empty(numel).bfloat16()
    ops.source_energies(previous, own, 0.3, shapes, energies)
    ops.source_prediction(previous, own, weights, ends, predicted)
    ops.source_products(predicted, previous, own, ends, products)
    ops.source_history(previous, predicted, rows, torch.linspace(0, 1, 64), kept)
    return [energies, predicted, products, kept]


# -- what the numbers are -------------------------------------------------------------------------


def test_energies_of_independent_rows_and_columns_are_doubled() -> None:
    rows, cols = torch.rand(20, 1) + 0.1, torch.rand(1, 30) + 0.1
    own, energies = (rows * cols).sqrt().view(-1), torch.empty(600)
    ops.source_energies(None, own, 0.3, [(20, 30)], energies)
    torch.testing.assert_close(energies, 2 * own.square(), rtol=1e-5, atol=0)


def test_energies_keep_within_their_bounds() -> None:
    numbers = torch.tensor([0.0, 1e-30, 3e38, -1.0])
    energies = torch.empty(4)
    ops.source_energies(numbers, None, 0.5, [(1, 4)], energies)
    assert energies.tolist() == [2 * LEAST_ENERGY, 2 * LEAST_ENERGY, 2 * MOST_ENERGY, 1.0]


def test_energies_of_a_matrix_of_zeros_are_the_least() -> None:
    energies = torch.empty(12)
    ops.source_energies(torch.zeros(12), None, 0.5, [(3, 4)], energies)
    torch.testing.assert_close(energies, torch.full((12,), 2 * LEAST_ENERGY), rtol=1e-5, atol=0)


def test_a_prediction_is_within_its_bounds() -> None:
    source, predicted = torch.tensor([3e38, -3e38, 2.0, -0.0]), torch.empty(4)
    ends = torch.tensor([4])
    ops.source_prediction(source, None, [(-0.5, 0.0)], ends, predicted)
    assert predicted.tolist() == [-MOST_PREDICTED, MOST_PREDICTED, -1.0, 0.0]
    assert not predicted.signbit()[3]


def test_products_are_those_of_each_group() -> None:
    vectors = [normal(5000, seed) for seed in range(3)]
    update, previous, own = vectors
    products, ends = torch.empty(3, NUM_PRODUCTS).double(), torch.tensor([1234, 1234, 5000])
    ops.source_products(update, previous, own, ends, products)
    for part, found in ((slice(1234), products[0]), (slice(1234, None), products[2])):
        z, x, y = (vector[part].double() for vector in vectors)
        expected = torch.stack([x @ x, x @ y, y @ y, x @ z, y @ z, z @ z])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert products[1].tolist() == NUM_PRODUCTS * [0.0]


def test_a_history_is_between_what_was_predicted_and_decoded() -> None:
    """Rows 16 to 31 have the second share, as have rows 48 to 63 of two."""
    predicted, decoded = torch.zeros(4), torch.full((4,), 8.0)
    rows, shares = torch.tensor([15, 16, 47, 48], dtype=torch.int16), torch.tensor([0.0, 0.5])
    kept = torch.empty(4, dtype=torch.bfloat16)
    ops.source_history(decoded, predicted, rows, shares, kept)
    assert kept.tolist() == [0.0, 4.0, 0.0, 4.0]


@pytest.mark.parametrize("wrong", [[9, 3, 5], [-4, 2**40, 0], [7000, 7000, 7000]])
def test_ends_that_are_wrong_name_no_other_memory(wrong: list[int]) -> None:
    ends, update = torch.tensor(wrong), torch.ones(3000)
    predicted = cases.unaligned(filled(3000))
    products = filled(3, NUM_PRODUCTS, dtype=torch.float64)
    for path, use in cases.paths().items():
        with use:
            ops.source_prediction(update, None, 3 * [(1.0, 1.0)], ends, predicted)
            ops.source_products(update, update, None, ends, products)
        around = predicted.new_empty(0).set_(predicted.untyped_storage())
        assert around[0] == around[-1] == cases.FILL, path
        assert predicted.tolist() == 3000 * [1.0], path
        assert products.min() >= 0, path
        assert products.max() <= 3000, path


# -- what is refused ------------------------------------------------------------------------------


def test_what_does_not_serve() -> None:
    flat, ends = torch.zeros(12), torch.tensor([12])
    with pytest.raises(ConfigError, match=r"own is torch\.float64: must be one of"):
        ops.source_energies(None, flat.double(), 0.3, [(3, 4)], flat)
    with pytest.raises(ConfigError, match="previous has 11 elements: must have 12, as energies"):
        ops.source_energies(flat[1:], None, 0.3, [(3, 4)], flat)
    for shapes in ([(3, 5)], [], [(3, 4), (1, 1)]):
        with pytest.raises(ConfigError, match=r"shapes=.*: must have 12 elements, as energies"):
            ops.source_energies(None, None, 0.3, shapes, flat)
    with pytest.raises(ConfigError, match=r"shapes=.*: must have no negative number"):
        ops.source_energies(None, None, 0.3, [(-3, -4)], flat)
    with pytest.raises(ConfigError, match=r"previous_weight=-1\.0: must be in"):
        ops.source_energies(None, None, -1.0, [(3, 4)], flat)
    with pytest.raises(ConfigError, match="weights of 1 groups: must be of 2"):
        ops.source_prediction(None, None, [(0.5, 0.5)], ends.repeat(2), flat)
    with pytest.raises(ConfigError, match="ends has no elements"):
        ops.source_prediction(None, None, [], ends[:0], flat)
    with pytest.raises(ConfigError, match=r"products is torch\.float32"):
        ops.source_products(flat, None, None, ends, torch.zeros(1, 5))
    kept, rows = flat.bfloat16(), flat.short()
    with pytest.raises(ConfigError, match="shares has 3 elements: must have a power of two"):
        ops.source_history(flat, flat, rows, torch.ones(3), kept)
    with pytest.raises(ConfigError, match="rows has 11 elements: must have 12, as kept has"):
        ops.source_history(flat, flat, rows[1:], torch.ones(4), kept)
