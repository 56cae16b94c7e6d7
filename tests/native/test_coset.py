"""coset_llr, coset_decode: the same bits everywhere, and what is true of the integers."""

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from tests.native import cases
from tests.native.test_threads import threads

SIZES = (0, 1, 7, 1023, 1025, 40_001)
HOSTILE = torch.tensor(
    [
        torch.nan,
        torch.inf,
        -torch.inf,
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        3e38,
        -3e38,
        2.0**24,
        -0.5,
        32767.5,
    ]
)
TABLE = torch.linspace(3, -3, 64)


def positions(numel: int, seed: int) -> Tensor:
    spread = 100 * torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    spread[: min(numel, len(HOSTILE))] = HOSTILE[:numel]
    spread[20::7] = spread[20::7].round() + 0.5  # ties
    return spread


def integers(numel: int, seed: int, limit: int = 1 << 15) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit, (numel,), dtype=torch.int16, generator=generator)


@pytest.mark.parametrize("plane", [0, 1, 5, 15])
@pytest.mark.parametrize("length", [2, 64, 4096])
def test_every_llr_equals_the_specification(plane: int, length: int) -> None:
    table = torch.randn(length, generator=torch.Generator().manual_seed(length))
    for numel in SIZES:
        position, known = positions(numel, plane), integers(numel, 1).remainder(1 << plane)
        cases.run_everywhere(
            ops.coset_llr, position, known.short(), plane, table, torch.zeros(numel)
        )
        shifted = cases.unaligned(position)
        cases.run_everywhere(
            ops.coset_llr, shifted, known.short(), plane, table, torch.zeros(numel)
        )


@pytest.mark.parametrize("modulus", [1, 2, 3, 10, 1 << 15])
def test_every_decoded_coset_equals_the_specification(modulus: int) -> None:
    for numel in SIZES:
        position, residues = positions(numel, modulus), integers(numel, 1)
        codes = torch.zeros_like(residues)
        cases.run_everywhere(ops.coset_decode, position, residues, modulus, codes)


def test_llrs_are_those_of_the_distance_to_even_and_odd_multiples() -> None:
    """A table that is the distance itself shows it, to the width of a cell."""
    table = (torch.arange(4096) + 0.5) / 2048
    position = positions(10_000, 3)[len(HOSTILE) :]
    for plane in (0, 1, 3):
        known = integers(len(position), 2).remainder(1 << plane).short()
        llr = torch.zeros_like(position)
        ops.coset_llr(position, known, plane, table, llr)
        exact = ((position.double() - known) / 2**plane).remainder(2)
        assert (llr - exact).abs().max() <= 1 / 2048


def test_positions_that_are_not_finite_say_nothing() -> None:
    llr = torch.ones(3)
    ops.coset_llr(HOSTILE[:3], torch.zeros(3, dtype=torch.int16), 0, TABLE, llr)
    assert llr.tolist() == [0, 0, 0]
    near = torch.tensor([1e-30, -1e-30])  # a little above 0, and below 2
    ops.coset_llr(near, torch.zeros(2, dtype=torch.int16), 0, TABLE, llr[:2])
    assert llr.tolist() == [TABLE[0], TABLE[-1], 0]


@pytest.mark.parametrize("modulus", [1, 3, 8, 100])
def test_what_lies_within_half_a_modulus_is_found(modulus: int) -> None:
    codes = integers(10_000, 4, limit=10_000)
    noise = torch.rand(len(codes), generator=torch.Generator().manual_seed(0)) - 0.5
    position = codes + 0.99 * modulus * noise
    found = torch.zeros_like(codes)
    ops.coset_decode(position, codes.remainder(modulus), modulus, found)
    assert torch.equal(found, codes)


def test_codes_are_clamped_and_nan_is_none() -> None:
    codes = torch.ones(4, dtype=torch.int16)
    position = torch.tensor([torch.nan, 1e9, -torch.inf, 32767.6])
    ops.coset_decode(position, torch.zeros(4, dtype=torch.int16), 1, codes)
    assert codes.tolist() == [0, 32767, -32768, 32767]


def test_any_number_of_threads() -> None:
    position, known = positions(200_000, 0), integers(200_000, 1)
    expected, found = torch.zeros(200_000), torch.zeros(200_000)
    ops.coset_llr(position, known, 2, TABLE, expected)
    with threads(3):
        ops.coset_llr(position, known, 2, TABLE, found)
    cases.assert_same_bits(found, expected)


def test_tensors_that_do_not_serve() -> None:
    position, known, llr = torch.zeros(9), torch.zeros(9, dtype=torch.int16), torch.zeros(9)
    with pytest.raises(ConfigError, match="plane=16: must be from 0 to 15"):
        ops.coset_llr(position, known, 16, TABLE, llr)
    with pytest.raises(ConfigError, match="table has 63 elements: must be a power of two"):
        ops.coset_llr(position, known, 0, TABLE[1:], llr)
    with pytest.raises(ConfigError, match="table has 1 elements"):
        ops.coset_llr(position, known, 0, TABLE[:1], llr)
    with pytest.raises(ConfigError, match=r"known is torch\.float32 \(9,\): must be torch\.int16"):
        ops.coset_llr(position, llr, 0, TABLE, llr)
    with pytest.raises(ConfigError, match=r"llr is torch\.float32 \(8,\)"):
        ops.coset_llr(position, known, 0, TABLE, llr[1:])
    with pytest.raises(ConfigError, match="table is on meta: must be on cpu, as position is"):
        ops.coset_llr(position, known, 0, TABLE.to("meta"), llr)
    with pytest.raises(ConfigError, match="modulus=0: must be from 1 to 32768"):
        ops.coset_decode(position, known, 0, known)
    with pytest.raises(ConfigError, match=r"position is torch\.float32 \(3, 3\): must be"):
        ops.coset_decode(position.view(3, 3), known, 2, known)
