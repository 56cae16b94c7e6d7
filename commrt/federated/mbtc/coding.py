"""What client and server both do with an update: the same steps, in one place.

The body of a payload, in little endian::

    flags          1 byte           what was predicted from, and whether the client chose
    chosen         4 + 2 a group    if so: the step, fp32, and the first row / 16 of each table
    coefficients   a byte each      of each group, for each source there is
    cosets         a section each   of the groups that have planes, see mbtc/planes.py
    codes          the rest         of what is coded alone, see commrt/codecs/entropy.py;
                                    of points of E8, commrt/codecs/points.py
"""

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from commrt import ops
from commrt.codecs.base import derive_seed
from commrt.codecs.code_tables import NUM_PHASES
from commrt.codecs.entropy import decode_codes, encode_codes
from commrt.codecs.points import Scales, decode_points, encode_points, scalar_codes
from commrt.errors import WireFormatError
from commrt.federated.layout import Layout
from commrt.federated.mbtc import side
from commrt.federated.mbtc.parameters import Plane
from commrt.federated.mbtc.planes import num_blocks
from commrt.federated.mbtc.side import History, Sources
from commrt.federated.wire import context_of
from commrt.ops.dither import DIMENSION, NAN_CODE, SECOND_MOMENT

if TYPE_CHECKING:
    from commrt.federated.mbtc.spec import Mbtc

USES_PREVIOUS, USES_OWN, CHOSEN = 1, 2, 4
# Codes go up to 32,767 with Z, to half of that with E8, dither included.
MOST_CODE = 1 << 15
MOST_STEPS = {"z": 32000.0, "e8": 16000.0}
# The lowest class has this many half octaves of energy less than a step.
CLASSES_BELOW_STEP = 44


