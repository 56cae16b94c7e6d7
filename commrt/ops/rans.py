"""Interleaved rANS: integers in as many bits as a table says that they are worth.

The alphabet has 64 symbols: code n is symbol n + 31 for -31 <= n <= 31, and any other code is
symbol 63, the escape, which arrives as :data:`ESCAPED`. A table has a row for each context, which
shares 2**14 slots among the symbols: symbol s of row r has the slots from ``starts[r, s]`` on and
before ``starts[r, s + 1]``, the last those before 2**14. Their number is its frequency, over 2**14
its probability. A symbol without slots cannot be coded.

Codes are cut into segments of :data:`RANS_SEGMENT`, each with a stream of its own. Symbol j of a
segment belongs to lane j % lanes, a coder with a state x in [2**16, 2**32). To decode a symbol of
the slots [first, first + frequency) a lane goes from x, whose slot is x % 2**14, to
``frequency * (x // 2**14) + x % 2**14 - first``, and where that is under 2**16 takes the stream's
next word as 16 low bits more. Lanes take turns. A stream of 16-bit words is ``states | words``::

    states    2 words a lane      with which decoding begins, the low half first
    words                         in the order in which they are taken

An encoder begins with 2**16 in every lane, where therefore every decoder has to end; but to that of
the first lane it adds 16 bits of any meaning, which the decoder finds there: a place for a checksum
that takes no room.

Cost: the code length by the table and 2 to 4 bytes a lane and segment, three on average.

Source: J. Duda, "Asymmetric numeral systems", 2013 (arXiv 1311.2540); F. Giesen, "Interleaved
entropy coders", 2014 (arXiv 1402.3392).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.arrays import takes_arrays

RANS_SEGMENT = 1 << 18
LANES = (1, 4, 32)

SYMBOLS = 64
MOST_CODE = 31
ESCAPE = SYMBOLS - 1
ESCAPED = -(1 << 15)
SLOT_BITS = 14
SLOTS = 1 << SLOT_BITS


def rans_segments(numel: int) -> int:
    """Streams that a vector of ``numel`` codes makes."""
    return -(-numel // RANS_SEGMENT)


def rans_capacity(numel: int, lanes: int) -> int:
    """Words that the longest stream of ``numel`` codes can have: at most one a symbol."""
    _check_lanes(lanes)
    return 2 * lanes + min(numel, RANS_SEGMENT)


@takes_arrays("words", "lengths", "escaped", "num_escaped")
def rans_encode(
    codes: Tensor,
    rows: Tensor,
    starts: Tensor,
    checks: Tensor,
    words: Tensor,
    lengths: Tensor,
    *,
    lanes: int,
    escaped: Tensor | None = None,
    num_escaped: Tensor | None = None,
) -> None:
    """Write the streams of ``codes``. Deterministic and lossless, but for what escapes.

    Where ``escaped`` is given, a code that has no slots in its row escapes as well.

    Args:
        codes: int16[N]; or, here and where else N is, [K, N], of K vectors that are coded apart.
        rows: int16[N], the row of the table for each code.
        starts: uint16[R, 64], rows of lower bounds, the first of them 0, that do not fall.
        checks: uint16[S], what goes with each segment beside its codes.
        words: uint16[S, W], S = K * ``rans_segments(N)`` and W >= ``rans_capacity(N, lanes)``; row
            s is overwritten with the stream of segment s, and behind it with anything.
        lengths: int32[S], overwritten with the words of each stream; -1 for a segment with a row
            that is not in the table, or a symbol that has no slots.
        lanes: 1, 4 or 32; more are faster and cost up to four bytes each.
        escaped: int16[N]; of each segment the first places are overwritten with the codes that
            escape, in order, and those behind them with anything.
        num_escaped: int32[S], overwritten with how many they are; 0 where the length is -1. Given
            with ``escaped``, or neither.
    """
    _check(codes, rows, starts, checks, words, lengths, lanes)
    if (escaped is None) != (num_escaped is None):
        raise ConfigError("escaped without num_escaped, or that without it: must be given both")
    if escaped is not None and num_escaped is not None:
        _check_codes("escaped", escaped, codes.shape, codes.device)
        _check_flat("num_escaped", num_escaped, torch.int32, lengths.numel(), codes.device)
    least = rans_capacity(codes.shape[-1], lanes)
    if words.shape[1] < least:
        raise ConfigError(f"words has {words.shape[1]} a segment: must have at least {least}")
    torch.ops.commrt.rans_encode(
        codes, rows, starts, lanes, checks, words, lengths, escaped, num_escaped
    )


@takes_arrays("codes", "checks", "used")
def rans_decode(
    words: Tensor,
    lengths: Tensor,
    rows: Tensor,
    starts: Tensor,
    codes: Tensor,
    checks: Tensor,
    used: Tensor,
    *,
    lanes: int,
) -> None:
    """Read ``codes`` from their streams, which may come from anywhere.

    Args:
        words: uint16[S, W] with S = K * ``rans_segments(N)``; any W.
        lengths: int32[S], words of each stream, or more: where a stream ends is found out.
        rows: int16[N] or [K, N], as they were when encoding.
        starts: uint16[R, 64], as it was when encoding.
        codes: as ``rows``, overwritten; :data:`ESCAPED` for the escape.
        checks: uint16[S], overwritten with what went with each segment.
        used: int32[S], overwritten with the words that each segment was decoded from; -1 for a
            segment that no encoder wrote, whose codes and check are then 0: one that lacks words,
            does not end where encoding begins, or has a row that is not in the table.
        lanes: As when encoding.

    Cost: bounded by N, whatever is in the words.
    """
    _check(codes, rows, starts, checks, words, lengths, lanes)
    _check_flat("used", used, torch.int32, lengths.numel(), words.device)
    torch.ops.commrt.rans_decode(words, lengths, rows, starts, lanes, codes, checks, used)


@takes_arrays("counts")
def rans_count_(counts: Tensor, codes: Tensor, rows: Tensor, ends: Sequence[int]) -> None:
    """Add how often each row has each symbol, in each part of the codes.

    Args:
        counts: int64[P, R, 64], contiguous, updated in place.
        codes: int16[N] or, of K vectors, [K, N].
        rows: As many int16, in [0, R).
        ends: P of them: part p is ``[ends[p - 1], ends[p])`` of each vector, the first from 0 on.

    Raises:
        ConfigError: A tensor that does not serve; or a row outside, and then of some parts nothing
            is added.

    Device: what is not on the CPU is counted by the reference.
    """
    if counts.dtype != torch.int64 or counts.dim() != 3 or counts.shape[2] != SYMBOLS:
        raise ConfigError(
            f"counts is {counts.dtype} {tuple(counts.shape)}: must be int64 (parts, rows, 64)"
        )
    if not counts.is_contiguous():
        raise ConfigError(f"counts has strides {counts.stride()}: must be contiguous")
    _check_codes("codes", codes, codes.shape, counts.device)
    _check_codes("rows", rows, codes.shape, counts.device)
    ends = list(ends)
    bounds = [0, *ends, codes.shape[-1]]
    if len(ends) != counts.shape[0] or bounds != sorted(bounds):
        raise ConfigError(
            f"ends={ends}: must be {counts.shape[0]} that do not fall, from 0 to {codes.shape[-1]}"
        )
    torch.ops.commrt.rans_count_(counts, codes, rows, ends)


def outside(rows: Tensor, num_rows: int) -> ConfigError:
    """What is said of rows, one of which is not in a table of so many."""
    least, most = (int(row) for row in rows.aminmax())
    return ConfigError(f"rows are {least} to {most}: must be 0 to {num_rows - 1}")


def _check(
    codes: Tensor,
    rows: Tensor,
    starts: Tensor,
    checks: Tensor,
    words: Tensor,
    lengths: Tensor,
    lanes: int,
) -> None:
    _check_lanes(lanes)
    device = codes.device
    _check_codes("codes", codes, codes.shape, device)
    _check_codes("rows", rows, codes.shape, device)
    num_segments = math.prod(codes.shape[:-1]) * rans_segments(codes.shape[-1])
    _check_flat("checks", checks, torch.uint16, num_segments, device)
    _check_flat("lengths", lengths, torch.int32, num_segments, device)
    _check_matrix("starts", starts, (max(starts.shape[0], 1), SYMBOLS), device)
    _check_matrix("words", words, (num_segments, words.shape[-1]), device)


def _check_lanes(lanes: int) -> None:
    if lanes not in LANES:
        raise ConfigError(f"lanes={lanes!r}: must be one of {LANES}")


def _check_codes(name: str, codes: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if codes.dtype != torch.int16 or codes.dim() not in (1, 2) or not codes.is_contiguous():
        raise ConfigError(
            f"{name} is {codes.dtype} {tuple(codes.shape)}: must be 1-D torch.int16, "
            "or 2-D, contiguous"
        )
    if codes.shape != shape:
        found, wanted = (" x ".join(map(str, each)) for each in (codes.shape, shape))
        raise ConfigError(f"{name} has {found} elements: must have {wanted}")
    _check_device(name, codes, device)


def _check_flat(
    name: str, flat: Tensor, dtype: torch.dtype, numel: int, device: torch.device
) -> None:
    if flat.dtype != dtype or flat.dim() != 1 or not flat.is_contiguous():
        raise ConfigError(f"{name} is {flat.dtype} {tuple(flat.shape)}: must be 1-D {dtype}")
    if flat.numel() != numel:
        raise ConfigError(f"{name} has {flat.numel()} elements: must have {numel}")
    _check_device(name, flat, device)


def _check_matrix(name: str, matrix: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if matrix.dtype != torch.uint16 or matrix.shape != shape or not matrix.is_contiguous():
        raise ConfigError(
            f"{name} is {matrix.dtype} {tuple(matrix.shape)}: must be uint16 {shape}, contiguous"
        )
    _check_device(name, matrix, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ConfigError(f"{name} is on {tensor.device}: must be on {device}, as codes is")
