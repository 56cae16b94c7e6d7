"""Codes as bytes and back: in hardly more than their tables say, and nothing else is accepted."""

import functools
import zlib

import pytest
import torch
from torch import Tensor

from commrt.codecs import code_tables, entropy
from commrt.codecs.entropy import decode_codes, decode_vectors, encode_codes, encode_vectors
from commrt.errors import ConfigError, WireFormatError
from commrt.ops.rans import RANS_SEGMENT, SLOTS
from tests.native import cases

# A difference means that payloads of another version cannot be read.
GOLDEN = (
    "ff7f0400ff3fffbfffbfff3f04404c81ff3fff7fff7f0080f6fff982ff3fffffffbf00806380ffff"
    "ffffff7ffebfff7f8109ffffff3fffbfff7f0b804f81ffff03090f070905e8fc0309050505d0f903"
    "05050506baf6031d1d04061da2f303"
)
GOLDEN_SEGMENTS = 0x9F7807B3


@functools.cache
def sample(numel: int, sigma: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes of a Gaussian of this sigma in steps, and rows that fit."""
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(numel, generator=generator) * sigma
    dither = torch.rand(numel, generator=generator) - 0.5
    phase = ((dither + 0.5) * code_tables.NUM_PHASES).floor().to(torch.int16)
    codes = (residual + dither).round().to(torch.int16)
    [first] = entropy.fit_rows(entropy.count_codes(codes, phase, 1))
    return codes, phase + first


def hashed(numel: int) -> tuple[Tensor, Tensor]:
    """Codes that no random generator can change, a ninth of which escapes; all kinds of rows."""
    index = torch.arange(numel)
    bits = index * 2654435761 % 2**32 >> 12
    codes = torch.where(index % 9 == 0, bits % 65536 - 32768, (bits % 31 - 15) // (1 + bits % 7))
    return codes.to(torch.int16), (index * 131 % code_tables.NUM_ROWS).to(torch.int16)


def model_bytes(codes: Tensor, rows: Tensor) -> float:
    """By the tables, without what goes with an escape."""
    starts = torch.nn.functional.pad(entropy.entropy_tables().long(), (0, 1), value=SLOTS)
    symbols = torch.where(entropy._are_escaped(codes, rows), 63, codes.long() + 31)
    slots = starts[rows.long(), symbols + 1] - starts[rows.long(), symbols]
    return float((14 - slots.double().log2()).sum()) / 8


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [0, 1, 2, 100, 5000])
def test_every_code_arrives_from_every_path(numel: int) -> None:
    """The payload: the same bytes. The codes: all there are, in rows that have slots for few."""
    codes, rows = hashed(numel)
    with cases.using_specification():
        payload = encode_codes(codes, rows)
    for path, use in cases.paths().items():
        with use:
            assert encode_codes(codes, rows) == payload, path
            assert torch.equal(decode_codes(payload, rows, numel), codes), path


def test_all_that_an_int16_can_be() -> None:
    codes = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    rows = torch.full_like(codes, 44 * 16)
    assert torch.equal(decode_codes(encode_codes(codes, rows), rows, codes.numel()), codes)


@pytest.mark.parametrize("numel", [RANS_SEGMENT - 1, RANS_SEGMENT, 2 * RANS_SEGMENT + 1])
def test_segments(numel: int) -> None:
    codes, rows = sample(numel, 0.3)
    assert torch.equal(decode_codes(encode_codes(codes, rows), rows, numel), codes)


def test_the_payload_is_what_it_was() -> None:
    """And that of 300,000 codes, in two segments."""
    assert encode_codes(*hashed(40)).hex() == GOLDEN
    assert zlib.crc32(encode_codes(*hashed(300_000))) == GOLDEN_SEGMENTS


def test_the_layout() -> None:
    """A stream alone; then what has escaped; before several streams, their lengths."""
    codes, rows = sample(1000, 0.3)
    payload = encode_codes(codes, rows)
    others = codes.clone()
    others[[3, 7, 9]] = torch.tensor([40, -40, 300], dtype=torch.int16)
    assert encode_codes(others, rows)[-4:] == bytes([80, 79, 0x80 | 600 % 128, 600 >> 7])
    assert len(payload) % 2 == 0
    codes, rows = sample(RANS_SEGMENT + 1, 0.3)
    payload = encode_codes(codes, rows)
    length = payload[0] & 127 | payload[1] << 7
    assert len(payload) == 2 + 2 * length + 2 * 2 * 4  # the last segment has a code


# -- few bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.07, 0.19, 1.0, 5.0])
def test_bytes_of_a_small_model(sigma: float) -> None:
    """The tables' code length of 17,000 codes, 4 bytes and 0.1 %; 0.2 to 4.4 bits each."""
    codes, rows = sample(17_000, sigma)
    wanted, found = model_bytes(codes, rows), len(encode_codes(codes, rows))
    escaped = 2 * int(entropy._are_escaped(codes, rows).sum())
    assert wanted <= found <= 1.001 * wanted + 4 + escaped


def test_bytes_of_half_a_bit() -> None:
    """17,000 codes: at most 0.6 % and 3 bytes over the tables' code length, and so on average."""
    over = []
    for seed in range(8):
        codes, rows = sample(17_000, 0.19, seed)
        wanted, found = model_bytes(codes, rows), len(encode_codes(codes, rows))
        assert 8 * found / 17_000 == pytest.approx(0.5, rel=0.05)
        assert found <= 1.006 * wanted + 3
        over.append(found - wanted)
    assert sum(over) / len(over) <= 3.2


def test_bytes_of_many_codes() -> None:
    """A million of 0.2 bits: 0.25 % over the tables' code length."""
    codes, rows = sample(1 << 20, 0.07)
    assert len(encode_codes(codes, rows)) <= 1.0025 * model_bytes(codes, rows)


def test_zeros_take_nothing() -> None:
    """A hundred thousand of them, by the narrowest table: 0.0008 bits each."""
    codes, rows = torch.zeros(100_000, dtype=torch.int16), (torch.arange(100_000) % 16).short()
    assert len(encode_codes(codes, rows)) <= 14


def test_tables_that_fit_cost_what_the_source_does() -> None:
    """A Gaussian's entropy given the dither, 1.25443 bits at sigma = step / 2, to 0.2 %."""
    codes, rows = sample(200_000, 0.5)
    assert 8 * len(encode_codes(codes, rows)) / 200_000 == pytest.approx(1.25443, rel=0.004)


# -- payloads from anywhere -----------------------------------------------------------------------


def payloads() -> dict[str, tuple[bytes, Tensor]]:
    """Payloads without and with escapes, and one of two segments; and their rows."""
    quiet, loud, long = sample(1000, 0.3), hashed(300), sample(RANS_SEGMENT + 50, 0.02)
    given = {"no escapes": quiet, "escapes": loud, "segments": long}
    return {name: (encode_codes(*one), one[1]) for name, one in given.items()}


@pytest.mark.parametrize("kind", payloads())
def test_what_is_cut_or_extended_is_refused(kind: str) -> None:
    payload, rows = payloads()[kind]
    for length in sorted({*range(12), *range(0, len(payload), 29), len(payload) - 1}):
        with pytest.raises(WireFormatError):
            decode_codes(payload[:length], rows, rows.numel())
    for spare in (b"\0", b"\1", b"\0\0", b"\xff" * 5, payload):
        with pytest.raises(WireFormatError):
            decode_codes(payload + spare, rows, rows.numel())


@pytest.mark.parametrize("kind", ["no escapes", "escapes"])
def test_a_flipped_bit_is_refused(kind: str) -> None:
    payload, rows = payloads()[kind]
    for index in range(0, 8 * len(payload), 11):
        flipped = bytearray(payload)
        flipped[index // 8] ^= 1 << index % 8
        with pytest.raises(WireFormatError):
            decode_codes(bytes(flipped), rows, rows.numel())


def test_flipped_lengths_of_segments_are_refused() -> None:
    payload, rows = payloads()["segments"]
    for index in range(8 * 3):
        flipped = bytearray(payload)
        flipped[index // 8] ^= 1 << index % 8
        with pytest.raises(WireFormatError):
            decode_codes(bytes(flipped), rows, rows.numel())


def test_noise_is_refused() -> None:
    rows = hashed(200)[1]
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(256, (seed,), dtype=torch.uint8, generator=generator)
        with pytest.raises(WireFormatError):
            decode_codes(bytes(noise.tolist()), rows, rows.numel())


def test_payloads_of_other_rows_are_refused() -> None:
    codes, rows = sample(1000, 0.3)
    payload = encode_codes(codes, rows)
    for others in (rows + 16, rows.flip(0), rows[:-1], torch.cat((rows, rows[:1]))):
        with pytest.raises(WireFormatError):
            decode_codes(payload, others, others.numel())


ESCAPED = torch.tensor([0, 100, 0], dtype=torch.int16)
BODY = encode_codes(ESCAPED, ESCAPED * 0)[:-2]


@pytest.mark.parametrize("numel", [40, 300_000])
def test_vectors_are_coded_as_if_alone(numel: int) -> None:
    """Of which some have codes that escape, and one has none."""
    codes, rows = (flat.view(4, numel) for flat in hashed(4 * numel))
    codes = codes.clone()
    codes[2] = 0
    payloads = encode_vectors(codes, rows)
    assert payloads == [encode_codes(*each) for each in zip(codes, rows, strict=True)]
    assert torch.equal(decode_vectors(payloads, rows), codes)
    for damaged in (payloads[1][:-1], payloads[1] + b"\x00", payloads[1][:-1] + b"\x80", b""):
        with pytest.raises(WireFormatError):
            decode_vectors([payloads[0], damaged, *payloads[2:]], rows)
    tail = len(payloads[0]) - 1
    moved = [payloads[0][:tail], payloads[1] + payloads[0][tail:], *payloads[2:]]
    with pytest.raises(WireFormatError):  # as many numbers as escaped, but of other vectors
        decode_vectors(moved, rows)


@pytest.mark.parametrize(
    ("escaped", "said"),
    [
        (b"", "0 numbers in 0 bytes: must be 1"),
        (b"\xc8", "0 numbers in 1 bytes: must be 1"),
        (b"\xc8\x81\x00", "a number of 3 bytes, or one with zeros to spare"),
        (b"\x81\x80\x80\x01", "a number of 4 bytes"),
        (b"\xff\xff\x7f", "an escaped code of 0x1fffff: has 16 bits"),
        (b"\x00", "a code has escaped that need not"),
        (b"\xca\x01", "a checksum of 3 codes is not theirs"),
        (b"\xc8\x01\x00", "1 bytes behind the last of the codes"),
    ],
)
def test_what_is_said_of_escapes(escaped: bytes, said: str) -> None:
    """Each number that escapes has one form, which is that of 100 here: 0xc8 0x01."""
    rows = ESCAPED * 0
    assert torch.equal(decode_codes(BODY + b"\xc8\x01", rows, 3), ESCAPED)
    with pytest.raises(WireFormatError, match=said):
        decode_codes(BODY + escaped, rows, 3)


@pytest.mark.parametrize("head", [b"", b"\xff\xff\x7f", b"\x80\x80\x10", b"\x80\x00", b"\x80" * 9])
def test_lengths_that_no_segment_has(head: bytes) -> None:
    """Memory is bounded by the number of codes and the payload's bytes, not by what it says."""
    rows = torch.zeros(20 * RANS_SEGMENT, dtype=torch.int16)
    with pytest.raises(WireFormatError):
        decode_codes(head * 19, rows, rows.numel())


# -- what is refused ------------------------------------------------------------------------------


def test_tensors_that_do_not_serve() -> None:
    codes, rows = sample(1000, 0.3)
    with pytest.raises(ConfigError, match=r"codes is torch\.int32 \(1000,\) on cpu: must be"):
        encode_codes(codes.int(), rows)
    with pytest.raises(ConfigError, match=r"codes is torch\.int16 \(999,\) on cpu: must be"):
        encode_codes(codes[1:], rows)
    with pytest.raises(
        ConfigError, match=r"rows is torch\.int64 \(1000,\): must be 1-D torch\.int16"
    ):
        encode_codes(codes, rows.long())
    with pytest.raises(ConfigError, match=r"rows are -1 to \d+: must be 0 to 8191"):
        encode_codes(codes, rows.index_fill(0, torch.tensor(5), -1))
    with pytest.raises(ConfigError, match=r"rows are \d+ to 8192: must be 0 to 8191"):
        decode_codes(b"", rows.index_fill(0, torch.tensor(5), 8192), 1000)
    with pytest.raises(ConfigError, match="rows has 1000 elements: must have numel=999"):
        decode_codes(b"", rows, 999)


def test_counts() -> None:
    codes = torch.tensor([0, 0, -31, 31, 32, -32768, 1], dtype=torch.int16)
    rows = torch.tensor([0, 0, 16, 17, 17, 18, 47], dtype=torch.int16)
    counts = entropy.count_codes(codes, rows, 3)
    assert counts.shape == (3, 16, 64)
    where = {tuple(index): int(counts[tuple(index)]) for index in counts.nonzero().tolist()}
    expected = {(0, 0, 31): 2, (1, 0, 0): 1, (1, 1, 62): 1, (1, 1, 63): 1, (1, 2, 63): 1}
    assert where == {**expected, (2, 15, 32): 1}
