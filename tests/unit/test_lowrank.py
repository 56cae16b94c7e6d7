"""The low-rank codec by itself: what it takes, its first basis, and which matrices it is for."""

import pytest
import torch

from commrt.codecs import LowRankCodec, matrix_shape, orthonormal, parse
from commrt.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0: must be an integer of at least 1"),
        ({"rank": 2.0}, "rank=2.0: must be an integer of at least 1"),
        ({"rank": 2, "bits": 3}, r"bits=3: must be one of \(1, 2, 4, 8\)"),
        ({"rank": 2, "basis": 16}, r"bits=16: must be one of \(1, 2, 4, 8\)"),
        ({"rank": 2, "block": 100}, "block=100: must be one of"),
    ],
)
def test_bad_settings_are_named(settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LowRankCodec(**settings)


def test_the_spec_round_trips() -> None:
    codec = parse("lowrank12:bits=4,block=64")
    assert codec == LowRankCodec(rank=12, bits=4, basis=8, block=64)
    assert parse(codec.spec) == codec


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_first_basis_is_orthonormal_and_the_same_everywhere(name: str) -> None:
    codec, shape = LowRankCodec(rank=4), torch.Size((64, 3, 5, 5))
    basis = codec.new_basis(shape, name)
    assert torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-5)
    assert basis.shape == (4, 75)
    torch.manual_seed(99)
    assert torch.equal(codec.new_basis(shape, name), basis)
    assert not torch.equal(codec.new_basis(shape, "other"), basis)


def test_orthonormal_keeps_the_span() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    basis = orthonormal(rows)
    assert torch.allclose(basis @ basis.T, torch.eye(3), atol=1e-5)
    assert torch.allclose(rows @ basis.T @ basis, rows, atol=1e-5)


def test_a_parameter_as_a_matrix() -> None:
    assert matrix_shape(torch.Size((6, 2, 3))) == (6, 6)
    assert matrix_shape(torch.Size((0, 4))) == (0, 0)


@pytest.mark.parametrize(
    ("shape", "pays"), [((64, 64), True), ((64, 15), False), ((1000, 8), False), ((32, 32), True)]
)
def test_only_matrices_that_shrink_to_half(shape: tuple[int, int], pays: bool) -> None:
    assert LowRankCodec(rank=8).pays(torch.Size(shape)) is pays
