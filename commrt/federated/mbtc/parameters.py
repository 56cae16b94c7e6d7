"""What the server tells a client along with the model: everything that it has to agree on.

The body of a frame of parameters, in little endian::

    flags      1 byte            bit 0: tables follow; bit 1: planes of some group follow; bit 2:
                                 the server has a global update of the round before
    step       4 bytes           fp32; 0 lets the client choose
    history    2 bytes           the tag of the client's history at the server; 0 if it has none
    tables     128 bytes a group the first row / 16 of each class, 2 bytes
    planes     a group           1 byte, how many planes are coded; for each, the bin of its order
                                 and, in 2 bytes, an eighth of the u to send
"""

import dataclasses
import functools
import struct
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from commrt.codecs.code_tables import NUM_PHASES, NUM_ROWS
from commrt.codecs.polar import NUM_BINS
from commrt.errors import WireFormatError
from commrt.federated.wire import Reader

# The least is for updates of zeros.
LEAST_STEP, MOST_STEP = 2.0**-100, 2.0**60
NUM_CLASSES = 64
MOST_PLANES = 14
HAS_TABLES, HAS_PLANES, HAS_PREVIOUS = 1, 2, 4


class Plane(NamedTuple):
    """How a bit plane is sent: ``num_bits`` u of each block, in the order of ``entropy_bin``."""

    entropy_bin: int
    num_bits: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """Of one round and client.

    Attributes:
        step: Of the quantizer; 0 lets the client choose.
        history: As in the frame.
        tables: int16 (groups, NUM_CLASSES), the first row of each class; None lets the client
            choose.
        planes: Of each group, lowest first; an empty tuple for one that is coded alone.
        has_previous: Whether the client may predict from the global update of the round before.
    """

    step: float
    history: int
    tables: Tensor | None
    planes: tuple[tuple[Plane, ...], ...]
    has_previous: bool

    def pack(self) -> bytes:
        """The frame's body."""
        flags = HAS_TABLES * (self.tables is not None) | HAS_PLANES * any(self.planes)
        flags |= HAS_PREVIOUS * self.has_previous
        parts = [struct.pack("<BfH", flags, self.step, self.history)]
        if self.tables is not None:
            parts.append((self.tables.numpy() // NUM_PHASES).astype("<u2").tobytes())
        if any(self.planes):
            for planes in self.planes:
                parts.append(bytes((len(planes),)))
                parts += [
                    struct.pack("<BH", plane.entropy_bin, plane.num_bits // 8) for plane in planes
                ]
        return b"".join(parts)

    @classmethod
    def unpack(cls, body: bytes, num_groups: int, block: int) -> "Parameters":
        """The other way round.

        Raises:
            WireFormatError: It is not such a body.
        """
        reader = Reader(body)
        flags, step, history = reader.unpack("BfH")
        if step != 0 and not LEAST_STEP <= step <= MOST_STEP:
            raise WireFormatError(f"a step of {step}")
        tables: Tensor | None = None
        if int(flags) & HAS_TABLES:
            tables = read_firsts(reader, num_groups * NUM_CLASSES).view(num_groups, NUM_CLASSES)
        planes: tuple[tuple[Plane, ...], ...] = ((),) * num_groups
        if int(flags) & HAS_PLANES:
            planes = tuple(_read_planes(reader, block) for _ in range(num_groups))
        reader.end()
        return cls(
            step=step,
            history=int(history),
            tables=tables,
            planes=planes,
            has_previous=bool(int(flags) & HAS_PREVIOUS),
        )


def read_firsts(reader: Reader, count: int) -> Tensor:
    """The first rows of so many tables, int16 (count,).

    Raises:
        WireFormatError: There are fewer, or a row that there is none of.
    """
    return _firsts_of(reader.take(2 * count))


@functools.lru_cache(maxsize=16)
def _firsts_of(told: bytes) -> Tensor:
    """The same tensor for the same bytes, which many clients are told."""
    firsts = np.frombuffer(told, dtype="<u2")
    largest = NUM_PHASES * int(firsts.max())
    if largest >= NUM_ROWS:
        raise WireFormatError(f"a table of row {largest}: there are {NUM_ROWS}")
    return torch.from_numpy((firsts * NUM_PHASES).astype(np.int16))


def _read_planes(reader: Reader, block: int) -> tuple[Plane, ...]:
    (num_planes,) = reader.unpack("B")
    if num_planes > MOST_PLANES:
        raise WireFormatError(f"{num_planes} planes: {MOST_PLANES} is the most")
    planes = []
    for _ in range(int(num_planes)):
        entropy_bin, eighths = map(int, reader.unpack("BH"))
        if entropy_bin >= NUM_BINS or 8 * eighths > block:
            raise WireFormatError(f"a plane of bin {entropy_bin} and {8 * eighths} u")
        planes.append(Plane(entropy_bin, 8 * eighths))
    return tuple(planes)
