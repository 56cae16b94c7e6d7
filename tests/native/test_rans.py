"""rans_encode, rans_decode: codes arrive; streams are the same words everywhere.

Tables are of 40 rows: uniform, skewed, with symbols that have no slots, or nearly all.
"""

import functools

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import rans
from commrt.ops.rans import ESCAPED, LANES, RANS_SEGMENT
from tests.native import cases
from tests.native.test_threads import threads

SIZES = (0, 1, 3, 4, 5, 31, 32, 33, 127, 1000)
NUM_ROWS = 40


@functools.cache
def table() -> Tensor:
    """uint16 [40, 64]; in the first eight rows every symbol has slots."""
    generator = torch.Generator().manual_seed(0)
    weight = (
        torch.rand(NUM_ROWS, 64, generator=generator) ** torch.linspace(0, 40, NUM_ROWS)[:, None]
    )
    slots = (weight / weight.sum(dim=1, keepdim=True) * (rans.SLOTS - 64)).long()
    slots[:8] += 1
    slots[:, 31] += rans.SLOTS - slots.sum(dim=1)
    return (slots.cumsum(dim=1) - slots).to(torch.uint16)


def sample(numel: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes that their rows have slots for, and rows; some codes escape."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(NUM_ROWS, (numel,), generator=generator)
    slot = torch.randint(rans.SLOTS, (numel, 1), generator=generator)
    symbols = torch.searchsorted(table().long()[rows], slot, right=True)[:, 0] - 1
    codes = torch.where(symbols == rans.ESCAPE, ESCAPED, symbols - rans.MOST_CODE)
    return codes.to(torch.int16), rows.to(torch.int16)


def checks_of(num_segments: int) -> Tensor:
    return (7919 * torch.arange(num_segments) % 2**16).to(torch.uint16)


def encoded(
    codes: Tensor, rows: Tensor, lanes: int, starts: Tensor | None = None
) -> list[list[int]]:
    """The words of each segment; of one that cannot be coded, none."""
    num_segments = ops.rans_segments(codes.numel())
    capacity = ops.rans_capacity(codes.numel(), lanes)
    words = codes.new_empty(num_segments, capacity, dtype=torch.uint16)
    lengths = codes.new_empty(num_segments, dtype=torch.int32)
    starts = (table() if starts is None else starts).to(codes.device)
    checks = checks_of(num_segments).to(codes.device)
    ops.rans_encode(codes, rows, starts, checks, words, lengths, lanes=lanes)
    used = lengths.clamp(min=0).tolist()
    return [row[:length].tolist() for row, length in zip(words, used, strict=True)]


def decoded(
    streams: list[list[int]],
    rows: Tensor,
    lanes: int,
    spare: int = 0,
    starts: Tensor | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Codes, words used and checks of streams of which ``spare`` more words are told."""
    widest = max(map(len, streams), default=0)
    words = torch.tensor([stream + [7] * (widest - len(stream)) for stream in streams])
    words = words.to(rows.device, torch.uint16).view(len(streams), widest)
    lengths = torch.tensor([len(stream) + spare for stream in streams], dtype=torch.int32)
    lengths = lengths.to(rows.device)
    codes, used = torch.full_like(rows, 99), torch.full_like(lengths, 99)
    checks = torch.ones_like(lengths).to(torch.uint16)
    starts = (table() if starts is None else starts).to(rows.device)
    ops.rans_decode(words, lengths, rows, starts, codes, checks, used, lanes=lanes)
    return codes.tolist(), used.tolist(), checks.tolist()


def whole(codes: Tensor, streams: list[list[int]]) -> tuple[list[int], list[int], list[int]]:
    """What is decoded of streams that are as they were."""
    lengths = [len(stream) for stream in streams]
    return codes.tolist(), lengths, checks_of(len(streams)).tolist()


def damaged(numel: int) -> tuple[list[int], list[int], list[int]]:
    """What is decoded of a segment that no encoder wrote."""
    return [0] * numel, [-1], [0]


def encoded_everywhere(
    codes: Tensor, rows: Tensor, lanes: int, starts: Tensor | None = None
) -> list[list[int]]:
    with cases.using_specification():
        expected = encoded(codes, rows, lanes, starts)
    for path, use in cases.paths().items():
        with use:
            assert encoded(codes, rows, lanes, starts) == expected, path
    return expected


def decoded_everywhere(
    streams: list[list[int]],
    rows: Tensor,
    lanes: int,
    spare: int = 0,
    starts: Tensor | None = None,
) -> tuple[list[int], list[int], list[int]]:
    with cases.using_specification():
        expected = decoded(streams, rows, lanes, spare, starts)
    for path, use in cases.paths().items():
        with use:
            assert decoded(streams, rows, lanes, spare, starts) == expected, path
    return expected


class Streams:
    """Of vectors (K, N): what :func:`commrt.ops.rans_encode` writes."""

    def __init__(self, codes: Tensor, lanes: int) -> None:
        self.count = len(codes) * ops.rans_segments(codes.shape[1])
        width = ops.rans_capacity(codes.shape[1], lanes)
        self.words = torch.zeros(self.count, width, dtype=torch.uint16)
        self.lengths = torch.zeros(self.count, dtype=torch.int32)
        self.escaped, self.num_escaped = torch.zeros_like(codes), torch.zeros_like(self.lengths)

    def all(self) -> dict[str, Tensor]:
        return {
            name: getattr(self, name) for name in ("words", "lengths", "escaped", "num_escaped")
        }


@pytest.mark.parametrize("numel", [0, 1, 700])
@pytest.mark.parametrize("lanes", LANES)
def test_vectors_on_every_path(lanes: int, numel: int) -> None:
    codes, rows = (flat.view(3, numel) for flat in sample(3 * numel, seed=1))
    alone = [encoded(code, row, lanes) for code, row in zip(codes, rows, strict=True)]
    checks = checks_of(ops.rans_segments(numel)).repeat(3)
    for path, use in {**cases.paths(), "specification": cases.using_specification()}.items():
        streams = Streams(codes, lanes)
        found, used = torch.ones_like(codes), torch.zeros_like(streams.lengths)
        with use:
            ops.rans_encode(codes, rows, table(), checks, lanes=lanes, **streams.all())
            ops.rans_decode(
                streams.words, streams.lengths, rows, table(), found, checks.clone(), used,
                lanes=lanes,
            )  # fmt: skip
        lengths = streams.lengths.tolist()
        words = [row[:size].tolist() for row, size in zip(streams.words, lengths, strict=True)]
        assert words == [stream for streams in alone for stream in streams], path
        assert torch.equal(used, streams.lengths), path
        assert torch.equal(found, codes), path


@pytest.mark.parametrize("numel", [9, RANS_SEGMENT + 5])
def test_vectors_are_coded_apart(numel: int) -> None:
    """Each as if it were alone, in segments of its own; here of what escapes as well."""
    codes, rows = (flat.view(2, numel) for flat in sample(2 * numel, seed=2))
    rows = rows % 8
    codes = torch.where(rows == 7, 300, codes.clamp(-31, 31)).short()
    both = Streams(codes, 4)
    checks = checks_of(both.count)
    ops.rans_encode(codes, rows, table(), checks, lanes=4, **both.all())
    size = both.count // 2
    for k in range(2):
        own, one = slice(k * size, (k + 1) * size), Streams(codes[k : k + 1], 4)
        ops.rans_encode(
            codes[k], rows[k], table(), checks[own].clone(), one.words, one.lengths, lanes=4,
            escaped=one.escaped[0], num_escaped=one.num_escaped,
        )  # fmt: skip
        assert torch.equal(both.lengths[own], one.lengths)
        assert torch.equal(both.num_escaped[own], one.num_escaped)
        for row, length in enumerate(one.lengths.tolist()):
            words = both.words[own].int()
            assert torch.equal(words[row, :length], one.words[row, :length].int())
        count = int(one.num_escaped[0])
        assert count
        assert torch.equal(both.escaped[k, :count], one.escaped[0, :count])
    found, used = torch.ones_like(codes), torch.zeros_like(both.lengths)
    with threads(3):
        ops.rans_decode(both.words, both.lengths, rows, table(), found, checks, used, lanes=4)
    assert torch.equal(used, both.lengths)
    assert torch.equal(found, codes.masked_fill(codes == 300, ESCAPED))


@pytest.mark.parametrize("lanes", LANES)
def test_every_path_equals_the_specification(lanes: int) -> None:
    """All that is written; and what is decoded is what was encoded."""
    for seed, numel in enumerate(SIZES):
        codes, rows = sample(numel, seed)
        streams = encoded_everywhere(codes, rows, lanes)
        assert decoded_everywhere(streams, rows, lanes) == whole(codes, streams)


@pytest.mark.parametrize("lanes", LANES)
def test_several_segments(lanes: int) -> None:
    """Each by itself, on any number of threads."""
    codes, rows = sample(2 * RANS_SEGMENT + 100, seed=lanes)
    streams = encoded(codes, rows, lanes)
    for begin, stream in zip(range(0, codes.numel(), RANS_SEGMENT), streams, strict=True):
        window = slice(begin, begin + RANS_SEGMENT)
        found = decoded([stream], rows[window].clone(), lanes)
        assert found[:2] == (codes[window].tolist(), [len(stream)])
    for count in (1, 2, 16):
        with threads(count):
            assert encoded(codes, rows, lanes) == streams
            assert decoded(streams, rows, lanes) == whole(codes, streams)


def test_a_long_segment_of_the_specification() -> None:
    """One more than a segment, so that both of its ends are there."""
    codes, rows = sample(RANS_SEGMENT + 1, seed=0)
    for isa in cases.paths():
        if "cuda" not in isa:
            with cases.using_isa(isa):
                assert encoded(codes, rows, 32) == long_streams(), isa
                assert decoded(long_streams(), rows, 32)[0] == codes.tolist(), isa


@functools.cache
def long_streams() -> list[list[int]]:
    with cases.using_specification():
        return encoded(*sample(RANS_SEGMENT + 1, seed=0), 32)


@pytest.mark.parametrize("lanes", LANES)
def test_codes_of_few_words(lanes: int) -> None:
    """Nearly all -1, 0 or 1, and a few that are far; whole, and without their last words."""
    starts, rows = geometric(0.4), torch.zeros(1003, dtype=torch.int16)
    slot = torch.randint(rans.SLOTS, rows.shape, generator=torch.Generator().manual_seed(lanes))
    codes = (torch.searchsorted(starts[0].long(), slot, right=True) - 1 - rans.MOST_CODE).short()
    codes[[7, 500, 1002]] = torch.tensor([-31, 30, 5], dtype=torch.int16)
    [stream] = encoded_everywhere(codes, rows, lanes, starts)
    assert len(stream) - 2 * lanes < 60
    found = decoded_everywhere([stream], rows, lanes, starts=starts)
    assert found == whole(codes, [stream])
    for length in range(2 * lanes, len(stream), 4):
        found = decoded_everywhere([stream[:length]], rows, lanes, starts=starts)
        assert found == damaged(1003)


def test_every_frequency_divides() -> None:
    """Numbers of slots that a symbol can have, in rows that take turns at random."""
    slots = torch.cat([torch.arange(1, 200), torch.arange(200, rans.SLOTS, 37)])
    starts = torch.full((slots.numel(), 64), rans.SLOTS)
    starts[:, :31] = 0
    starts[:, 31] = rans.SLOTS - slots
    for seed in range(3):
        order = torch.randperm(slots.numel(), generator=torch.Generator().manual_seed(seed))
        rows, codes = order.to(torch.int16), torch.zeros_like(order).to(torch.int16)
        streams = encoded_everywhere(codes, rows, 1, starts.to(torch.uint16))
        found = decoded(streams, rows, 1, starts=starts.to(torch.uint16))
        assert found == whole(codes, streams)


def test_the_layout() -> None:
    """By hand, as commrt/ops/rans.py tells it."""
    starts = (256 * torch.arange(64)).to(torch.uint16)[None]
    rows = torch.zeros(3, dtype=torch.int16)
    codes = torch.tensor([0, -31, 32], dtype=torch.int16)
    # 2**16 // 256 * 2**14 + 2**16 % 256 + first, of symbols 31, 0 and 63; no symbol of the last.
    states = [2**22 + 31 * 256, 2**22, 2**22 + 63 * 256, 2**16]
    words = [word for state in states for word in (state % 2**16, state // 2**16)]
    assert encoded(codes, rows, 4, starts) == [words]
    # By one lane the last code first. The state before the first one is too large for it.
    second = states[2] // 256 * 2**14 + states[2] % 256
    assert second >= 256 << 18
    high = second // 2**16
    first = high // 256 * 2**14 + high % 256 + 31 * 256
    assert encoded(codes, rows, 1, starts) == [[first % 2**16, first // 2**16, second % 2**16]]


def test_what_escapes_arrives_as_that() -> None:
    codes = torch.tensor([31, 32, -31, -32, 32767, -32768, 0], dtype=torch.int16)
    streams = encoded_everywhere(codes, torch.zeros_like(codes), 1)
    found = decoded_everywhere(streams, torch.zeros_like(codes), 1)
    assert found[0] == [31, ESCAPED, -31, ESCAPED, ESCAPED, ESCAPED, 0]


def escaping(
    codes: Tensor, rows: Tensor, lanes: int
) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """The words of each segment, the lengths that are told, and the codes that have escaped."""
    num_segments = ops.rans_segments(codes.numel())
    capacity = ops.rans_capacity(codes.numel(), lanes)
    words = codes.new_empty(num_segments, capacity, dtype=torch.uint16)
    lengths, counts = codes.new_empty(2, num_segments, dtype=torch.int32)
    escaped, checks = torch.full_like(codes, 99), checks_of(num_segments).to(codes.device)
    ops.rans_encode(
        codes, rows, table().to(codes.device), checks, words, lengths,
        lanes=lanes, escaped=escaped, num_escaped=counts,
    )  # fmt: skip
    found = [
        some[:count].tolist()
        for some, count in zip(escaped.split(RANS_SEGMENT), counts.tolist(), strict=True)
    ]
    streams = zip(words, lengths.clamp(min=0).tolist(), strict=True)
    return [row[:length].tolist() for row, length in streams], lengths.tolist(), found


@pytest.mark.parametrize("lanes", LANES)
def test_what_has_no_slots_escapes_where_it_may(lanes: int) -> None:
    """In order, whatever the lanes; the stream is that of codes that stand for the escape."""
    for seed, numel in enumerate(SIZES[1:]):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-40, 40, (numel,), generator=generator).short()
        rows = torch.randint(8, (numel,), generator=generator).short()
        codes[::7] = 1000 + torch.arange(numel)[::7].short()
        with cases.using_specification():
            expected = escaping(codes, rows, lanes)
        for path, use in cases.paths().items():
            with use:
                assert escaping(codes, rows, lanes) == expected, path
        is_far = codes.abs() > 31
        assert expected[2] == [codes[is_far].tolist()]
        assert expected[0] == encoded(codes.masked_fill(is_far, ESCAPED), rows, lanes)


def test_rows_with_slots_for_few() -> None:
    """A code that is not far escapes as well, but not where the escape itself has no slots."""
    starts = table().clone()
    starts[0, 20:] = torch.tensor(rans.SLOTS - 5)
    starts[0, 63] = rans.SLOTS - 2
    codes, rows = torch.tensor([-20, 5, -31, 31, -7, 0], dtype=torch.int16), torch.zeros(6).short()
    for _, use in {"specification": cases.using_specification(), **cases.paths()}.items():
        with use:
            words, lengths = torch.empty(1, 8, dtype=torch.uint16), torch.empty(1).int()
            escaped, count = torch.empty_like(codes), torch.empty(1).int()
            for last, expected in ((rans.SLOTS - 2, [5, -7, 0]), (rans.SLOTS, None)):
                starts[0, 63] = last
                tail = starts, checks_of(1), words, lengths
                given = {"escaped": escaped, "num_escaped": count}
                ops.rans_encode(codes, rows, *tail, lanes=1, **given)
                found = escaped[: int(count)].tolist() if int(lengths) > 0 else None
                assert found == expected


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("bits", [0.4, 1.0, 4.0])
def test_bits_of_a_segment(lanes: int, bits: float) -> None:
    """The table's code length, up to four bytes a lane, and 0.05 %."""
    starts = geometric(bits)
    generator = torch.Generator().manual_seed(0)
    slot = torch.randint(rans.SLOTS, (RANS_SEGMENT,), generator=generator)
    symbols = torch.searchsorted(starts[0].long(), slot, right=True) - 1
    codes = (symbols - rans.MOST_CODE).to(torch.int16)
    slots = torch.diff(starts[0].long(), append=torch.tensor([rans.SLOTS]))
    wanted = float((rans.SLOT_BITS - slots[symbols].double().log2()).sum())
    assert wanted / RANS_SEGMENT == pytest.approx(bits, rel=0.02)
    [stream] = encoded(codes, torch.zeros_like(codes), lanes, starts)
    assert wanted < 16 * len(stream) <= 1.0005 * wanted + 32 * lanes
    assert 16 * len(stream) <= 1.01 * wanted


def geometric(bits: float) -> Tensor:
    """A row whose symbols but the escape take so many bits on average."""
    decay = {0.4: 3.66, 1.0: 2.317, 4.0: 0.3394}[bits]
    weight = torch.exp(-decay * (torch.arange(64) - rans.MOST_CODE).abs().double())
    weight[rans.ESCAPE] = 0
    slots = (weight / weight.sum() * (rans.SLOTS - 64)).long() + 1
    slots[rans.ESCAPE] = 0
    slots[rans.MOST_CODE] += rans.SLOTS - slots.sum()
    return (slots.cumsum(dim=0) - slots).to(torch.uint16)[None]


# -- what cannot be coded -------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("row", [-1, NUM_ROWS, 32767, -32768])
def test_a_row_that_is_not_in_the_table(lanes: int, row: int) -> None:
    codes, rows = sample(70, seed=0)
    streams = encoded(codes, rows, lanes)
    for where in (0, 37, 69):
        others = rows.index_fill(0, torch.tensor(where), row)
        assert encoded_everywhere(codes, others, lanes) == [[]]
        assert decoded_everywhere(streams, others, lanes) == damaged(70)


@pytest.mark.parametrize("lanes", LANES)
def test_a_symbol_without_slots(lanes: int) -> None:
    codes, rows = sample(70, seed=0)
    for where in (0, 37, 69):
        others = (
            codes.index_fill(0, torch.tensor(where), 30),
            rows.index_fill(0, torch.tensor(where), NUM_ROWS - 1),
        )
        assert encoded_everywhere(*others, lanes) == [[]]


def test_only_the_segment_that_it_is_in() -> None:
    codes, rows = sample(RANS_SEGMENT + 100, seed=0)
    streams = encoded(codes, rows, 4)
    rows[3] = -1
    assert encoded(codes, rows, 4) == [[], streams[1]]
    found, used, _ = decoded(streams, rows, 4)
    assert used == [-1, len(streams[1])]
    assert found == [0] * RANS_SEGMENT + codes[RANS_SEGMENT:].tolist()


# -- streams from anywhere ------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", LANES)
def test_words_behind_a_stream_are_not_used(lanes: int) -> None:
    codes, rows = sample(100, seed=0)
    [stream] = encoded(codes, rows, lanes)
    longer = [[*stream, 1, 2, 3]]
    assert decoded_everywhere(longer, rows, lanes) == whole(codes, [stream])


@pytest.mark.parametrize("lanes", LANES)
def test_a_stream_that_lacks_words(lanes: int) -> None:
    codes, rows = sample(100, seed=0)
    [stream] = encoded(codes, rows, lanes)
    for length in range(0, len(stream), 3):
        assert decoded_everywhere([stream[:length]], rows, lanes) == damaged(100)


@pytest.mark.parametrize("lanes", LANES)
def test_a_length_that_no_stream_has(lanes: int) -> None:
    codes, rows = sample(100, seed=0)
    [stream] = encoded(codes, rows, lanes)
    for length in (-(2**31), -1, 0, 2 * lanes - 1, len(stream) + 1, 2**31 - 1):
        found = decoded_everywhere([stream], rows, lanes, spare=length - len(stream))
        assert found == damaged(100)


@pytest.mark.parametrize("lanes", LANES)
def test_a_flipped_bit_changes_what_is_decoded(lanes: int) -> None:
    codes, rows = sample(100, seed=0)
    [stream] = encoded(codes, rows, lanes)
    for index in range(16 * len(stream)):
        flipped = list(stream)
        flipped[index // 16] ^= 1 << index % 16
        found = decoded([flipped], rows, lanes)
        assert found != whole(codes, [stream]), index
        if index % 97 == 0:
            assert decoded_everywhere([flipped], rows, lanes) == found


@pytest.mark.parametrize("lanes", LANES)
def test_any_words_end_the_same_everywhere(lanes: int) -> None:
    """Also such as end where encoding begins: without symbols, with 2**16 in every lane."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        _, rows = sample(seed % 5 * 20, seed)
        words = torch.randint(2**16, (2 * lanes + seed,), generator=generator)
        words[: 2 * lanes] = torch.tensor([0, 1]).repeat(lanes) if seed % 2 else words[: 2 * lanes]
        segments = ops.rans_segments(rows.numel())
        decoded_everywhere([words.tolist()] * segments, rows, lanes)


# -- what is refused ------------------------------------------------------------------------------


def test_tensors_that_do_not_serve() -> None:
    codes, rows = sample(100, seed=0)
    words, lengths = torch.zeros(1, 108, dtype=torch.uint16), torch.zeros(1, dtype=torch.int32)
    checks = checks_of(1)
    tail = table(), checks, words, lengths
    with pytest.raises(ConfigError, match=r"lanes=2: must be one of \(1, 4, 32\)"):
        ops.rans_encode(codes, rows, *tail, lanes=2)
    with pytest.raises(ConfigError, match="escaped without num_escaped"):
        ops.rans_encode(codes, rows, *tail, lanes=1, escaped=codes.clone())
    with pytest.raises(ConfigError, match="escaped has 99 elements: must have 100"):
        ops.rans_encode(codes, rows, *tail, lanes=1, escaped=codes[1:], num_escaped=lengths.clone())
    with pytest.raises(ConfigError, match="words has 108 a segment: must have at least 164"):
        ops.rans_encode(codes, rows, *tail, lanes=32)
    with pytest.raises(
        ConfigError, match=r"codes is torch\.int32 \(100,\): must be 1-D torch\.int16"
    ):
        ops.rans_encode(codes.int(), rows, *tail, lanes=1)
    with pytest.raises(ConfigError, match="rows has 99 elements: must have 100"):
        ops.rans_encode(codes, rows[:99], *tail, lanes=1)
    with pytest.raises(
        ConfigError, match=r"starts is torch\.uint16 \(40, 63\): must be uint16 \(40, 64\)"
    ):
        ops.rans_encode(codes, rows, table()[:, :63], checks, words, lengths, lanes=1)
    with pytest.raises(
        ConfigError, match=r"starts is torch\.uint16 \(0, 64\): must be uint16 \(1, 64\)"
    ):
        ops.rans_encode(codes, rows, table()[:0], checks, words, lengths, lanes=1)
    with pytest.raises(
        ConfigError, match=r"words is torch\.uint16 \(2, 108\): must be uint16 \(1, 108\)"
    ):
        ops.rans_encode(codes, rows, table(), checks, words.repeat(2, 1), lengths, lanes=1)
    with pytest.raises(ConfigError, match="lengths has 2 elements: must have 1"):
        ops.rans_decode(words, lengths.repeat(2), rows, table(), codes, checks, lengths, lanes=1)
    with pytest.raises(ConfigError, match="used has 2 elements: must have 1"):
        ops.rans_decode(words, lengths, rows, table(), codes, checks, lengths.repeat(2), lanes=1)
    with pytest.raises(ConfigError, match="rows is on meta: must be on cpu, as codes is"):
        ops.rans_encode(codes, rows.to("meta"), *tail, lanes=1)
