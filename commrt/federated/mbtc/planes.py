"""Cosets of a group's codes: bit planes of which few bits are sent, and blocks that they make.

The codes of a group, as far as they fill whole blocks, are sent as ``planes | checks``: of each
plane the u of all blocks (see :mod:`commrt.codecs.polar`), then of each block a CRC-24 for every
plane that has to be decided, and one of the whole codes. What lies above the highest plane is not
sent: it follows from the side information.
"""

import copy
import functools
import itertools
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from commrt import ops
from commrt.codecs.polar import decode_plane, encode_plane, plane_table
from commrt.federated.mbtc.parameters import Plane
from commrt.federated.wire import Reader

CHECK_BYTES = 3
# What a block is asked for at a time, where it cannot be decided.
MORE_SHARE = 1 / 32
# Where a table of LLRs serves errors that are nearly as large.
SIGMAS_PER_OCTAVE = 16


def num_blocks(numel: int, planes: Sequence[Plane], block: int) -> int:
    """Blocks of a group that are sent as cosets; the rest of it is coded alone."""
    return numel // block if planes else 0


def encode_blocks(codes: Tensor, planes: Sequence[Plane], block: int) -> bytes:
    """The section of a group, of whose codes (int16) those that fill blocks are sent."""
    count = num_blocks(codes.numel(), planes, block)
    if not count:
        return b""
    codes_BN = codes[: count * block].view(count, block)
    sent, checks = [], []
    for index, plane in enumerate(planes):
        bits_BN = _bits(codes_BN, index)
        sent.append(_bytes(encode_plane(bits_BN, plane.entropy_bin, plane.num_bits)))
        if plane.num_bits < block:
            checks += _checks(_packed(bits_BN))
    checks += _checks(codes_BN)
    return b"".join((*sent, *checks))


def encode_more(codes: Tensor, index: int, plane: Plane, first: int, count: int) -> bytes:
    """The next ``count`` u of a plane of one block of codes."""
    bits_1N = _bits(codes.view(1, -1), index)
    return _bytes(encode_plane(bits_1N, plane.entropy_bin, count, first=first))


