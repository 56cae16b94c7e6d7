"""What both ends know of an update before it is sent: a prediction, and how large its errors are.

Both work it out for themselves, on different machines, and must come to the same bits. So it is
made by elementwise additions and multiplications, each rounded on its own, and by sums of integers.
"""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
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
    def of(cls, state: Mapping[str, Any], layout: Layout) -> "History":
        """What :meth:`state_dict` keeps.

        Raises:
            StateError: It is not of the layout.
        """
        flat = state.get("decoded")
        if not isinstance(flat, Tensor) or flat.dtype != torch.bfloat16:
            raise StateError(f"a history of {type(flat)}: must be a bfloat16 tensor")
        if flat.shape != (layout.numel,) or not is_finite(flat):
            raise StateError(f"a history of {tuple(flat.shape)}: must be finite ({layout.numel},)")
        found = digest(flat)
        if state.get("digest") != found:
            raise StateError(f"a history of digest {state.get('digest')}: is {found}")
        return cls(flat, found)

    def state_dict(self) -> dict[str, Any]:
        """Its attributes."""
        return self._asdict()

    @property
    def tag(self) -> int:
        """What is said of it: from 1 to 2**16 - 1."""
        return self.digest % 65535 + 1


class Coefficients(NamedTuple):
    """Of a group's prediction, in 64ths, from -127 to 127."""

    previous: int = 0
    own: int = 0


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
    """What only the client works out.

    Attributes:
        coefficients: Of least squares, for each group.
        energy: The update's, an element.
    """

    coefficients: list[Coefficients]
    energy: float


def fit(layout: Layout, update: Tensor, sources: Sources) -> Fit:
    """How an update, fp32 (N,), is best predicted from the sources."""
    products = torch.empty(len(layout.groups), NUM_PRODUCTS, dtype=torch.float64)
    ops.source_products(update, sources.previous, sources.own, layout.ends, products)
    rows = products.tolist()
    energy = sum(row[-1] for row in rows) / layout.numel
    return Fit([_solved(*row[:-1]) for row in rows], energy)


def _solved(
    previous: float, both: float, own: float, previous_update: float, own_update: float
) -> Coefficients:
    """By Cramer's rule, of inner products in units of the sources' energy."""
    energy = previous + own
    if not energy:
        return Coefficients()
    previous, both, own = previous / energy + RIDGE, both / energy, own / energy + RIDGE
    previous_update, own_update = previous_update / energy, own_update / energy
    determinant = previous * own - both * both
    return Coefficients(
        _in_units((previous_update * own - own_update * both) / determinant),
        _in_units((own_update * previous - previous_update * both) / determinant),
    )


def _in_units(coefficient: float) -> int:
    return round(max(-127.0, min(127.0, COEFFICIENT_UNIT * coefficient)))


def mean_squares(layout: Layout, update: Tensor, residual: Tensor) -> tuple[float, float]:
    """Of the elements of both, fp32 (N,)."""
    products = torch.empty(len(layout.groups), NUM_PRODUCTS, dtype=torch.float64)
    ops.source_products(update, residual, None, layout.ends, products)
    total = (products.sum(dim=0) / layout.numel).tolist()
    return total[5], total[0]


def prediction(layout: Layout, sources: Sources, coefficients: Sequence[Coefficients]) -> Tensor:
    """Of all groups, fp32 (N,), within :data:`~commrt.ops.sources.MOST_PREDICTED`."""
    predicted = torch.empty(layout.numel)
    weights = [(p / COEFFICIENT_UNIT, o / COEFFICIENT_UNIT) for p, o in coefficients]
    ops.source_prediction(sources.previous, sources.own, weights, layout.ends, predicted)
    return predicted


def energies(layout: Layout, sources: Sources) -> Tensor | None:
    """How large each element's error is likely to be, squared and up to a factor; fp32 (N,)."""
    if sources.is_empty:
        return None
    found = torch.empty(layout.numel)
    ops.source_energies(sources.previous, sources.own, SHARED_WEIGHT, layout.matrices, found)
    return found


def remember(decoded: Tensor, predicted: Tensor, rows: Tensor) -> History:
    """What is kept of a decoded update (N,): its difference to what was predicted has less noise.

    ``rows`` are those of its tables, which tell the variance.
    """
    kept = torch.empty(decoded.shape, dtype=torch.bfloat16)
    ops.source_history(decoded, predicted, rows, _shares(), kept)
    return History(kept, digest(kept))


@functools.cache
def _shares() -> Tensor:
    """Of a difference, what is signal, by the scale of its table: fp32 (NUM_SCALES,)."""
    root = math.sqrt(2.0)
    shares = []
    for scale in range(NUM_SCALES):
        halves = 4 * (scale - UNIT_SCALE) // SCALES_PER_OCTAVE
        variance = math.ldexp(root if halves % 2 else 1.0, halves // 2)
        shares.append(variance / (variance + ROUNDING))
    return torch.tensor(shares, dtype=torch.float32)


def pack(coefficients: Sequence[Coefficients], sources: Sources) -> bytes:
    """One byte for each source that there is, group by group."""
    return b"".join(
        value.to_bytes(1, "little", signed=True)
        for each in coefficients
        for value, source in zip(each, sources, strict=True)
        if source is not None
    )


def unpack(reader: Reader, sources: Sources, num_groups: int) -> list[Coefficients]:
    """What :func:`pack` wrote."""
    there = [source is not None for source in sources]
    values = iter(reader.unpack(f"{num_groups * sum(there)}b"))
    return [
        Coefficients(*(int(next(values)) if is_there else 0 for is_there in there))
        for _ in range(num_groups)
    ]
