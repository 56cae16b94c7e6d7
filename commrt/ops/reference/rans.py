"""rANS, a symbol at a time; :mod:`commrt.ops.rans` has the layout."""

from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from commrt.ops.rans import (
    ESCAPE,
    ESCAPED,
    MOST_CODE,
    RANS_SEGMENT,
    SLOT_BITS,
    SLOTS,
    SYMBOLS,
    outside,
)

WORD_BITS = 16
WORD = (1 << WORD_BITS) - 1
LEAST_STATE = 1 << WORD_BITS


def rans_encode(
    codes: Tensor,
    rows: Tensor,
    starts: Tensor,
    lanes: int,
    checks: Tensor,
    words: Tensor,
    lengths: Tensor,
    escaped: Tensor | None,
    num_escaped: Tensor | None,
) -> None:
    """See :func:`commrt.ops.rans_encode`."""
    windows = _windows(codes)
    codes, rows = codes.view(-1), rows.view(-1)
    escaped = None if escaped is None else escaped.view(-1)
    for segment, (window, check) in enumerate(zip(windows, checks.tolist(), strict=True)):
        some = _Escaped(codes[window], None)
        if escaped is not None and _are_rows(rows[window], starts):
            some = _escape(codes[window], rows[window], starts)
        stream = _encode_segment(some.coded, rows[window], starts, lanes, check)
        lengths[segment] = -1 if stream is None else len(stream)
        if stream is not None:
            words[segment, : len(stream)] = torch.tensor(stream).to(words)
        if escaped is not None and num_escaped is not None:
            num_escaped[segment] = 0
            if stream is not None and some.codes is not None:
                num_escaped[segment] = some.codes.numel()
                escaped[window][: some.codes.numel()] = some.codes


def rans_count_(counts: Tensor, codes: Tensor, rows: Tensor, ends: list[int]) -> None:
    """See :func:`commrt.ops.rans_count_`."""
    if rows.numel() and not bool(((rows >= 0) & (rows < counts.shape[1])).all()):
        raise outside(rows, counts.shape[1])
    index_KN = (rows.long() * SYMBOLS + _symbols(codes)).view(-1, codes.shape[-1])
    begin = 0
    for part, end in zip(counts, ends, strict=True):
        index = index_KN[:, begin:end].flatten()
        part += index.bincount(minlength=part.numel()).view_as(part)
        begin = end


def rans_decode(
    words: Tensor,
    lengths: Tensor,
    rows: Tensor,
    starts: Tensor,
    lanes: int,
    codes: Tensor,
    checks: Tensor,
    used: Tensor,
) -> None:
    """See :func:`commrt.ops.rans_decode`."""
    windows = _windows(codes)
    codes, rows = codes.view(-1), rows.view(-1)
    for segment, (window, length) in enumerate(zip(windows, lengths.tolist(), strict=True)):
        codes[window] = 0
        checks[segment] = 0
        used[segment] = -1
        if 2 * lanes <= length <= words.shape[1]:
            stream = words[segment, :length].tolist()
            found = _decode_segment(stream, rows[window], starts, lanes)
            if found is not None:
                codes[window] = torch.tensor(found[0]).to(codes)
                checks[segment], used[segment] = found[1:]


def _windows(codes: Tensor) -> list[slice]:
    """Where each segment lies, in all vectors one behind the other."""
    numel = codes.shape[-1]
    return [
        slice(at + first, at + min(first + RANS_SEGMENT, numel))
        for at in range(0, codes.numel(), max(numel, 1))
        for first in range(0, numel, RANS_SEGMENT)
    ]


class _Escaped(NamedTuple):
    """Codes with :data:`ESCAPED` where one escapes, and those that do."""

    coded: Tensor
    codes: Tensor | None


def _escape(code_N: Tensor, row_N: Tensor, starts: Tensor) -> _Escaped:
    bounds = torch.nn.functional.pad(starts.long(), (0, 1), value=SLOTS)
    symbol_N, row_N = _symbols(code_N), row_N.long()
    frequency_N = bounds[row_N, symbol_N + 1] - bounds[row_N, symbol_N]
    escapes_N = (symbol_N == ESCAPE) | (frequency_N == 0)
    return _Escaped(code_N.masked_fill(escapes_N, ESCAPED), code_N[escapes_N])


def _symbols(codes: Tensor) -> Tensor:
    is_inside = (codes >= -MOST_CODE) & (codes <= MOST_CODE)
    return torch.where(is_inside, codes.long() + MOST_CODE, ESCAPE)


def _encode_segment(
    code_N: Tensor, row_N: Tensor, starts: Tensor, lanes: int, check: int
) -> list[int] | None:
    """The segment's stream; None if it has none."""
    if not _are_rows(row_N, starts):
        return None
    bounds = torch.nn.functional.pad(starts.long(), (0, 1), value=SLOTS)
    symbol_N = _symbols(code_N)
    first_N = bounds[row_N.long(), symbol_N].tolist()
    end_N = bounds[row_N.long(), symbol_N + 1].tolist()
    state_L = [LEAST_STATE + check, *[LEAST_STATE] * (lanes - 1)]
    backwards = []
    for j in reversed(range(len(first_N))):
        state, frequency = state_L[j % lanes], end_N[j] - first_N[j]
        if frequency == 0:
            return None
        if state >> (32 - SLOT_BITS) >= frequency:
            backwards.append(state & WORD)
            state >>= WORD_BITS
        state_L[j % lanes] = (state // frequency << SLOT_BITS) + state % frequency + first_N[j]
    states = [half for state in state_L for half in (state & WORD, state >> WORD_BITS)]
    return states + backwards[::-1]


def _decode_segment(
    stream: list[int], row_N: Tensor, starts: Tensor, lanes: int
) -> tuple[list[int], int, int] | None:
    """The codes, the check and the words they were decoded from; None if no encoder wrote that."""
    if not _are_rows(row_N, starts):
        return None
    bounds = {row: [*starts[row].tolist(), SLOTS] for row in row_N.unique().tolist()}
    state_L = [stream[2 * i] | stream[2 * i + 1] << WORD_BITS for i in range(lanes)]
    at, codes = 2 * lanes, []
    for j, row in enumerate(row_N.tolist()):
        state = state_L[j % lanes]
        slot = state % SLOTS
        symbol = bisect_right(bounds[row], slot) - 1
        first, end = bounds[row][symbol : symbol + 2]
        state = (end - first) * (state >> SLOT_BITS) + slot - first
        if state < LEAST_STATE:
            if at == len(stream):
                return None
            state = state << WORD_BITS | stream[at]
            at += 1
        state_L[j % lanes] = state
        codes.append(ESCAPED if symbol == ESCAPE else symbol - MOST_CODE)
    check = state_L[0] - LEAST_STATE
    is_whole = check <= WORD and state_L[1:] == [LEAST_STATE] * (lanes - 1)
    return (codes, check, at) if is_whole else None


def _are_rows(row_N: Tensor, starts: Tensor) -> bool:
    return bool(((row_N >= 0) & (row_N < starts.shape[0])).all())
