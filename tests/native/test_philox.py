"""The random numbers of stochastic rounding: the same words, whoever computes them."""

import pytest
import torch

from commrt import _C
from commrt.ops import BlockFormat, reference
from tests.native import cases

MASK = 0xFFFFFFFF

# counter, key, words: Philox4x32-10 in Random123's kat_vectors (Salmon et al., SC 2011).
RANDOM123 = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Written from the paper, in whole numbers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q & MASK, (p >> 32) ^ d ^ m, p & MASK
        k, m = (k + 0x9E3779B9) & MASK, (m + 0xBB67AE85) & MASK
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_the_tests_own_philox_knows_the_answers(counter: str, key: str, expected: str) -> None:
    assert philox(words(counter), words(key)) == words(expected)


def test_the_specification_knows_the_answer() -> None:
    """Of Random123's vectors ours can state this one: its fourth counter word is always zero."""
    found = reference.philox(0, 0, torch.tensor(0))
    assert tuple(found.tolist()) == words(RANDOM123[0][2])


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x299F31D0A4093822, 2**63 - 1])
@pytest.mark.parametrize("stream", [reference.STREAM_CODES, reference.STREAM_RESIDUAL])
def test_the_specification_computes_philox(seed: int, stream: int) -> None:
    """Seed is the key, element // 4 the low counter words, the stream the third."""
    counters = [0, 1, 2**31, 2**32 - 1, 2**32, 0x05A308D3243F6A88, 2**62 - 1]
    found = reference.philox(seed, stream, torch.tensor(counters))
    key = (seed & MASK, seed >> 32)
    expected = [philox((at & MASK, at >> 32, stream, 0), key) for at in counters]
    assert [tuple(row) for row in found.tolist()] == expected


@pytest.mark.parametrize("path", cases.paths())
@pytest.mark.parametrize("first_index", [0, 32, 96, 2**32 - 32, 2**34 - 64, 2**34 - 32, 2**40 + 32])
@pytest.mark.parametrize("block", [32, 1024])
def test_the_kernels_draw_these_numbers(path: str, first_index: int, block: int) -> None:
    """Codes: bit-identical to rounding by the specification's numbers, also past 2**34 elements.

    There the low counter word carries into the high one. No tensor is that long, so this calls the
    kernel, which is told the index of its first element.
    """
    seed, numel = 2**62 + 12345, 4 * block
    fmt = BlockFormat(bits=8, block=block)
    flat = torch.linspace(-100, 127, numel)
    flat[::block] = 127.0  # every scale is one
    payload = cases.empty_payload(fmt, 4)
    where = _C.Queue(0) if path.startswith("cuda") else _C.Threads(1)
    with cases.paths()[path]:
        _C.block_encode(
            _C.Window(flat.data_ptr(), 0, numel, first_index),
            _C.Payload(payload.data_ptr(), 4, 0),
            _C.BlockFormat(8, block, False),
            _C.Rounding(True, seed),
            4,
            where,
        )
    counter = torch.arange(first_index // 4, (first_index + numel) // 4)
    drawn = reference.philox(seed, reference.STREAM_CODES, counter).view(-1)
    uniform = (drawn >> 8).double() / 2**24
    expected = flat.floor() + (flat.double() - flat.double().floor() > uniform)
    codes, scale = cases.unpack(payload, fmt)
    assert scale.eq(1).all()
    assert torch.equal(codes.view(-1).float(), expected)
