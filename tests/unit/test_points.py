"""Points of E8 as bytes."""

import math
from random import Random

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.codecs.entropy import count_codes, fit_rows
from commrt.codecs.points import Scales, decode_points, encode_points, scalar_codes
from commrt.errors import WireFormatError
from commrt.ops.dither import SECOND_MOMENT

SEED = 5


def points(numel: int, sigma: float) -> tuple[Tensor, Scales]:
    """Codes of Gaussian residuals, and the scales that fit them best."""
    residual = sigma * torch.randn(numel, generator=torch.Generator().manual_seed(1))
    codes, undithered = torch.empty(numel, dtype=torch.int16), torch.empty(numel)
    ops.dither_quantise(residual, None, codes, 1.0, SEED, lattice="e8")
    zeros = torch.zeros_like(codes)
    ops.dither_dequantise(zeros, None, undithered, 1.0, SEED, lattice="e8")
    dither = -undithered
    firsts = fit_rows(count_codes(*scalar_codes(codes, dither), 1)) if numel else zeros[:1]
    return codes, Scales(dither, firsts.expand(numel).contiguous())


@pytest.mark.parametrize("numel", [0, 8, 64, 1000])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 300.0])
def test_what_is_encoded_is_decoded(numel: int, sigma: float) -> None:
    codes, scales = points(numel, sigma)
    assert torch.equal(decode_points(encode_points(codes, scales), scales), codes)


@pytest.mark.parametrize("sigma", [1.0, 4.0])
def test_little_more_than_the_limit(sigma: float) -> None:
    """The noise of E8 is 0.146 bits from a Gaussian's."""
    codes, scales = points(1 << 15, sigma)
    bits = 8 * len(encode_points(codes, scales)) / codes.numel()
    limit = 0.5 * math.log2(1 + sigma**2 / SECOND_MOMENT["e8"])
    assert limit < bits < limit + 0.17


def test_damage() -> None:
    codes, scales = points(160, 1.0)
    payload, random = encode_points(codes, scales), Random(0)
    for length in range(len(payload)):
        with pytest.raises(WireFormatError):
            decode_points(payload[:length], scales)
    for _ in range(300):
        damaged = bytearray(payload)
        damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        try:
            found = decode_points(bytes(damaged), scales)
        except WireFormatError:
            continue
        assert found.shape == codes.shape
        assert int((found.view(-1, 8).sum(dim=1) % 4).abs().max()) == 0
