"""Slepian-Wolf codes of bit planes: orders that are the same everywhere, tables, and integers sent.

The receiver's positions are as its users have them: of integers that are rounded with a dither.
"""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.codecs import polar
from commrt.errors import ConfigError

# By the specification in numpy, on x86-64; what sender and receiver must agree on.
DIGESTS = {
    (8, 0): "2977ab378b7eab5b",
    (11, 30): "776fcc46554324dc",
    (14, 98): "5547504ead77297a",
    (16, 159): "0a3a17f0d4059d6d",
}


def sample(sigma: float, shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Integers, and positions that are off by a Gaussian error and the rounding."""
    generator = torch.Generator().manual_seed(seed)
    dither = torch.rand(shape, generator=generator) - 0.5
    position = 10 * torch.randn(shape, generator=generator) + dither
    error = sigma * torch.randn(shape, generator=generator)
    return (position + error).round().to(torch.int16), position


def llr_of(position: Tensor, below: Tensor, sigma: float, plane: int) -> Tensor:
    llr = torch.empty(position.numel())
    table = polar.plane_table(sigma * 2.0**-plane, 2.0**-plane)
    ops.coset_llr(position.flatten(), below.flatten(), plane, table, llr)
    return llr.view(position.shape)


# -- the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log2_size", "entropy_bin"), DIGESTS)
def test_the_order_is_the_same_everywhere(log2_size: int, entropy_bin: int) -> None:
    order = polar.unreliable_first(log2_size, entropy_bin).numpy().astype("<i4")
    digest = hashlib.sha256(order.tobytes()).hexdigest()[:16]
    assert digest == DIGESTS[log2_size, entropy_bin]


def test_every_order_has_all_and_keeps_that_of_the_bits_of_an_index() -> None:
    """A u whose index has more ones is decided later and better: of Arikan's partial order."""
    for entropy_bin in range(0, polar.NUM_BINS, 27):
        order = polar.unreliable_first(10, entropy_bin)
        assert torch.equal(order.sort().values, torch.arange(1024))
        rank = torch.empty(1024, dtype=torch.int64)
        rank[order] = torch.arange(1024)
        for bit in range(10):
            below = torch.arange(1024)[torch.arange(1024) >> bit & 1 == 0]
            assert (rank[below] < rank[below + (1 << bit)]).all()


def test_the_order_does_not_depend_on_subnormals() -> None:
    expected = polar.unreliable_first(16, 5).clone()
    polar._unreliable_first.cache_clear()
    assert torch.set_flush_denormal(True)
    try:
        found = polar.unreliable_first(16, 5)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected)


def test_bins_are_near_the_entropy_and_count_down() -> None:
    found = [polar.entropy_bin_of(entropy) for entropy in (0.999, 0.9, 0.5, 0.1, 0.001)]
    assert found == sorted(found)
    assert found[0] >= 0
    assert found[-1] < polar.NUM_BINS
    for entropy in (0.1, 0.3, 0.5, 0.7, 0.9):
        of_bin = gaussian_entropy(2 ** (-5 + polar.entropy_bin_of(entropy) / 16))
        assert abs(of_bin - (entropy - entropy * (1 - entropy) / 8)) < 0.01


def gaussian_entropy(mean: float) -> float:
    """Of a bit whose LLR is Gaussian with this mean and twice it as variance, by Monte Carlo."""
    noise = np.random.default_rng(0).standard_normal(400_000)
    return float(np.log2(1 + np.exp(-mean - math.sqrt(2 * mean) * noise)).mean())


# -- tables and entropies -------------------------------------------------------------------------


def exact_table(sigma: float, cell: float, length: int) -> tuple[Tensor, Tensor]:
    """Probabilities of even and odd multiples, by error functions and a plain sum."""
    position = (np.arange(length) + 0.5) * 2 / length
    masses = np.zeros((2, length))
    for multiple in range(-40, 43):
        edges = [(multiple - position + side * cell / 2) / sigma for side in (-1, 1)]
        low, high = ([math.erf(x / math.sqrt(2)) for x in edge] for edge in edges)
        masses[multiple % 2] += (np.array(high) - np.array(low)) / 2
    return masses