class Coding(NamedTuple):
    """How one update is coded.

    Attributes:
        lattice: ``"z"`` or ``"e8"``, whose codes are a whole number of points.
        step: Of the quantizer.
        seed: Of the dither.
        predicted: fp32 (N,).
        contexts: int16 (N,), the class of each element's scale, times 16, plus the phase that its
            dither has on the integers.
        rows: int16 (N,), of the tables that the contexts have.
    """

    lattice: str
    step: float
    seed: int
    predicted: Tensor
    contexts: Tensor
    rows: Tensor

    @property
    def noise(self) -> float:
        """Variance of the quantizer's error, an element."""
        return self.step**2 * SECOND_MOMENT[self.lattice]

    def quantise(self, update: Tensor) -> Tensor:
        """Codes of an update, int16 (N,), with zeros behind it that fill the last point."""
        update, predicted = self._filled(update), self._filled(self.predicted)
        codes = torch.empty(update.shape, dtype=torch.int16)
        ops.dither_quantise(update, predicted, codes, self.step, self.seed, lattice=self.lattice)
        return codes

    def dequantise(self, codes: Tensor) -> Tensor:
        """What is decoded of codes, fp32 (N,)."""
        update = torch.empty(codes.shape)
        predicted = self._filled(self.predicted)
        ops.dither_dequantise(codes, predicted, update, self.step, self.seed, lattice=self.lattice)
        return update[: self.predicted.numel()]

    def remember(self, decoded: Tensor) -> History:
        """What is kept of a decoded update (N,) for the next prediction."""
        return side.remember(decoded, self.predicted, self.rows)

    def scalar(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and contexts, int16 (N,), as a scalar quantizer has them, to learn tables from."""
        if self.lattice == "z":
            return codes, self.contexts
        whole, phases = scalar_codes(codes, self._dither(codes))
        size = self.predicted.numel()
        return whole[:size], self.contexts - self.contexts % NUM_PHASES + phases[:size]

    def encode(self, codes: Tensor, parts: Sequence[slice]) -> bytes:
        """The payload of parts of the codes; of points, all."""
        if self.lattice == "z":
            return encode_codes(gather(codes, parts), gather(self.rows, parts))
        return encode_points(codes, self._scales(codes))

    def decode(self, payload: bytes, parts: Sequence[slice]) -> Tensor:
        """Codes, zeros but for the parts.

        Raises:
            WireFormatError: They cannot be decoded.
        """
        codes = torch.zeros_like(self._filled(self.rows))
        if self.lattice == "e8":
            return decode_points(payload, self._scales(codes))
        found = read_codes(payload, gather(self.rows, parts))
        if found.numel() == codes.numel():
            return found
        sizes = [part.stop - part.start for part in parts]
        for part, some in zip(parts, found.split(sizes), strict=True):
            codes[part] = some
        return codes

    def _filled(self, flat: Tensor) -> Tensor:
        lacking = -flat.numel() % DIMENSION[self.lattice]
        return torch.cat([flat, flat.new_zeros(lacking)]) if lacking else flat

    def _dither(self, codes: Tensor) -> Tensor:
        undithered = torch.empty(codes.shape)
        zeros = torch.zeros_like(codes)
        ops.dither_dequantise(zeros, None, undithered, 1.0, self.seed, lattice=self.lattice)
        return undithered.neg_()

    def _scales(self, codes: Tensor) -> Scales:
        return Scales(self._dither(codes), self._filled(self.rows - self.contexts % NUM_PHASES))


def read_codes(payload: bytes, rows: Tensor) -> Tensor:
    """Codes of these rows, int16 (N,), none of which stands for what is no number.

    Raises:
        WireFormatError: They cannot be decoded.
    """
    codes = decode_codes(payload, rows, rows.numel())
    if codes.numel() and int(codes.min()) == NAN_CODE:
        raise WireFormatError(f"a code of {NAN_CODE}, which no number has")
    return codes


def coding(
    codec: "Mbtc",
    layout: Layout,
    sources: Sources,
    predicted: Tensor,
    tables: Tensor,
    step: float,
    seed: int,
) -> Coding:
    """What :class:`Coding` has, from what was told and what was sent."""
    rows = torch.empty(layout.numel, dtype=torch.int16)
    contexts = torch.empty_like(rows)
    energies, base = side.energies(layout, sources), _lowest_class(step)
    ops.scale_rows(energies, tables, layout.ends, rows, seed, base=base, contexts=contexts)
    return Coding(codec.lattice, step, seed, predicted, contexts, rows)


def coded_alone(layout: Layout, planes: Sequence[Sequence[Plane]], block: int) -> list[slice]:
    """The parts of the flat vector whose codes are not sent as cosets, in order and apart."""
    parts: list[slice] = []
    for group, each in zip(layout.groups, planes, strict=True):
        begin = group.begin + block * num_blocks(group.numel, each, block)
        if begin == group.end:
            continue
        if parts and parts[-1].stop == begin:
            begin = parts.pop().start
        parts.append(slice(begin, group.end))
    return parts


def gather(flat: Tensor, parts: Sequence[slice]) -> Tensor:
    """These parts of a vector, joined."""
    if len(parts) == 1:
        return flat[parts[0]]
    return torch.cat([flat[part] for part in parts]) if parts else flat[:0]


def dither_seed(seed: int, round_index: int, client: int) -> int:
    """Of a client's dither in a round."""
    return derive_seed("mbtc dither", seed, round_index, client)


def context(
    codec: "Mbtc", layout: Layout, seed: int, round_index: int, client: int, *known: int
) -> bytes:
    """What both ends of a frame know; see :mod:`commrt.federated.wire`.

    ``known`` are digests of what is needed to read it.
    """
    return context_of(codec.spec, layout.digest, seed, round_index, client, *known)


def _lowest_class(step: float) -> int:
    [single] = struct.unpack("<f", struct.pack("<f", step))
    [bits] = struct.unpack("<I", struct.pack("<f", single * single))
    return max(0, int(bits >> 22) - CLASSES_BELOW_STEP)
