"""polar_transform_, polar_decode: the same bits everywhere, and blocks decoded near the limit.

Known u are spread in three ways: in blocks of the tree, so that nodes are decided at every level;
as a code has them; and at random, which leaves no large node whole.
"""

import itertools

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.codecs.polar import unreliable_first
from commrt.errors import ConfigError
from commrt.ops.polar import PATHS
from commrt.ops.reference import polar as reference
from tests.native import cases
from tests.native.test_threads import threads

HOSTILE = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38, 1e-45, 2.0**20, -(2.0**21))


def random_bits(*shape: int, seed: int, share: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < share).to(torch.uint8)


def decode(llr: Tensor, known: Tensor, values: Tensor, bits: Tensor, paths: int) -> None:
    """With scratch of nonsense, which is not compared."""
    log2_size = llr.shape[1].bit_length() - 1
    num_floats = ops.polar_scratch(len(llr), log2_size, paths)
    scratch = torch.full((num_floats,), torch.nan, device=llr.device)
    ops.polar_decode(llr, known, values, bits, scratch, paths=paths)


def decoded(llr: Tensor, known: Tensor, values: Tensor, paths: int = 1) -> Tensor:
    bits = torch.full_like(values, cases.FILL)
    decode(llr, known, values, bits, paths)
    return bits


def check_everywhere(llr: Tensor, known: Tensor, values: Tensor, paths: int) -> Tensor:
    """The bits that every path writes."""
    bits = torch.full(llr.shape, cases.FILL, dtype=torch.uint8)
    cases.run_everywhere(decode, llr, known, values, bits, paths)
    return bits


