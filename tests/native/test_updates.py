"""Ops on several updates: the same bits everywhere, and those of the ops that they stand for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops.sources import NUM_PRODUCTS
from tests.native import cases
from tests.native.test_dither import ends_of
from tests.native.test_sources import filled, normal
from tests.native.test_threads import threads

# Of matrices: few elements, one beyond a tile, and whole points of E8 in several tiles.
SHAPES = ([(1, 1)], [(5, 205)], [(3, 4), (1, 1000), (8, 129)], [(64, 32), (1, 0)])
SHARES = torch.linspace(0, 1, 64)


class Updates:
    """K of them, with all that ops are given; each with another source of its own, the last none.

    Attributes:
        told: Weights, tables, bases, seeds, of predictions and rows.
        how: Steps and seeds of the quantizers.
    """

    def __init__(self, shapes: list[tuple[int, int]], count: int, num_groups: int) -> None:
        self.shapes, self.count, self.num_groups = shapes, count, num_groups
        self.numel = sum(rows * cols for rows, cols in shapes)
        self.ends = ends_of(self.numel, num_groups)
        self.updates = normal(count * self.numel, 1).view(count, -1)
        self.previous = normal(self.numel, 2)
        self.own: list[Tensor | None] = [normal(self.numel, 3 + k) for k in range(count - 1)]
        self.own = [each if k % 2 else _half(each) for k, each in enumerate(self.own)] + [None]
        self.weights = (normal(2 * num_groups * count, 99) / 3).tolist()
        size = (count, num_groups, 64)
        self.tables = list(torch.arange(64 * count * num_groups).view(size).remainder(90).short())
        self.bases = [235 + k for k in range(count)]
        self.steps = [0.5 + 0.25 * k for k in range(count)]
        self.seeds = [7 + k for k in range(count)]

    def rows(self) -> tuple[Any, ...]:
        """What :func:`commrt.ops.update_rows` takes, outputs last."""
        return (
            self.previous, self.own, self.weights, self.shapes, 0.3, self.ends, self.tables,
            self.bases, self.seeds, filled(self.count, self.numel), self.shorts(), self.shorts(),
        )  # fmt: skip

    def shorts(self, width: int | None = None) -> Tensor:
        return filled(self.count, width or self.numel, dtype=torch.int16)

    def kept(self) -> list[Tensor]:
        return [filled(self.numel, dtype=torch.bfloat16) for _ in range(self.count)]

    def products(self) -> Tensor:
        return filled(self.count, NUM_PRODUCTS * self.num_groups, dtype=torch.float64)


def _half(source: Tensor | None) -> Tensor | None:
    return None if source is None else source.bfloat16()


def padded(matrix: Tensor, lattice: str) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 8 if lattice == "e8" else 0))


@pytest.mark.parametrize("lattice", ["z", "e8"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_the_same_bits_everywhere(index: int, count: int, lattice: str) -> None:
    of = Updates(SHAPES[index], count, 1 + index)
    cases.run_everywhere(
        ops.update_products, of.updates, of.previous, of.own, of.ends, of.products()
    )
    given = of.rows()
    cases.run_everywhere(ops.update_rows, *given)
    predicted, _, rows = given[-3:]
    values, width = padded(of.updates, lattice), padded(of.updates, lattice).shape[1]
    how, codes = (SHARES, of.steps, of.seeds), of.shorts(width)
    for kept in (of.kept(), []):
        cases.run_everywhere(
            ops.update_codes, values, padded(predicted, lattice), rows, *how, codes, kept,
            lattice=lattice,
        )  # fmt: skip
    decoded = [torch.empty_like(predicted) for _ in range(2)]
    for kept in (of.kept(), []):
        cases.run_everywhere(
            ops.update_values, codes, predicted, rows, SHARES, of.ends, of.steps, of.seeds,
            *decoded, of.products(), kept, lattice=lattice,
        )  # fmt: skip
    total = torch.arange(of.numel).double() * 2.0**30
    cases.run_everywhere(ops.update_add_, total, decoded[0], [1e9, 0.5, 3.3][:count])


def test_each_is_what_the_ops_on_one_give() -> None:
    of = Updates(SHAPES[2], 3, 2)
    given = of.rows()
    ops.update_rows(*given)
    predicted, contexts, rows = given[-3:]
    codes, kept, products = of.shorts(), of.kept(), of.products()
    how = SHARES, of.steps, of.seeds
    ops.update_codes(of.updates, predicted, rows, *how, codes, kept)
    values, residuals, again = filled(3, of.numel), filled(3, of.numel), of.kept()
    more = of.steps, of.seeds, values, residuals, products, again
    ops.update_values(codes, predicted, rows, SHARES, of.ends, *more)
    for k in range(3):
        one, energies = filled(of.numel), torch.zeros(of.numel)
        weights = [(of.weights[4 * k], of.weights[4 * k + 1]), tuple(of.weights[4 * k + 2 :][:2])]
        ops.source_prediction(of.previous, of.own[k], weights, of.ends, one)
        assert torch.equal(predicted[k], one)
        ops.source_energies(of.previous, of.own[k], 0.3, of.shapes, energies)
        place, context = of.shorts()[0], of.shorts()[0]
        ops.scale_rows(
            energies, of.tables[k], of.ends, place, of.seeds[k], base=of.bases[k], contexts=context
        )
        assert torch.equal(rows[k], place)
        assert torch.equal(contexts[k], context)
        code, decoded, left = of.shorts()[0], filled(of.numel), of.kept()[0]
        ops.dither_quantise(of.updates[k], one, code, of.steps[k], of.seeds[k])
        assert torch.equal(codes[k], code)
        ops.dither_dequantise(code, one, decoded, of.steps[k], of.seeds[k])
        ops.source_history(decoded, one, place, SHARES, left)
        assert torch.equal(values[k], decoded)
        assert torch.equal(residuals[k], decoded - one)
        assert torch.equal(kept[k], left)
        assert torch.equal(again[k], left)


@pytest.mark.parametrize("numel", [3000, 70_000])
def test_any_number_of_threads(numel: int) -> None:
    """Updates that are shared out to threads, and one that all work on."""

    def everything() -> list[Tensor]:
        of = Updates([(10, numel // 10)], 4, 2)
        given = of.rows()
        ops.update_rows(*given)
        predicted, _, rows = given[-3:]
        codes, values, residuals = of.shorts(), filled(4, numel), filled(4, numel)
        products, kept, total = of.products(), of.kept(), torch.zeros(numel).double()
        ops.update_codes(of.updates, predicted, rows, SHARES, of.steps, of.seeds, codes, kept)
        ops.update_values(
            codes, predicted, rows, SHARES, of.ends, of.steps, of.seeds, values, residuals,
            products, kept,
        )  # fmt: skip
        ops.update_add_(total, values, [1e6] * 4)
        return [*given[-3:], codes, values, residuals, products, *kept, total]

    one = everything()
    with threads(3):
        assert all(map(torch.equal, everything(), one))


def test_sums_do_not_depend_on_the_order() -> None:
    updates, factors = normal(5 * 2000, 0).view(5, -1), [2.0**30, 3.7e8, 1.0, -2e9, 0.0]
    totals = []
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        total = torch.zeros(2000, dtype=torch.float64)
        ops.update_add_(total, updates[order], [factors[k] for k in order])
        totals.append(total)
    assert torch.equal(*totals)
    assert torch.equal(totals[0], totals[0].round())
    wanted = (updates.double() * torch.tensor(factors).double()[:, None]).sum(dim=0)
    assert float((totals[0] - wanted).abs().max()) <= 2.5
    halves = torch.zeros(4, dtype=torch.float64)
    ops.update_add_(halves, torch.tensor([[0.5, 1.5, -0.5, -2.5]]), [1.0])
    assert halves.tolist() == [0.0, 2.0, 0.0, -2.0]


def test_what_does_not_serve() -> None:
    of = Updates([(3, 4)], 2, 1)
    given = list(of.rows())

    def refused(match: str, **changes: Any) -> None:
        names = (
            "previous", "own", "weights", "shapes", "previous_weight", "ends", "tables", "bases",
            "seeds", "predicted", "contexts", "rows",
        )  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            ops.update_rows(**{**dict(zip(names, given, strict=True)), **changes})

    refused("previous has 11 elements: must have 12", previous=of.previous[1:])
    refused(r"own is torch\.float64", own=[of.previous.double(), None])
    refused(r"predicted is torch\.float32 \(2, 12\): must be .*\(1, any\)", own=[None])
    refused("3 weights: must be 4", weights=[0.0] * 3)
    refused("must have 12 elements, as predicted", shapes=[(2, 4)])
    refused("must have no negative number", shapes=[(-3, -4)])
    refused("previous_weight=-1", previous_weight=-1.0)
    refused("ends has no elements", ends=of.ends[:0])
    refused("1 tables and 2 bases: must be 2", tables=of.tables[:1])
    refused("tables have 32 and 64 classes", tables=[of.tables[0], of.tables[1][:, :32].clone()])
    refused(r"bases=\[1, 512\]", bases=[1, 512])
    refused("1 seeds: must be 2", seeds=[1])
    refused("seed=-1", seeds=[1, -1])
    refused("rows is torch.float32", rows=of.updates)
    codes, rows = of.shorts(), torch.zeros(2, 12, dtype=torch.int16)
    rest = of.updates, of.updates, rows, SHARES
    with pytest.raises(ConfigError, match=r"step=0\.0"):
        ops.update_codes(*rest, [0.0, 1.0], of.seeds, codes, [])
    with pytest.raises(ConfigError, match="1 to keep: must be 2, or none"):
        ops.update_codes(*rest, of.steps, of.seeds, codes, of.kept()[:1])
    with pytest.raises(ConfigError, match="shares has 3 elements"):
        ops.update_codes(*rest[:3], torch.ones(3), of.steps, of.seeds, codes, [])
    with pytest.raises(ConfigError, match="codes has 12 columns: must have 16"):
        ops.update_codes(*rest, of.steps, of.seeds, codes, [], lattice="e8")
    with pytest.raises(ConfigError, match="updates is"):
        ops.update_add_(torch.zeros(12).double(), of.updates, [1.0])
