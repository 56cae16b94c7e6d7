"""Codes of a dithered quantizer as bytes, in hardly more of them than their tables say.

A payload of N codes is ``lengths | words | escaped``, in little endian::

    lengths   a varint a segment   the words of each but the last, so nothing up to 2**18 codes
    words     2 bytes each         the segments' rANS streams, see :mod:`commrt.ops.rans`; with each
                                   the low 16 bits of the CRC-32 of its codes, as 2 bytes each
    escaped   a varint each        the codes whose symbol was the escape, in order, in zigzag

N, and with it the number of segments and lanes, and the row of each code in
:func:`~commrt.codecs.code_tables.entropy_tables` are known to the receiver. A code escapes that has
no slots in its row. Varints have the lowest seven bits first, and zigzag is 2 n for n >= 0, else
-2 n - 1.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commrt import ops
from commrt.codecs.code_tables import (
    NUM_PHASES,
    NUM_ROWS,
    code_costs,
    coded_range,
    entropy_tables,
    fit_rows,
)
from commrt.errors import ConfigError, WireFormatError
from commrt.ops.rans import ESCAPE, ESCAPED, MOST_CODE, RANS_SEGMENT, SYMBOLS, outside

__all__ = [
    "checksums",
    "code_length",
    "count_codes",
    "decode_codes",
    "decode_vectors",
    "encode_codes",
    "encode_vectors",
    "entropy_tables",
    "fit_rows",
    "read_streams",
    "write_streams",
]

Integers = NDArray[np.int64]

WORD_BYTES = 2
# A lane costs three bytes. Four encode a quarter faster on a CPU than one, and as fast as 32.
LANES_FROM = ((RANS_SEGMENT, 4), (0, 1))
# Of a varint: 16 bits of zigzag for a code, a length of up to 2**18 + 64.
MOST_VARINT_BYTES = 3


def encode_codes(codes: Tensor, rows: Tensor) -> bytes:
    """The payload of the codes. Lossless and deterministic, the same on every device.

    Args:
        codes: int16 [N], any values.
        rows: int16 [N] on the same device: the row of each code in :func:`entropy_tables`.

    Raises:
        ConfigError: Codes or rows of another dtype or number, or a row that there is none of.

    Cost: the tables' code length, three bytes on average, and one to three for a code that escapes.
    From 2**18 codes on, instead of the three bytes, fifteen for every 2**18.
    """
    _check_rows(rows)
    [payload] = encode_vectors(codes[None], rows[None])
    return payload


def encode_vectors(codes: Tensor, rows: Tensor) -> list[bytes]:
    """The payload of each of K vectors: :func:`encode_codes` of int16 [K, N], in less time."""
    if codes.dtype != torch.int16 or codes.shape != rows.shape or codes.device != rows.device:
        raise ConfigError(
            f"codes is {codes.dtype} {tuple(codes.shape[1:])} on {codes.device}: "
            f"must be int16 {tuple(rows.shape[1:])} on {rows.device}"
        )
    codes, rows = codes.contiguous(), rows.contiguous()
    escaped, checks = torch.empty_like(codes), checksums(codes)
    counts = torch.empty_like(checks, dtype=torch.int32)
    table = entropy_tables(codes.device)
    streams = _write(codes, rows, table, checks, escaped=escaped, num_escaped=counts)
    tails = _escaped_bytes(escaped, counts.tolist())
    return [stream + tail for stream, tail in zip(streams, tails, strict=True)]


def decode_codes(payload: bytes, rows: Tensor, numel: int) -> Tensor:
    """The codes that :func:`encode_codes` was given.

    Args:
        payload: What it returned, or anything else.
        rows: int16 [N], as they were when encoding.
        numel: N.

    Returns:
        int16 [N], on the device of ``rows``.

    Raises:
        WireFormatError: The payload is not one of N codes of these rows. Each segment has a
            checksum of 16 bits, so that one that was damaged by chance passes once in 2**16 times.
        ConfigError: Rows of another dtype or number, or one that there is none of.

    Cost: time and memory bounded by N and the payload's size, whatever is in it.
    """
    _check_rows(rows)
    if rows.numel() != numel:
        raise ConfigError(f"rows has {rows.numel()} elements: must have numel={numel}")
    return decode_vectors([payload], rows[None])[0]


def decode_vectors(payloads: Sequence[bytes], rows: Tensor) -> Tensor:
    """The codes of K payloads: :func:`decode_codes` for rows, int16 [K, N], in less time."""
    rows = rows.contiguous()
    data = [np.frombuffer(payload, dtype=np.uint8) for payload in payloads]
    try:
        codes, checks, num_bytes = _read(data, rows, entropy_tables(rows.device))
    except WireFormatError:
        _check_inside(rows, NUM_ROWS)
        raise
    found = codes.cpu()
    lefts = [each[begin:] for each, begin in zip(data, num_bytes, strict=True)]
    _fill_vectors(found, rows, lefts)
    if checks.tolist() != _checksums(found):
        raise WireFormatError(f"a checksum of {rows.shape[1]} codes is not theirs")
    return found.to(codes.device)


def write_streams(codes: Tensor, rows: Tensor, table: Tensor, checks: Tensor) -> bytes:
    """The ``lengths | words`` of codes that have slots in a table of any origin.

    Args:
        codes: int16 [N], contiguous, :data:`~commrt.ops.rans.ESCAPED` for the escape.
        rows: int16 [N], contiguous: of the table, for each code.
        table: uint16 [R, 64], as :mod:`commrt.ops.rans` describes it.
        checks: uint16 [S], what goes with each segment, such as :func:`checksums`.
    """
    [streams] = _write(codes[None], rows[None], table, checks)
    return streams


def read_streams(
    data: NDArray[np.uint8], rows: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, int]:
    """What :func:`write_streams` was given, from the beginning of ``data``, which may be anything.

    Returns:
        Codes, int16 [N]; checks, uint16 [S], which the caller compares; and the bytes taken.

    Raises:
        WireFormatError: No N codes of these rows begin so.
    """
    [codes], checks, [num_bytes] = _read([data], rows[None], table)
    return codes, checks, num_bytes


def checksums(codes: Tensor) -> Tensor:
    """Of each segment of int16 [N] or [K, N], contiguous: uint16 [S]."""
    sums = np.array(_checksums(codes.cpu()), dtype=np.uint16)
    return torch.from_numpy(sums).to(codes.device)


def count_codes(codes: Tensor, rows: Tensor, num_classes: int) -> Tensor:
    """How often each class has each symbol in each phase, as :func:`fit_rows` takes it.

    Args:
        codes: int16 [N].
        rows: int16 [N], class * 16 + phase.
        num_classes: C.

    Returns:
        int64 [C, 16, 64].
    """
    shape = (1, num_classes * NUM_PHASES, SYMBOLS)
    counts = torch.zeros(shape, dtype=torch.int64, device=codes.device)
    ops.rans_count_(counts, codes.contiguous(), rows.contiguous(), [codes.numel()])
    return counts.view(num_classes, NUM_PHASES, SYMBOLS)


def _num_lanes(numel: int) -> int:
    return next(lanes for least, lanes in LANES_FROM if numel >= least)


def _check_rows(rows: Tensor) -> None:
    if rows.dtype != torch.int16 or rows.dim() != 1:
        raise ConfigError(f"rows is {rows.dtype} {tuple(rows.shape)}: must be 1-D torch.int16")


def _check_inside(rows: Tensor, num_rows: int) -> None:
    if rows.numel() and not bool(((rows >= 0) & (rows < num_rows)).all()):
        raise outside(rows, num_rows)


def _checksums(codes: Tensor) -> list[int]:
    vectors = (codes[None] if codes.dim() == 1 else codes).numpy().astype("<i2", copy=False)
    begins = range(0, codes.shape[-1], RANS_SEGMENT)
    return [
        zlib.crc32(vector[begin : begin + RANS_SEGMENT].data) & 0xFFFF
        for vector in vectors
        for begin in begins
    ]


def _write(
    codes: Tensor, rows: Tensor, table: Tensor, checks: Tensor, **escapes: Tensor
) -> list[bytes]:
    """As :func:`write_streams`, of vectors; ``escapes``: see :func:`commrt.ops.rans_encode`."""
    count, numel = codes.shape
    lanes = _num_lanes(numel)
    words = codes.new_empty(checks.numel(), ops.rans_capacity(numel, lanes), dtype=torch.uint16)
    lengths = codes.new_empty(checks.numel(), dtype=torch.int32)
    ops.rans_encode(codes, rows, table, checks, words, lengths, lanes=lanes, **escapes)
    used = lengths.tolist()
    if min(used, default=0) < 0:
        _check_inside(rows, table.shape[0])
        raise AssertionError("a code has no slots in its row")
    streams = words.cpu().numpy().astype("<u2", copy=False)
    parts = [stream[:length].tobytes() for stream, length in zip(streams, used, strict=True)]
    segments = ops.rans_segments(numel)
    if segments == 1:
        return parts
    found = list[bytes]()
    for k in range(count):
        own = slice(k * segments, (k + 1) * segments)
        told, _ = _varints(np.array(used[own][:-1], dtype=np.int64))
        found.append(b"".join((told.tobytes(), *parts[own])))
    return found


def _escaped_bytes(escaped: Tensor, counts: list[int]) -> list[bytes]:
    """Of each vector; of each segment so many codes, which lie from its first place on."""
    if not any(counts):
        return [b""] * len(escaped)
    segments = len(counts) // len(escaped)
    parts = [
        escaped[which // segments, which % segments * RANS_SEGMENT :][:count]
        for which, count in enumerate(counts)
        if count
    ]
    data, sizes = _varints(_zigzag(torch.cat(parts).cpu().numpy().astype(np.int64)))
    ends = np.cumsum(np.array(counts).reshape(-1, segments).sum(axis=1))
    ends = np.concatenate([[0], np.cumsum(sizes)])[ends]
    return [part.tobytes() for part in np.split(data, ends[:-1])]


def _symbols(codes: Tensor) -> Tensor:
    is_inside = (codes >= -MOST_CODE) & (codes <= MOST_CODE)
    return torch.where(is_inside, codes + MOST_CODE, ESCAPE).long()


def _are_escaped(codes: Tensor, rows: Tensor) -> Tensor:
    """Whether each code has no slots in its row, as bool [N]."""
    index = rows.int()
    lowest, highest = (ends.index_select(0, index) for ends in coded_range(codes.device))
    return (codes < lowest) | (codes > highest)


# -- what surrounds the streams -------------------------------------------------------------------


def _read(
    data: Sequence[NDArray[np.uint8]], rows: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    """As :func:`read_streams`, of vectors."""
    numel = rows.shape[1]
    lanes, segments = _num_lanes(numel), ops.rans_segments(numel)
    begins, lengths = list[int](), list[int]()
    for each in data:
        told, begin = _read_lengths(each, numel, lanes)
        begins.append(begin)
        lengths += told
    words = _read_words(data, begins, lengths).to(rows.device)
    most = torch.tensor(lengths, dtype=torch.int32, device=rows.device)
    codes = torch.empty_like(rows)
    checks, used = torch.empty_like(most, dtype=torch.uint16), torch.empty_like(most)
    ops.rans_decode(words, most, rows, table, codes, checks, used, lanes=lanes)
    taken, num_bytes = used.tolist(), list[int]()
    for k, begin in enumerate(begins):
        own = slice(k * segments, (k + 1) * segments)
        if taken[own][:-1] != lengths[own][:-1] or min(taken[own], default=0) < 0:
            raise WireFormatError(f"a stream of {numel} codes is damaged")
        num_bytes.append(begin + WORD_BYTES * sum(taken[own]))
    return codes, checks, num_bytes


def _read_lengths(data: NDArray[np.uint8], numel: int, lanes: int) -> tuple[list[int], int]:
    """Words of each segment, of the last one no fewer than it has, and where the first begin."""
    segments, most = ops.rans_segments(numel), ops.rans_capacity(numel, lanes)
    if segments <= 1:
        return [min(data.size // WORD_BYTES, most)] * segments, 0
    told, begin = _read_varints(data[: MOST_VARINT_BYTES * segments], segments - 1)
    left = (data.size - begin) // WORD_BYTES - int(told.sum())
    if left < 0 or told.max(initial=0) > most:
        raise WireFormatError(
            f"streams of {int(told.sum())} words and a last one in {data.size} bytes, the longest "
            f"of {int(told.max(initial=0))}: must be at most {most}"
        )
    return [*told.tolist(), min(left, most)], begin


def _read_words(
    data: Sequence[NDArray[np.uint8]], begins: Sequence[int], lengths: Sequence[int]
) -> Tensor:
    """uint16 [S, W], the words of each segment of all vectors, and zeros."""
    sizes = [WORD_BYTES * length for length in lengths]
    streams = np.zeros((len(sizes), max(sizes, default=0)), dtype=np.uint8)
    segments = len(sizes) // max(1, len(data))
    for k, (each, begin) in enumerate(zip(data, begins, strict=True)):
        for segment in range(k * segments, (k + 1) * segments):
            streams[segment, : sizes[segment]] = each[begin : begin + sizes[segment]]
            begin += sizes[segment]
    return torch.from_numpy(streams.view("<u2").astype(np.uint16, copy=False))


def _fill_vectors(codes: Tensor, rows: Tensor, data: Sequence[NDArray[np.uint8]]) -> None:
    """:func:`_fill_escaped` of each vector; of all in one where each has as many as it must."""
    counts = (codes == ESCAPED).sum(dim=1).tolist()
    told = [int((each < 0x80).sum()) for each in data]
    if counts == told and all(each.size == 0 or each[-1] < 0x80 for each in data):
        _fill_escaped(codes.view(-1), rows.view(-1), np.concatenate(data))
        return
    for code, row, each in zip(codes, rows, data, strict=True):
        _fill_escaped(code, row, each)


def _fill_escaped(codes: Tensor, rows: Tensor, data: NDArray[np.uint8]) -> None:
    """Put into ``codes``, on the CPU, those that escaped: ``data`` must have them and no more."""
    values = codes.numpy()
    where = np.flatnonzero(values == ESCAPED)
    zigzag, num_bytes = _read_varints(data, where.size)
    if num_bytes != data.size:
        raise WireFormatError(f"{data.size - num_bytes} bytes behind the last of the codes")
    if where.size == 0:
        return
    if zigzag.max() >= 1 << 16:
        raise WireFormatError(f"an escaped code of {int(zigzag.max()):#x}: has 16 bits")
    values[where] = zigzag >> 1 ^ -(zigzag & 1)
    index = torch.from_numpy(where)
    if not bool(_are_escaped(codes[index], rows[index.to(rows.device)].cpu()).all()):
        raise WireFormatError("a code has escaped that need not")


def _zigzag(codes: Integers) -> Integers:
    return codes << 1 ^ codes >> 63


def _varints(values: Integers) -> tuple[NDArray[np.uint8], Integers]:
    """Seven bits a byte, the lowest first, of which the highest bit says that more follow.

    All that the values take, and how many bytes each of them does.
    """
    sevens = values[:, None] >> 7 * np.arange(MOST_VARINT_BYTES)
    is_there = (sevens > 0) | (np.arange(MOST_VARINT_BYTES) == 0)
    more = (sevens >> 7 > 0) << 7
    return (sevens & 0x7F | more)[is_there].astype(np.uint8), is_there.sum(axis=1)


def _read_varints(data: NDArray[np.uint8], count: int) -> tuple[Integers, int]:
    """So many from the beginning of ``data``, and the bytes that they take."""
    if count == 0:
        return np.empty(0, dtype=np.int64), 0
    [ends] = (data < 0x80).nonzero()
    if ends.size < count:
        raise WireFormatError(f"{ends.size} numbers in {data.size} bytes: must be {count}")
    ends = ends[:count]
    begins = np.concatenate([[0], ends + 1])[:count]
    sizes = ends - begins + 1
    if sizes.max(initial=1) > MOST_VARINT_BYTES or ((sizes > 1) & (data[ends] == 0)).any():
        raise WireFormatError(f"a number of {sizes.max()} bytes, or one with zeros to spare")
    place = np.arange(MOST_VARINT_BYTES)
    at = np.minimum(begins[:, None] + place, max(data.size - 1, 0))
    sevens = np.where(place < sizes[:, None], data[at].astype(np.int64) & 0x7F, 0)
    return (sevens << 7 * place).sum(axis=1), int(sizes.sum())


def code_length(codes: Tensor, rows: Tensor) -> float:
    """What the tables say that the codes take, in bits; :func:`encode_codes` takes hardly more."""
    costs = code_costs(codes.device).view(-1)
    return float(costs[rows.long() * SYMBOLS + _symbols(codes)].sum(dtype=torch.float64))
