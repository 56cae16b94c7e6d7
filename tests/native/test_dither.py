"""dither_quantise, dither_dequantise, scale_rows: codes, values and rows are the same everywhere.

And what the dither is for: an error that is uniform on the lattice's cell, whatever the values are.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import reference
from commrt.ops.dither import DIMENSION, LATTICES, NAN_CODE, SECOND_MOMENT
from tests.native import cases
from tests.native.test_threads import threads

SEED = 2**62 + 12345
SIZES = (0, 1, 2, 3, 15, 16, 17, 127, 128, 129, 1023, 1025, 3001)
HOSTILE = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0, 32767.5, 1e6)


def sizes(lattice: str) -> list[int]:
    return [DIMENSION[lattice] * size for size in SIZES]


def normal(numel: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def hostile(numel: int, seed: int) -> Tensor:
    """Every few elements one that is awkward, and ties: halves and whole numbers."""
    values = normal(numel, seed)
    values[::3] = (2 * values[::3]).round() / 2
    values[seed % 7 :: 7] = torch.tensor(HOSTILE).repeat(numel)[: values[seed % 7 :: 7].numel()]
    return values


def empty_codes(numel: int) -> Tensor:
    return torch.full((numel,), 0x5A5A, dtype=torch.int16)


def encoded(values: Tensor, step: float = 1.0, **options) -> Tensor:
    codes = empty_codes(values.numel())
    ops.dither_quantise(values, options.pop("predicted", None), codes, step, SEED, **options)
    return codes


def decoded(codes: Tensor, step: float = 1.0, **options) -> Tensor:
    values = torch.full((codes.numel(),), 42.0)
    ops.dither_dequantise(codes, options.pop("predicted", None), values, step, SEED, **options)
    return values


def any_codes(numel: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-32768, 32768, (numel,), generator=generator, dtype=torch.int16)
    codes[::5] = NAN_CODE
    return codes


# -- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("make", [normal, hostile])
def test_codes_are_the_same_everywhere(lattice: str, make: Callable[[int, int], Tensor]) -> None:
    for index, numel in enumerate(sizes(lattice)):
        values, predicted = make(numel, index), normal(numel, index + 1)
        for place in (values, cases.unaligned(values)):
            for other in (None, predicted):
                for step in (1.0, 0.3, 2.0**-126, 2.0**126):
                    cases.run_everywhere(
                        ops.dither_quantise, place, other, empty_codes(numel), step, SEED,
                        first_index=8 * index, lattice=lattice,
                    )  # fmt: skip


@pytest.mark.parametrize("lattice", LATTICES)
def test_values_are_the_same_everywhere(lattice: str) -> None:
    for index, numel in enumerate(sizes(lattice)):
        codes, predicted = any_codes(numel, index), hostile(numel, index)
        for place in (codes, cases.unaligned(codes)):
            for other in (None, predicted, cases.unaligned(predicted)):
                for step in (1.0, 0.3, 2.0**-126, 2.0**126):
                    cases.run_everywhere(
                        ops.dither_dequantise, place, other, torch.full((numel,), 42.0), step,
                        SEED, first_index=8 * index, lattice=lattice,
                    )  # fmt: skip


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("num_groups", [1, 2, 9])
def test_rows_are_the_same_everywhere(lattice: str, num_groups: int) -> None:
    for index, numel in enumerate(sizes(lattice)):
        energies = hostile(numel, index)
        classes, ends = first_rows(num_groups, 1 + 9 * (index % 8)), ends_of(numel, num_groups)
        for given in (energies, cases.unaligned(energies), None):
            for contexts in (None, empty_codes(numel)):
                cases.run_everywhere(
                    ops.scale_rows, given, classes, ends, empty_codes(numel), SEED, base=230,
                    contexts=contexts, first_index=8 * index, lattice=lattice,
                )  # fmt: skip


def first_rows(num_groups: int, num_classes: int) -> Tensor:
    numbers = torch.arange(num_groups * num_classes, dtype=torch.int16)
    return 16 * numbers.view(num_groups, num_classes)


def ends_of(numel: int, num_groups: int) -> Tensor:
    """Of groups of any size, some of none."""
    generator = torch.Generator().manual_seed(numel)
    ends = torch.randint(numel + 1, (num_groups,), generator=generator).sort().values
    ends[-1] = numel
    return ends


@pytest.mark.parametrize("first_index", [1, 3, 5, 30, 31, 2**34 - 33, 2**34 - 5, 2**40 + 7])
def test_a_window_begins_anywhere(first_index: int) -> None:
    """Of the whole numbers; also past 2**34 elements, where a counter has more than one word."""
    for numel in (1, 5, 100, 1500):
        values = normal(numel, seed=0)
        codes = empty_codes(numel)
        options = {"first_index": first_index}
        cases.run_everywhere(ops.dither_quantise, values, None, codes, 1.0, SEED, **options)
        cases.run_everywhere(
            ops.dither_dequantise, codes, values, values.clone(), 1.0, SEED, **options
        )
        cases.run_everywhere(
            ops.scale_rows, values, first_rows(3, 3), ends_of(numel, 3), codes, SEED,
            base=250, **options,
        )  # fmt: skip


@pytest.mark.parametrize("lattice", LATTICES)
def test_windows_make_the_whole(lattice: str) -> None:
    """Codes, values and rows of two windows: bit-identical to those of all."""
    values, predicted = normal(4096, seed=0), normal(4096, seed=1)
    whole = [torch.zeros(4096, dtype=dtype) for dtype in (torch.int16, torch.float32, torch.int16)]
    parts = [tensor.clone() for tensor in whole]

    def run(outputs: list[Tensor], window: slice, first_index: int) -> None:
        codes, output, rows = (tensor[window] for tensor in outputs)
        options = {"first_index": first_index, "lattice": lattice}
        ops.dither_quantise(values[window], predicted[window], codes, 0.5, SEED, **options)
        ops.dither_dequantise(codes, predicted[window], output, 0.5, SEED, **options)
        ends = torch.tensor([max(0, 2000 - first_index), rows.numel()])
        energies = values[window].square()
        ops.scale_rows(energies, first_rows(2, 3), ends, rows, SEED, base=250, **options)

    run(whole, slice(None), 0)
    cut = 1000 if lattice == "e8" else 1003
    run(parts, slice(cut), 0)
    run(parts, slice(cut, None), cut)
    assert all(map(torch.equal, parts, whole))


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_threads(lattice: str, count: int) -> None:
    """Codes and values: bit-identical to one thread."""
    values = normal(200_008, seed=0)
    codes = encoded(values, lattice=lattice)
    output = decoded(codes, lattice=lattice)
    with threads(count):
        assert torch.equal(encoded(values, lattice=lattice), codes)
        assert torch.equal(decoded(codes, lattice=lattice), output)


# -- what the numbers are -------------------------------------------------------------------------


def test_the_dither_is_of_philox() -> None:
    """Code, value and row of the whole numbers, written out from the words."""
    words = reference.philox(SEED, 4, torch.arange(25, 50)).view(-1)
    dither = (words >> 8).double() / 2**24 - 0.5
    values = torch.linspace(-40, 40, 100)
    codes = encoded(values, 0.5, first_index=100)
    assert torch.equal(codes, (values.double() * 2 + dither).round().to(torch.int16))
    expected = (0.5 * (codes.double() - dither).float()).float()
    assert torch.equal(decoded(codes, 0.5, first_index=100), expected)
    rows = empty_codes(100)
    seven, ends = torch.full((1, 1), 7, dtype=torch.int16), torch.tensor([100])
    ops.scale_rows(None, seven, ends, rows, SEED, base=0, first_index=100)
    assert torch.equal(rows - 7, (words >> 28).to(torch.int16))
    assert torch.equal((words >> 28).double(), (16 * (dither + 0.5)).floor())


def test_classes_are_half_octaves_of_energy() -> None:
    numbers = [0.0, 0.25, 1.0, 1.69, 2.25, 4.0, 1e60, torch.inf, torch.nan, -torch.nan]
    energies, ends = torch.tensor(numbers), torch.tensor([10])
    rows, contexts = empty_codes(10), empty_codes(10)
    ops.scale_rows(energies, first_rows(1, 7), ends, rows, SEED, base=250, contexts=contexts)
    # From 2 ** -2 on, the highest bit of the mantissa as well.
    assert (rows // 16).tolist() == [0, 0, 4, 5, 6, 6, 6, 6, 6, 6]
    assert torch.equal(contexts, rows)
    ops.scale_rows(energies, first_rows(1, 7), ends, rows, SEED, base=253)
    assert (rows // 16).tolist() == [0, 0, 1, 2, 3, 5, 6, 6, 6, 6]


def test_each_group_has_rows_of_its_own() -> None:
    """The last one also what is behind its end; groups without elements have none."""
    rows, contexts = empty_codes(3000), empty_codes(3000)
    ends = torch.tensor([1030, 1030, 1040, 1500])
    energies = torch.full((3000,), 2.25)
    classes = first_rows(4, 7)
    ops.scale_rows(energies, classes, ends, rows, SEED, base=253, contexts=contexts)
    expected = torch.tensor([3, 17, 24]).repeat_interleave(torch.tensor([1030, 10, 1960]))
    assert torch.equal(rows // 16, expected.short())
    assert torch.equal(contexts, rows % 16 + 16 * 3)


@pytest.mark.parametrize("wrong", [[9, 3, 5], [-4, 2**40, 0], [7000, 7000, 7000]])
def test_ends_that_are_wrong_name_no_other_memory(wrong: list[int]) -> None:
    rows = cases.unaligned(empty_codes(3000))
    for path, use in cases.paths().items():
        with use:
            ops.scale_rows(None, first_rows(3, 5), torch.tensor(wrong), rows, SEED, base=0)
        around = rows.new_empty(0).set_(rows.untyped_storage())
        assert around[0] == around[-1] == cases.FILL, path
        assert set((rows // 16).tolist()) <= {0, 5, 10}, path


def textbook_e8(x_B8: Tensor) -> Tensor:
    """Algorithms 4 and 5 of Conway and Sloane (1982), in fp64."""

    def nearest_d8(x_B8: Tensor) -> Tensor:
        f_B8 = x_B8.round()
        worst_B1 = (x_B8 - f_B8).abs().argmax(dim=1, keepdim=True)
        way_B1 = torch.where((x_B8 - f_B8).gather(1, worst_B1) < 0, -1.0, 1.0).double()
        g_B8 = f_B8.scatter_add(1, worst_B1, way_B1)
        return torch.where(f_B8.sum(dim=1, keepdim=True) % 2 == 0, f_B8, g_B8)

    x_B8 = x_B8.double()
    whole_B8, half_B8 = nearest_d8(x_B8), nearest_d8(x_B8 - 0.5) + 0.5
    whole_B, half_B = ((x_B8 - y_B8).square().sum(dim=1) for y_B8 in (whole_B8, half_B8))
    return torch.where((whole_B <= half_B)[:, None], whole_B8, half_B8)


@pytest.mark.parametrize("scale", [0.1, 1.0, 300.0])
def test_the_point_of_e8_is_the_nearest(scale: float) -> None:
    x_B8 = normal(80_000, seed=0, scale=scale).view(-1, 8)
    twice_B8 = reference.nearest_e8(x_B8)
    assert torch.equal(twice_B8.double() / 2, textbook_e8(x_B8))
    assert (twice_B8 % 2 == twice_B8[:, :1] % 2).all()
    assert (twice_B8.sum(dim=1) % 4 == 0).all()


def test_ties_of_e8() -> None:
    """By the rules of ``nearest_e8``: integers before halves, the first coordinate upwards."""
    x_B8 = torch.zeros(5, 8)
    x_B8[1, 3] = 1.0  # as far from 2 d_3 as from all d_3 +- d_i, and halves
    x_B8[2] = 0.25  # from zero as far as from all halves
    x_B8[3, 5] = -1.0
    x_B8[4, :2] = 0.5  # from d_0 + d_1 as far as from zero, and from halves as well
    expected = torch.zeros(5, 8)
    expected[1, 0], expected[1, 3] = 2.0, 2.0
    expected[3, 0], expected[3, 5] = 2.0, -2.0
    assert torch.equal(reference.nearest_e8(x_B8), expected)


# -- what the dither is for -----------------------------------------------------------------------

VALUES: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda numel: normal(numel, seed=0),
    "far below a step": lambda numel: normal(numel, seed=0, scale=1e-3),
    "all the same": lambda numel: torch.full((numel,), 0.37),
    "whole numbers": lambda numel: normal(numel, seed=0).round(),
    "sparse": lambda numel: normal(numel, seed=0) * (normal(numel, seed=1) > 5.0),
}


def error_of(values: Tensor, lattice: str, step: float) -> Tensor:
    """In steps, as fp64."""
    codes = encoded(values, step, lattice=lattice)
    return (decoded(codes, step, lattice=lattice).double() - values.double()) / step


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("kind", VALUES)
def test_the_error_is_uniform_on_the_cell(lattice: str, kind: str) -> None:
    """Mean, variance and correlations within five standard errors of what they should be."""
    numel, step = 1 << 18, 0.5
    values = VALUES[kind](numel) * step
    error = error_of(values, lattice, step)
    deviation, five = SECOND_MOMENT[lattice] ** 0.5, 5 / numel**0.5
    assert abs(error.mean()) < five * deviation
    assert abs(error.square().mean() / deviation**2 - 1) < five
    for other in (values, values.square(), values.roll(1), error.roll(1), error.roll(3)):
        other = other.double() - other.double().mean()
        if other.std() > 1e-6:
            assert abs((error * other).mean()) < five * deviation * other.std()


def test_the_error_is_uniform_between_halves() -> None:
    """Sixteen parts of the cell of the whole numbers are hit as often, whatever the value."""
    error = error_of(normal(1 << 18, seed=0), "z", 1.0)
    assert error.abs().max() <= 0.5 + 1e-6
    hits = torch.histc(error.float(), 16, -0.5, 0.5)
    assert ((hits - (1 << 14)).abs() < 5 * 2**7).all()


def test_the_error_is_in_the_cell_of_e8() -> None:
    """Zero is the nearest point; norms are those of a uniform point: up to 1, on average 0.5734."""
    error_B8 = error_of(normal(1 << 18, seed=0), "e8", 1.0).view(-1, 8)
    nearest_B8 = textbook_e8(error_B8)
    further_B = (error_B8 - nearest_B8).square().sum(dim=1) - error_B8.square().sum(dim=1)
    assert further_B.abs().max() < 1e-5
    norm_B = error_B8.square().sum(dim=1)
    assert norm_B.max() <= 1 + 1e-5
    assert abs(norm_B.mean() - 8 * SECOND_MOMENT["e8"]) < 5 * norm_B.std() / len(norm_B) ** 0.5


def test_seeds_give_independent_errors() -> None:
    values = normal(1 << 16, seed=0)
    codes, other = encoded(values), empty_codes(1 << 16)
    ops.dither_quantise(values, None, other, 1.0, SEED + 1)
    second = torch.empty_like(values)
    ops.dither_dequantise(other, None, second, 1.0, SEED + 1)
    product = (decoded(codes) - values) * (second - values)
    assert abs(product.mean()) < 5 * SECOND_MOMENT["z"] / 2**8


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("step", [1e-6, 0.02, 7.0])
def test_values_come_back_within_half_a_cell(lattice: str, step: float) -> None:
    """Of a coordinate the most is 1/2 of the whole numbers, 1 of E8, and what fp32 rounds."""
    values, predicted = normal(1 << 14, 0, 100 * step), normal(1 << 14, 1, 100 * step)
    codes = encoded(values, step, predicted=predicted, lattice=lattice)
    error = decoded(codes, step, predicted=predicted, lattice=lattice) - values
    assert error.abs().max() <= step * (0.5 if lattice == "z" else 1.0) * 1.001


def test_what_is_coded_again_is_the_same() -> None:
    """A decoded value has its own code."""
    for lattice in LATTICES:
        codes = encoded(normal(1 << 14, seed=0, scale=20.0), lattice=lattice)
        assert torch.equal(encoded(decoded(codes, lattice=lattice), lattice=lattice), codes)


def test_what_is_no_number_or_too_large() -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e9, -1e9, 0.0, 0.0, 0.0])
    codes = encoded(values)
    assert codes[:5].tolist() == [NAN_CODE, 32767, -32767, 32767, -32767]
    assert decoded(codes).isnan().tolist() == [True] + 7 * [False]
    assert encoded(values, lattice="e8").tolist() == 8 * [NAN_CODE]
    limited = encoded(values.nan_to_num(0.0, torch.inf, -torch.inf), lattice="e8").int()
    assert (limited[1:5] - torch.tensor([1, -1, 1, -1]) * 32764).abs().max() <= 2
    assert limited.sum() % 4 == 0


# -- what is refused ------------------------------------------------------------------------------


def test_tensors_that_do_not_serve() -> None:
    flat, codes = torch.zeros(12), torch.zeros(12, dtype=torch.int16)
    with pytest.raises(ConfigError, match=r"values is torch\.float64 \(12,\): must be torch\.f"):
        ops.dither_quantise(flat.double(), None, codes, 1.0, 0)
    with pytest.raises(ConfigError, match=r"codes is torch\.int32"):
        ops.dither_quantise(flat, None, codes.int(), 1.0, 0)
    with pytest.raises(ConfigError, match="1-D and contiguous"):
        ops.dither_quantise(flat, flat.repeat(2)[::2], codes, 1.0, 0)
    with pytest.raises(ConfigError, match="predicted has 11 elements: must have 12, as values has"):
        ops.dither_quantise(flat, flat[1:], codes, 1.0, 0)
    with pytest.raises(ConfigError, match="values has 11 elements: must have 12, as codes has"):
        ops.dither_dequantise(codes, None, flat[1:], 1.0, 0)
    with pytest.raises(ConfigError, match="predicted is on meta: must be on cpu, as codes is"):
        ops.dither_dequantise(codes, flat.to("meta"), flat, 1.0, 0)
    ends = torch.tensor([12])
    with pytest.raises(ConfigError, match=r"energies is torch\.float64 \(12,\): must be torch\.f"):
        ops.scale_rows(flat.double(), codes[None], ends, codes, 0, base=0)
    with pytest.raises(ConfigError, match="contexts has 11 elements: must have 12, as rows has"):
        ops.scale_rows(flat, codes[None], ends, codes, 0, base=0, contexts=codes[1:])
    with pytest.raises(ConfigError, match="has 1 groups of 65 classes: must have"):
        ops.scale_rows(flat, first_rows(1, 65), ends, codes, 0, base=0)
    with pytest.raises(ConfigError, match="has 0 groups of 12 classes: must have"):
        ops.scale_rows(flat, codes[None][:0], ends[:0], codes, 0, base=0)
    with pytest.raises(ConfigError, match=r"rows_of_class is .*\(2, 6\): must be .* \(1, any\)"):
        ops.scale_rows(flat, first_rows(2, 6), ends, codes, 0, base=0)
    with pytest.raises(ConfigError, match="rows_of_class is on meta: must be on cpu, as rows is"):
        ops.scale_rows(flat, codes[None].to("meta"), ends, codes, 0, base=0)
    with pytest.raises(ConfigError, match=r"ends is torch\.int32"):
        ops.scale_rows(flat, codes[None], ends.int(), codes, 0, base=0)


def test_arguments_that_do_not_serve() -> None:
    flat, codes = torch.zeros(12), torch.zeros(12, dtype=torch.int16)
    for step in (0.0, -1.0, 1e-39, 1e39, torch.nan):
        with pytest.raises(ConfigError, match=r"step=.*: must be from"):
            ops.dither_quantise(flat, None, codes, step, 0)
    with pytest.raises(ConfigError, match="seed=-1: must be in"):
        ops.dither_quantise(flat, None, codes, 1.0, -1)
    with pytest.raises(ConfigError, match="first_index=-1: must be in"):
        ops.dither_quantise(flat, None, codes, 1.0, 0, first_index=-1)
    with pytest.raises(ConfigError, match=r"lattice='d4': must be one of \('z', 'e8'\)"):
        ops.dither_quantise(flat, None, codes, 1.0, 0, lattice="d4")
    with pytest.raises(ConfigError, match="12 elements from first_index=0 on: lattice='e8' needs"):
        ops.dither_quantise(flat, None, codes, 1.0, 0, lattice="e8")
    with pytest.raises(ConfigError, match="8 elements from first_index=4 on: lattice='e8' needs"):
        ops.dither_quantise(flat[4:], None, codes[4:], 1.0, 0, first_index=4, lattice="e8")
    with pytest.raises(ConfigError, match=r"base=512: must be in \[0, 512\)"):
        ops.scale_rows(flat, codes[None], torch.tensor([12]), codes, 0, base=512)