@pytest.mark.parametrize("plane", [0, 1, 3])
@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.7])
def test_the_table_is_the_log_ratio(sigma: float, plane: int) -> None:
    even, odd = exact_table(sigma, 2.0**-plane, 256)
    found = polar.plane_table(sigma, 2.0**-plane, 256).numpy()
    is_safe = (even > 1e-9) & (odd > 1e-9)
    assert np.abs(found - np.log(even / odd))[is_safe].max() < 1e-5
    assert is_safe.sum() > 60
    assert np.array_equal(found, -np.roll(found, 128))


@pytest.mark.parametrize("sigma", [1e-9, 1e-3, 0.05, 5.0, 300.0])
def test_the_table_is_finite(sigma: float) -> None:
    found = polar.plane_table(sigma, 1.0)
    assert found.isfinite().all()
    quarter = found.numel() // 4
    assert (found[:quarter] >= -1e-6).all()
    assert (found[quarter : 3 * quarter] <= 1e-6).all()


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 4.0])
def test_entropies_of_planes_sum_to_that_of_the_integer(sigma: float) -> None:
    """H(n | z): z is where it is with the same probability for all n, but for a shift."""
    offset = (np.arange(300) + 0.5) / 300 - 0.5
    entropy = np.zeros(300)
    for code in range(-40, 41):
        edges = [(code - offset + side / 2) / sigma for side in (-1, 1)]
        low, high = ([math.erf(x / math.sqrt(2)) for x in edge] for edge in edges)
        mass = np.maximum((np.array(high) - np.array(low)) / 2, 1e-300)
        entropy -= mass * np.log2(mass)
    planes = sum(polar.plane_entropy(sigma * 2.0**-plane, 2.0**-plane) for plane in range(12))
    assert abs(planes - entropy.mean()) < 2e-4


def test_the_entropy_of_a_plane_at_its_ends() -> None:
    assert polar.plane_entropy(1e-6, 1.0) < 1e-4
    assert 1 - 1e-9 < polar.plane_entropy(10.0, 1.0) <= 1
    assert polar.plane_entropy(0.02, 0.125) < 1e-99


# -- planes ---------------------------------------------------------------------------------------


