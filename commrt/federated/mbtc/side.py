"""What both ends know of an update before it is sent: a prediction, and how large its errors are.

Both work it out for themselves, on different machines, and must come to the same bits. So it is
made by elementwise additions and multiplications, each rounded on its own, and by sums of integers.
"""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commrt import ops
from commrt.codecs.code_tables import (
    NUM_SCALES,
    SCALES_PER_OCTAVE,
    UNIT_SCALE,
)
from commrt.errors import StateError
from commrt.federated.layout import Layout, is_finite
from commrt.federated.wire import Reader
from commrt.ops.sources import NUM_PRODUCTS

Coefficients = NDArray[np.int8]

# Coefficients are sent as signed bytes, in 64ths.
COEFFICIENT_UNIT = 64
# Of the global update's energy beside that of the client's own last one.
SHARED_WEIGHT = 0.3
# Of least squares, in units of the sources' energy.
RIDGE = 1e-9
# Of the rounding's error, in steps squared.
ROUNDING = 1 / 12


class History(NamedTuple):
    """A client's last update as it was decoded, at the client and at the server.

    Attributes:
        decoded: bf16 (N,), with its noise shrunk.
        digest: See :func:`digest`.
    """

    decoded: Tensor
    digest: int

    @classmethod
    def made(cls, decoded: Tensor) -> "History":
        """Of an update that has just been decoded."""
        return cls(decoded, digest(decoded))

    @classmethod
    def of(cls, state: Mapping[str, Any], layout: Layout) -> "History":
        """What :meth:`state_dict` keeps.

        Raises:
            StateError: It is not of the layout.
        """
        flat = state.get("decoded")
        if not isinstance(flat, Tensor) or flat.dtype != torch.bfloat16:
            raise StateError(f"a history of {type(flat)}: must be a bfloat16 tensor")
        found = digest(flat)
        is_same = state.get("digest") == found  # then it is finite, as it was when it was kept
        if flat.shape != (layout.numel,) or not (is_same or is_finite(flat)):
            raise StateError(f"a history of {tuple(flat.shape)}: must be finite ({layout.numel},)")
        if not is_same:
            raise StateError(f"a history of digest {state.get('digest')}: is {found}")
        return cls(flat, found)

    def state_dict(self) -> dict[str, Any]:
        """Its attributes."""
        return self._asdict()

    @property
    def tag(self) -> int:
        """What is said of it: from 1 to 2**16 - 1."""
        return self.digest % 65535 + 1


class Sources(NamedTuple):
    """What is predicted from: the global update of the round before and the client's own last."""

    previous: Tensor | None
    own: Tensor | None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to predict from."""
        return self.previous is None and self.own is None


def digest(flat: Tensor | None) -> int:
    """By which both ends know that they have the same vector; 0 where there is none."""
    return 0 if flat is None else zlib.crc32(flat.view(torch.uint8).cpu().numpy().data)


class Fit(NamedTuple):
    """What only the clients work out, of K updates.

    Attributes:
        coefficients: Of least squares, for each group and source, in 64ths from -127 to 127: int8
            (K, G, 2).
        energies: Of each update, an element.
    """

    coefficients: Coefficients
    energies: list[float]


def fit(
    layout: Layout, updates: Tensor, previous: Tensor | None, own: Sequence[Tensor | None]
) -> Fit:
    """How each update, fp32 (K, N), is best predicted from its sources."""
    found = torch.empty(len(updates), NUM_PRODUCTS * len(layout.groups), dtype=torch.float64)
    ops.update_products(updates, previous, own, layout.ends, found)
    products = found.view(len(updates), -1, NUM_PRODUCTS).numpy()
    energies = products[:, :, -1].sum(axis=1) / layout.numel
    return Fit(_solved(products), energies.tolist())


def _solved(products: NDArray[np.float64]) -> Coefficients:
    """By Cramer's rule, of inner products in units of the sources' energy."""
    previous, both, own, previous_update, own_update, _ = np.moveaxis(products, -1, 0)
    energy = previous + own
    unit = np.where(energy > 0, energy, 1.0)
    previous, both, own = previous / unit + RIDGE, both / unit, own / unit + RIDGE
    previous_update, own_update = previous_update / unit, own_update / unit
    determinant = previous * own - both * both
    numerators = np.stack(
        (previous_update * own - own_update * both, own_update * previous - previous_update * both),
        axis=-1,
    )
    in_units = COEFFICIENT_UNIT * (numerators / determinant[..., None])
    found: Coefficients = np.rint(in_units.clip(-127.0, 127.0)).astype(np.int8)
    return found


def pack(coefficients: Coefficients, sources: Sources) -> bytes:
    """Of (G, 2), one byte for each source that there is, group by group."""
    return coefficients[:, _are_there(sources)].tobytes()


def unpack(reader: Reader, sources: Sources, num_groups: int) -> Coefficients:
    """What :func:`pack` wrote; zeros for a source that is not there."""
    there = _are_there(sources)
    found = np.zeros((num_groups, len(there)), np.int8)
    values = np.frombuffer(reader.take(num_groups * sum(there)), np.int8)
    found[:, there] = values.reshape(num_groups, -1)
    return found


def _are_there(sources: Sources) -> list[bool]:
    return [source is not None for source in sources]


@functools.cache
def shares() -> Tensor:
    """Of what is decoded beyond the prediction, what is signal, by the scale of its table.

    That much is kept of it for the next prediction: fp32 (NUM_SCALES,).
    """
    root = math.sqrt(2.0)
    found = []
    for scale in range(NUM_SCALES):
        halves = 4 * (scale - UNIT_SCALE) // SCALES_PER_OCTAVE
        variance = math.ldexp(root if halves % 2 else 1.0, halves // 2)
        found.append(variance / (variance + ROUNDING))
    return torch.tensor(found, dtype=torch.float32)