def sample(log2_size: int, num_blocks: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Bits, and LLRs of them as sent by +1 and -1 through Gaussian noise."""
    size = 1 << log2_size
    bits = random_bits(num_blocks, size, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    received = 1 - 2.0 * bits + noise * torch.randn(bits.shape, generator=generator)
    return bits, 2 / noise**2 * received


def code(log2_size: int, count: int) -> Tensor:
    """The u that a code for about half a bit has as known."""
    known = torch.zeros(1 << log2_size, dtype=torch.uint8)
    known[unreliable_first(log2_size, 98)[:count]] = 1
    return known


# -- the transform --------------------------------------------------------------------------------


@pytest.mark.parametrize("log2_size", [8, 9, 12])
@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_every_transform_equals_the_specification(log2_size: int, num_blocks: int) -> None:
    raw = random_bits(num_blocks, 1 << log2_size, seed=log2_size) * 0xFF  # the lowest bit counts
    shifted = cases.unaligned(raw.flatten()).view(raw.shape)
    for bits in (raw, shifted):
        cases.run_everywhere(ops.polar_transform_, bits)
        assert num_blocks == 0 or bits.max() == 1


def test_the_transform_is_a_product_with_the_kronecker_power() -> None:
    power = torch.ones(1, 1)
    for _ in range(8):
        power = torch.kron(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), power)
    bits = random_bits(20, 256, seed=0)
    expected = (bits.float() @ power).to(torch.uint8) & 1
    ops.polar_transform_(bits)
    assert torch.equal(bits, expected)


def test_the_transform_is_its_own_inverse() -> None:
    bits = random_bits(2, 1 << 16, seed=0)
    twice = bits.clone()
    ops.polar_transform_(twice)
    assert not torch.equal(twice, bits)
    ops.polar_transform_(twice)
    assert torch.equal(twice, bits)


# -- the decoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("log2_size", [8, 11])
def test_every_decoder_equals_the_specification(paths: int, log2_size: int) -> None:
    size = 1 << log2_size
    _, llr = sample(log2_size, 2, 1.0, seed=paths)
    llr[1] = llr[1].round()  # ties
    values = random_bits(2, size, seed=3) * 0xFE + random_bits(2, size, seed=4)
    in_tree = torch.arange(size) // (size // 16) % 3 != 0
    for known in (in_tree.to(torch.uint8), 0x80 * code(log2_size, size // 2)):
        check_everywhere(llr, known, values, paths)


@pytest.mark.parametrize("paths", PATHS)
def test_a_block_that_is_larger_than_a_shared_memory(paths: int) -> None:
    _, llr = sample(13, 1, 1.0, seed=paths)
    known = (torch.arange(1 << 13) // (1 << 9) % 3 != 0).to(torch.uint8)
    check_everywhere(llr, known, random_bits(1, 1 << 13, seed=3), paths)


@pytest.mark.parametrize("paths", PATHS)
def test_nodes_of_every_kind(paths: int) -> None:
    """Known u at random, others in every block."""
    _, llr = sample(8, 4, 0.8, seed=1)
    known = torch.stack([random_bits(256, seed=9, share=share) for share in (0, 0.3, 0.9, 1)])
    values = random_bits(4, 256, seed=2)
    check_everywhere(llr, known, values, paths)
    shifted = cases.unaligned(known.flatten()).view(known.shape)
    check_everywhere(cases.unaligned(llr.flatten()).view(4, 256), shifted, values, paths)


@pytest.mark.parametrize("paths", PATHS)
def test_llrs_that_are_anything(paths: int) -> None:
    hostile = torch.tensor(HOSTILE)
    llr = torch.cat((hostile.repeat(26)[:256], hostile.repeat_interleave(26)[:256]))
    known, values = code(8, 128), random_bits(2, 256, seed=0)
    bits = check_everywhere(llr.view(2, 256), known, values, paths)
    assert bits.max() == 1
    assert check_everywhere(torch.full((1, 256), torch.nan), known, values[:1], paths).max() == 1


@pytest.mark.parametrize("paths", PATHS)
def test_no_blocks(paths: int) -> None:
    empty = torch.empty(0, 256)
    check_everywhere(empty, code(8, 9), empty.to(torch.uint8), paths)


@pytest.mark.parametrize("paths", PATHS)
def test_nothing_is_written_beyond(paths: int) -> None:
    """Of the scratch: what polar_scratch() says is enough."""
    least = ops.polar_scratch(2, 9, paths)
    _, llr = sample(9, 2, 1.0, seed=5)
    for use in cases.paths().values():
        scratch, bits = torch.full((least + 64,), 7.0), torch.empty(2, 512, dtype=torch.uint8)
        with use:
            ops.polar_decode(llr, code(9, 200), torch.zeros_like(bits), bits, scratch, paths=paths)
        assert torch.equal(scratch[least:], torch.full((64,), 7.0))


def test_all_known_is_the_transform_and_nothing_known_the_sign() -> None:
    _, llr = sample(10, 3, 1.0, seed=0)
    values = random_bits(3, 1024, seed=1)
    for paths in PATHS:
        every = decoded(llr, torch.ones(1024, dtype=torch.uint8), values, paths)
        assert torch.equal(every, reference.transformed(values))
        none = decoded(llr, torch.zeros(1024, dtype=torch.uint8), values, paths)
        assert torch.equal(none, (llr < 0).to(torch.uint8))


def test_certain_llrs_are_believed_whatever_is_known() -> None:
    bits = random_bits(4, 1024, seed=0)
    values = bits.clone()
    ops.polar_transform_(values)
    for paths, share in itertools.product(PATHS, (0.1, 0.5, 0.9)):
        known = random_bits(4, 1024, seed=paths, share=share)
        assert torch.equal(decoded(20 - 40.0 * bits, known, values, paths), bits)


def failures(log2_size: int, count: int, noise: float, paths: int, num_blocks: int) -> float:
    """The share of blocks that are decoded wrong."""
    bits, llr = sample(log2_size, num_blocks, noise, seed=log2_size)
    values = bits.clone()
    ops.polar_transform_(values)
    return float((decoded(llr, code(log2_size, count), values, paths) != bits).any(1).sum()) / len(
        bits
    )


def test_blocks_are_decoded_near_the_limit() -> None:
    """Side information that leaves 0.51 bits a bit: 0.60 are enough, and 0.48 never are."""
    assert failures(14, int(0.60 * 2**14), 0.99, paths=4, num_blocks=40) <= 0.05
    assert failures(14, int(0.48 * 2**14), 0.99, paths=4, num_blocks=10) == 1


def test_more_paths_fail_less() -> None:
    found = [failures(12, int(0.59 * 2**12), 0.99, paths, num_blocks=300) for paths in PATHS]
    assert found == sorted(found, reverse=True)
    assert found[0] > 3 * found[2] > 0


@pytest.mark.parametrize("isa", [path for path in cases.paths() if "cuda" not in path])
def test_any_number_of_threads(isa: str) -> None:
    _, llr = sample(12, 40, 1.0, seed=1)
    values = random_bits(40, 4096, seed=2)
    with cases.using_isa(isa):
        expected = decoded(llr, code(12, 2100), values, 4)
        with threads(3):
            assert torch.equal(decoded(llr, code(12, 2100), values, 4), expected)


# -- its arithmetic -------------------------------------------------------------------------------


def test_the_margin_is_near_the_logarithm() -> None:
    distance = torch.linspace(0, 12, 100_001)
    found = reference.soft_margin(distance)
    assert (found - (-distance.double()).exp().log1p()).abs().max() < 5e-4
    assert (found.diff() <= 0).all()
    assert found[0] < 0.694
    assert (found[distance >= 8.5] == 0).all()


def test_boxplus_is_near_the_logarithm_and_keeps_the_sign() -> None:
    values = torch.cat((torch.linspace(-20, 20, 1001), torch.tensor([1e-30, -1e-6, 1e3, 0.0])))
    a, b = torch.meshgrid(values, values, indexing="ij")
    found = reference.boxplus(a, b)
    a64, b64 = a.double(), b.double()
    exact = torch.logaddexp(torch.zeros_like(a64), a64 + b64) - torch.logaddexp(a64, b64)
    assert (found - exact).abs().max() < 1e-3
    assert (found * a * b >= 0).all()
    assert (found.abs() <= torch.minimum(a.abs(), b.abs()) + 1e-6).all()


# -- what is refused ------------------------------------------------------------------------------


def test_tensors_that_do_not_serve() -> None:
    llr, bits = torch.zeros(2, 256), torch.zeros(2, 256, dtype=torch.uint8)
    scratch = torch.zeros(ops.polar_scratch(2, 8))
    with pytest.raises(
        ConfigError, match=r"blocks of 300 bits: must be a power of two from 2\*\*8"
    ):
        ops.polar_transform_(torch.zeros(2, 300, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="blocks of 128 bits"):
        ops.polar_scratch(1, 7)
    with pytest.raises(
        ConfigError, match=r"bits is torch\.float32 \(2, 256\): must be torch\.uint8"
    ):
        ops.polar_transform_(llr)
    with pytest.raises(ConfigError, match=r"paths=3: must be one of \(1, 2, 4, 8\)"):
        ops.polar_decode(llr, bits, bits, bits, scratch, paths=3)
    with pytest.raises(ConfigError, match=r"known is torch\.uint8 \(1, 256\): must be uint8"):
        ops.polar_decode(llr, bits[:1], bits, bits, scratch)
    with pytest.raises(ConfigError, match="known is strided"):
        ops.polar_decode(llr, torch.zeros(512, dtype=torch.uint8)[::2], bits, bits, scratch)
    with pytest.raises(
        ConfigError, match=r"values is torch\.uint8 \(2, 512\): must be torch\.uint8"
    ):
        ops.polar_decode(llr, bits, bits.repeat(1, 2), bits, scratch)
    with pytest.raises(ConfigError, match="scratch has 1023 elements: must be at least 1024"):
        ops.polar_decode(llr, bits, bits, bits, scratch[1:])
    with pytest.raises(ConfigError, match=r"scratch is torch\.float64"):
        ops.polar_decode(llr, bits, bits, bits, scratch.double())
    with pytest.raises(ConfigError, match="bits is on meta: must be on cpu, as llr is"):
        ops.polar_decode(llr, bits, bits, bits.to("meta"), scratch)