def test_what_is_sent_later_continues_what_was_sent() -> None:
    bits = (torch.rand(3, 512, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
    whole = polar.encode_plane(bits, 40, 320)
    first, more = polar.encode_plane(bits, 40, 200), polar.encode_plane(bits, 40, 120, first=200)
    assert whole.shape == (3, 40)
    assert torch.equal(torch.cat((first, more), dim=1), whole)
    assert polar.encode_plane(bits, 40, 0).shape == (3, 0)


def test_a_plane_that_is_sent_whole_arrives_whatever_is_known() -> None:
    bits = (torch.rand(2, 256, generator=torch.Generator().manual_seed(1)) < 0.5).to(torch.uint8)
    sent = polar.encode_plane(bits, 3, 256)
    assert sent.numel() == bits.numel() / 8
    assert torch.equal(polar.decode_plane(torch.zeros(2, 256), sent, 3), bits)


def test_a_plane_of_which_nothing_is_sent_is_as_the_llrs_say() -> None:
    llr = torch.linspace(-3, 3, 256)[None]
    found = polar.decode_plane(llr, torch.empty(1, 0, dtype=torch.uint8), 3)
    assert torch.equal(found, (llr < 0).to(torch.uint8))


def test_bits_needed_lie_between_the_entropy_and_all() -> None:
    for log2_size in (8, 12, 16):
        size = 1 << log2_size
        found = [polar.bits_needed(log2_size, entropy / 100) for entropy in range(101)]
        assert found == sorted(found)
        assert (found[0], found[-1]) == (0, size)
        assert all(count % 8 == 0 for count in found)
        assert all(count > entropy * size / 100 for entropy, count in enumerate(found[1:-1], 1))
        assert polar.bits_needed(log2_size, 0.5, margin=0.5) > found[50]
    assert polar.bits_needed(16, 0.5) / 2**16 < polar.bits_needed(12, 0.5) / 2**12
    assert polar.bits_needed(14, 1e-7) == 0


@pytest.mark.parametrize("sigma", [0.25, 1.3])
def test_integers_arrive_in_little_more_than_their_entropy(sigma: float) -> None:
    """All planes, each given those decoded before it; 16 blocks, of which two may fail."""
    codes, position = sample(sigma, (16, 1 << 14))
    decoded, sent_bytes, entropy, plane = torch.zeros_like(codes), 0, 0.0, 0
    while (of_plane := polar.plane_entropy(sigma * 2.0**-plane, 2.0**-plane)) > 1e-6:
        entropy_bin = polar.entropy_bin_of(of_plane)
        count = polar.bits_needed(14, of_plane, margin=0.15)
        bits = (codes >> plane & 1).to(torch.uint8)
        sent = polar.encode_plane(bits, entropy_bin, count)
        found = polar.decode_plane(llr_of(position, decoded, sigma, plane), sent, entropy_bin)
        decoded += found.to(torch.int16) << plane
        sent_bytes, entropy, plane = sent_bytes + sent.numel(), entropy + of_plane, plane + 1
    whole = torch.empty_like(codes)
    ops.coset_decode(position.flatten(), decoded.flatten(), 1 << plane, whole.flatten())
    assert (whole != codes).any(dim=1).sum() <= 2
    assert 8 * sent_bytes / codes.numel() - entropy < 0.105


def test_blocks_that_fail_are_decoded_with_more() -> None:
    """Too few bits at first; those that fail are asked for an eighth more at a time."""
    codes, position = sample(0.3, (6, 4096), seed=2)
    bits, llr = (codes & 1).to(torch.uint8), llr_of(position, torch.zeros_like(codes), 0.3, 0)
    entropy_bin, count, rounds = polar.entropy_bin_of(0.73), 8 * (int(0.70 * 4096) // 8), 0
    sent = polar.encode_plane(bits, entropy_bin, count)
    failed = torch.arange(6)
    while True:
        found = polar.decode_plane(llr[failed], sent, entropy_bin)
        is_wrong = (found != bits[failed]).any(dim=1)
        rounds += 1
        if not is_wrong.any():
            break
        failed = failed[is_wrong]
        more = polar.encode_plane(bits[failed], entropy_bin, 512, first=count)
        sent, count = torch.cat((sent[is_wrong], more), dim=1), count + 512
    assert 2 <= rounds <= 3


# -- what is refused ------------------------------------------------------------------------------


def test_what_does_not_serve() -> None:
    bits, llr = torch.zeros(2, 256, dtype=torch.uint8), torch.zeros(2, 256)
    with pytest.raises(ConfigError, match="log2_size=7: must be from 8 to 16"):
        polar.unreliable_first(7, 0)
    with pytest.raises(ConfigError, match="entropy_bin=160: must be from 0 to 159"):
        polar.unreliable_first(8, 160)
    with pytest.raises(ConfigError, match=r"u \[0, 12\) of 256: must be multiples of 8"):
        polar.encode_plane(bits, 0, 12)
    with pytest.raises(ConfigError, match=r"u \[200, 264\) of 256"):
        polar.encode_plane(bits, 0, 64, first=200)
    with pytest.raises(ConfigError, match="blocks of 300 bits"):
        polar.encode_plane(torch.zeros(2, 300, dtype=torch.uint8), 0, 8)
    with pytest.raises(ConfigError, match=r"sent is torch\.uint8 \(1, 9\)"):
        polar.decode_plane(llr, torch.zeros(1, 9, dtype=torch.uint8), 0)
    with pytest.raises(ConfigError, match="sent has 264 u a block: must be at most 256"):
        polar.decode_plane(llr, torch.zeros(2, 33, dtype=torch.uint8), 0)
    with pytest.raises(ConfigError, match=r"entropy=1\.5: must be in \[0, 1\]"):
        polar.bits_needed(8, 1.5)
    with pytest.raises(ConfigError, match=r"sigma=0\.0, cell=1\.0: must be above 0"):
        polar.plane_table(0.0, 1.0)
