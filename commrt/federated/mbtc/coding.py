"""What client and server both do with an update: the same steps, in one place.

The body of a payload, in little endian::

    flags          1 byte           what was predicted from, and whether the client chose
    chosen         4 + 2 a group    if so: the step, fp32, and the first row / 16 of each table
    coefficients   a byte each      of each group, for each source there is
    cosets         a section each   of the groups that have planes, see mbtc/planes.py
    codes          the rest         of what is coded alone, see commrt/codecs/entropy.py;
                                    of points of E8, commrt/codecs/points.py
"""

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from commrt import ops
from commrt.codecs.base import derive_seed
from commrt.codecs.code_tables import NUM_PHASES
from commrt.codecs.entropy import decode_vectors, encode_codes
from commrt.codecs.points import Scales, decode_points, encode_points, scalar_codes
from commrt.errors import WireFormatError
from commrt.federated.layout import Layout
from commrt.federated.mbtc import side
from commrt.federated.mbtc.parameters import Plane
from commrt.federated.mbtc.planes import num_blocks
from commrt.federated.mbtc.side import Coefficients, History
from commrt.federated.wire import context_of
from commrt.ops.dither import DIMENSION, NAN_CODE, SECOND_MOMENT
from commrt.ops.sources import NUM_PRODUCTS

if TYPE_CHECKING:
    from commrt.federated.mbtc.spec import Mbtc

Item = TypeVar("Item")

# Of updates that are worked on at once.
BATCH_ELEMENTS = 1 << 18
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
        codes = torch.zeros_like(filled(self.rows, self.lattice))
        if self.lattice == "e8":
            return decode_points(payload, self._scales(codes))
        found = read_codes(payload, gather(self.rows, parts))
        sizes = [part.stop - part.start for part in parts]
        for part, some in zip(parts, found.split(sizes), strict=True):
            codes[part] = some
        return codes

    def _dither(self, codes: Tensor) -> Tensor:
        undithered = torch.empty(codes.shape)
        zeros = torch.zeros_like(codes)
        ops.dither_dequantise(zeros, None, undithered, 1.0, self.seed, lattice=self.lattice)
        return undithered.neg_()

    def _scales(self, codes: Tensor) -> Scales:
        firsts = self.rows - self.contexts % NUM_PHASES
        return Scales(self._dither(codes), filled(firsts, self.lattice))


class Values(NamedTuple):
    """What is decoded of K updates.

    Attributes:
        values: fp32 (K, N).
        residuals: fp32 (K, N), these less what was predicted.
        squares: Of each, those of its values and of its residuals, an element.
    """

    values: Tensor
    residuals: Tensor
    squares: list[tuple[float, float]]


class Codings:
    """How K updates are coded, from what was told and what was sent.

    Args:
        lattice: Of all.
        layout: Of all.
        previous: The source that all share, if they have it.
        own: The other source of each.
        coefficients: int8 (K, G, 2), of the predictions.
        tables: Of each, int16 (G, NUM_CLASSES).
        steps: Of each.
        seeds: Of each one's dither.
    """

    def __init__(
        self,
        lattice: str,
        layout: Layout,
        previous: Tensor | None,
        own: Sequence[Tensor | None],
        *,
        coefficients: Coefficients,
        tables: Sequence[Tensor],
        steps: Sequence[float],
        seeds: Sequence[int],
    ) -> None:
        self.lattice, self.steps, self.seeds, self._layout = lattice, steps, seeds, layout
        shape = len(steps), layout.numel
        self.predicted = torch.empty(shape)
        self.contexts = torch.empty(shape, dtype=torch.int16)
        self.rows = torch.empty_like(self.contexts)
        ops.update_rows(
            previous,
            own,
            (coefficients / side.COEFFICIENT_UNIT).ravel().tolist(),
            layout.matrices,
            side.SHARED_WEIGHT,
            layout.ends,
            tables,
            [_lowest_class(step) for step in steps],
            seeds,
            self.predicted,
            self.contexts,
            self.rows,
        )

    def __getitem__(self, index: int) -> Coding:
        """Of one update."""
        return Coding(
            self.lattice,
            self.steps[index],
            self.seeds[index],
            self.predicted[index],
            self.contexts[index],
            self.rows[index],
        )

    def quantise(self, updates: Tensor, *, keep: bool) -> tuple[Tensor, list[History]]:
        """Codes of fp32 (K, N), int16, with those behind that fill the last point.

        And, if asked for, what is kept of each.
        """
        updates, predicted = (filled(each, self.lattice) for each in (updates, self.predicted))
        codes = torch.empty(updates.shape, dtype=torch.int16)
        kept = self._to_keep(len(updates) if keep else 0)
        ops.update_codes(
            updates, predicted, self.rows, side.shares(), self.steps, self.seeds, codes, kept,
            lattice=self.lattice,
        )  # fmt: skip
        return codes, [History.made(each) for each in kept]

    def dequantise(self, codes: Tensor, *, keep: bool) -> tuple[Values, list[History]]:
        """What is decoded of codes as of :meth:`quantise`, and, if asked for, kept of each."""
        values, residuals = torch.empty_like(self.predicted), torch.empty_like(self.predicted)
        size = NUM_PRODUCTS * len(self._layout.groups)
        products = torch.empty(len(codes), size, dtype=torch.float64)
        kept = self._to_keep(len(codes) if keep else 0)
        ops.update_values(
            codes, self.predicted, self.rows, side.shares(), self._layout.ends, self.steps,
            self.seeds, values, residuals, products, kept, lattice=self.lattice,
        )  # fmt: skip
        sums = products.view(len(codes), -1, NUM_PRODUCTS).sum(dim=1) / self._layout.numel
        squares = [(row[5], row[0]) for row in sums.tolist()]
        return Values(values, residuals, squares), [History.made(each) for each in kept]

    def _to_keep(self, count: int) -> list[Tensor]:
        return [torch.empty(self._layout.numel, dtype=torch.bfloat16) for _ in range(count)]


def batches(
    items: Sequence[Item], numel: int, key: Callable[[Item], object]
) -> Iterator[list[Item]]:
    """Neighbours that share a key, as many at once as stay in a cache; updates of ``numel``."""
    most = max(1, BATCH_ELEMENTS // numel)
    for _, alike in itertools.groupby(items, key):
        while some := list(itertools.islice(alike, most)):
            yield some


def filled(flat: Tensor, lattice: str) -> Tensor:
    """With zeros behind each row (..., N) that fill the last point."""
    lacking = -flat.shape[-1] % DIMENSION[lattice]
    return torch.nn.functional.pad(flat, (0, lacking)) if lacking else flat


def read_codes(payload: bytes, rows: Tensor) -> Tensor:
    """Codes of these rows, int16 (N,), none of which stands for what is no number.

    Raises:
        WireFormatError: They cannot be decoded.
    """
    return read_vectors([payload], rows[None])[0]


def read_vectors(payloads: Sequence[bytes], rows: Tensor) -> Tensor:
    """:func:`read_codes` of rows (K, N)."""
    codes = decode_vectors(payloads, rows)
    if codes.numel() and int(codes.min()) == NAN_CODE:
        raise WireFormatError(f"a code of {NAN_CODE}, which no number has")
    return codes


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