class Blocks:
    """A group's cosets at the server, which become codes as side information allows.

    Args:
        reader: Of the payload; takes the section.
        numel: Codes in the group.
        planes: As the client was told.
        block: Codes in a block.

    Attributes:
        codes: int16 (B, N), those of blocks that are decided.
        is_whole: bool (B,), which these are.

    Raises:
        WireFormatError: The payload is too short.
    """

    def __init__(self, reader: Reader, numel: int, planes: Sequence[Plane], block: int) -> None:
        count = num_blocks(numel, planes, block)
        self.planes, self.block = tuple(planes), block
        self.codes = torch.zeros(count, block, dtype=torch.int16)
        self.is_whole = torch.zeros(count, dtype=torch.bool)
        self._decided = [0] * count
        self._sent = [
            [reader.take(plane.num_bits // 8) for _ in range(count)] for plane in self.planes
        ]
        self._checks = [
            [reader.take(CHECK_BYTES) for _ in range(count)] if plane.num_bits < block else None
            for plane in self.planes
        ]
        self._whole_checks = [reader.take(CHECK_BYTES) for _ in range(count)]

    def part(self, which: range) -> "Blocks":
        """Some of the blocks, counted from the first of them, that share codes with these."""
        cut, part = slice(which.start, which.stop), copy.copy(self)
        part.codes, part.is_whole = self.codes[cut], self.is_whole[cut]
        part._decided = self._decided[cut]
        part._sent = [each[cut] for each in self._sent]
        part._checks = [each and each[cut] for each in self._checks]
        part._whole_checks = self._whole_checks[cut]
        return part

    def section(self) -> bytes:
        """What these were read from."""
        checks = (each for each in self._checks if each is not None)
        return b"".join(itertools.chain(*self._sent, *checks, self._whole_checks))

    def decide(self, which: Sequence[int], position: Tensor, sigma: float) -> None:
        """Decide blocks as far as what was sent allows.

        Args:
            which: Blocks, none of which is whole.
            position: fp32 (len(which), N), near the codes.
            sigma: Standard deviation of the position's error, in steps.
        """
        for index in range(len(self.planes)):
            pending = [place for place, each in enumerate(which) if self._decided[each] == index]
            for same in self._with_as_many(index, which, pending):
                self._decide_plane(index, [which[place] for place in same], position[same], sigma)
        last = [p for p, each in enumerate(which) if self._decided[each] == len(self.planes)]
        if last:
            self._complete([which[place] for place in last], position[last])

    def lacking(self, which: int) -> tuple[int, int, int]:
        """What a block that is not whole needs: a plane, the u it has, and how many more to ask.

        None of any is asked where all were sent: then it can only be sent as it is.
        """
        index = min(self._decided[which], len(self.planes) - 1)
        has = 8 * len(self._sent[index][which])
        more = min(self.block - has, max(8, int(MORE_SHARE * self.block) // 8 * 8))
        return index, has, more

    def add(self, which: int, index: int, sent: bytes) -> None:
        """Take more u of a plane of a block."""
        self._sent[index][which] += sent

    def has_check_of(self, which: int, codes: Tensor) -> bool:
        """Whether these are the codes of a block, by its check."""
        return _checks(codes[None]) == [self._whole_checks[which]]

    def replace(self, which: int, codes: Tensor) -> None:
        """Take a block as it is."""
        self.codes[which] = codes
        self.is_whole[which] = True

    def _with_as_many(
        self, index: int, which: Sequence[int], pending: Sequence[int]
    ) -> list[list[int]]:
        """The pending ones, together where as much of the plane was sent."""
        by_size: dict[int, list[int]] = {}
        for place in pending:
            by_size.setdefault(len(self._sent[index][which[place]]), []).append(place)
        return list(by_size.values())

    def _decide_plane(self, index: int, which: list[int], position: Tensor, sigma: float) -> None:
        sent = np.frombuffer(b"".join(self._sent[index][each] for each in which), dtype=np.uint8)
        sent_BM = torch.from_numpy(sent.reshape(len(which), -1).copy())
        llr_BN = torch.empty_like(position)
        known = self.codes[which]
        ops.coset_llr(
            position.reshape(-1), known.view(-1), index, _table(sigma, index), llr_BN.view(-1)
        )
        bits_BN = decode_plane(llr_BN, sent_BM, self.planes[index].entropy_bin)
        checks = self._checks[index]
        found = _checks(_packed(bits_BN)) if checks is not None else None
        for place, each in enumerate(which):
            if checks is None or found is None or found[place] == checks[each]:
                self.codes[each] |= bits_BN[place].to(torch.int16) << index
                self._decided[each] += 1

    def _complete(self, which: list[int], position: Tensor) -> None:
        """Whole codes of blocks of which all planes are decided."""
        codes = torch.empty(position.shape, dtype=torch.int16)
        modulus = 1 << len(self.planes)
        ops.coset_decode(position.reshape(-1), self.codes[which].view(-1), modulus, codes.view(-1))
        for place, (each, check) in enumerate(zip(which, _checks(codes), strict=True)):
            if check == self._whole_checks[each]:
                self.replace(each, codes[place])
            else:
                last = len(self.planes) - 1
                self.codes[each] &= (1 << last) - 1
                self._decided[each] = last


def _bits(codes: Tensor, index: int) -> Tensor:
    return (codes >> index & 1).to(torch.uint8)


def _packed(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.cpu().numpy(), axis=-1, bitorder="little"))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _checks(rows: Tensor) -> list[bytes]:
    """A CRC of each row, of which three bytes are kept."""
    return [
        zlib.crc32(row.tobytes()).to_bytes(4, "little")[:CHECK_BYTES]
        for row in np.ascontiguousarray(rows.cpu().numpy())
    ]


def _table(sigma: float, index: int) -> Tensor:
    """Of a plane, for an error that is at least as large as sigma."""
    octaves = int(np.ceil(SIGMAS_PER_OCTAVE * np.log2(max(sigma, 2.0**-8))))
    return _table_of(octaves, index)


@functools.lru_cache(maxsize=512)
def _table_of(octaves: int, index: int) -> Tensor:
    place = 2.0**-index
    return plane_table(2.0 ** (octaves / SIGMAS_PER_OCTAVE) * place, place)
