"""Where joint decoding pays: which groups of which clients are cosets, decoded in what order."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from commrt.codecs.polar import bits_needed, entropy_bin_of, plane_entropy
from commrt.federated.mbtc.parameters import MOST_PLANES, Plane
from commrt.federated.mbtc.planes import CHECK_BYTES
from commrt.federated.mbtc.rate import Planned

if TYPE_CHECKING:
    from commrt.federated.mbtc.spec import Mbtc

# What a plane that is not sent may hold, in bits a block. In polar codes it costs little to send;
# modulo a power of two it costs a bit a code, so that one block in twenty may rather fail.
NEGLIGIBLE_BITS, NEGLIGIBLE_MODULO_BITS = 0.01, 1.0
SIGMAS_PER_OCTAVE = 32
# Its multiples, less their whole parts, are spread evenly.
GOLDEN_RATIO = 0.6180339887498949


class Plan(NamedTuple):
    """A round's joint decoding.

    Attributes:
        order: Places, the first to be decoded first.
        planes: Of each place and group.
        covariances: float64 (K, K), of the residuals of each group that is decoded jointly.
    """

    order: Sequence[int]
    planes: Sequence[tuple[tuple[Plane, ...], ...]]
    covariances: Mapping[int, NDArray[np.float64]]


NO_PLAN = Plan((), (), {})


def order_of(cohort: Sequence[int], round_index: int, planned: Planned | None) -> list[int]:
    """Places in the order of decoding: another client first in every round.

    With rates of their own, an order that allocation found; of several that share the coordinates,
    another one in every round, as often as its share.
    """
    if planned is None or not planned.orders:
        return [(place + round_index) % len(cohort) for place in range(len(cohort))]
    position = round_index * GOLDEN_RATIO % 1
    ends = itertools.accumulate(planned.shares)
    which = next((i for i, end in enumerate(ends) if position < end), 0)
    return list(planned.orders[which])


def num_anchors(codec: "Mbtc", num_clients: int) -> int:
    """Clients that are decoded without others."""
    return max(2, num_clients // 8) if codec.anchors is None else codec.anchors


def planes_of_group(
    codec: "Mbtc",
    sigmas: NDArray[np.float64],
    order: Sequence[int],
    bits_alone: NDArray[np.float64],
    margin: float,
) -> list[tuple[Plane, ...]]:
    """The planes of each place; an empty tuple where a client is better coded alone.

    Args:
        codec: Its block, anchors and least gain.
        sigmas: (K,), in steps: what remains unknown of each residual, given those before it.
        order: In which they will be decoded.
        bits_alone: (K,), bits a weight without cosets.
        margin: See :func:`commrt.codecs.polar.bits_needed`.
    """
    planes: list[tuple[Plane, ...]] = [()] * len(order)
    for place in order[num_anchors(codec, len(order)) :]:
        is_modulo = codec.joint == "modulo"
        chosen = planes_for(float(sigmas[place]), codec.block, margin, is_modulo=is_modulo)
        if bits_alone[place] - bits_of(chosen, codec.block) > codec.least_gain:
            planes[place] = chosen
    return planes


def planes_for(
    sigma: float, block: int, margin: float, *, is_modulo: bool = False
) -> tuple[Plane, ...]:
    """The planes to send where a code is known up to a Gaussian error of so many steps.

    Of each as much as its entropy and ``margin`` ask for; with ``is_modulo``, all of it.
    """
    octaves = math.ceil(SIGMAS_PER_OCTAVE * math.log2(max(sigma, 2.0**-6)))
    log2_size, planes = block.bit_length() - 1, list[Plane]()
    negligible = NEGLIGIBLE_MODULO_BITS if is_modulo else NEGLIGIBLE_BITS
    for index in range(MOST_PLANES):
        entropy = _entropy(octaves, index)
        if block * entropy < negligible and planes:
            break
        num_bits = block if is_modulo else bits_needed(log2_size, entropy, margin)
        planes.append(Plane(entropy_bin_of(entropy), num_bits))
    return tuple(planes)


def bits_of(planes: Sequence[Plane], block: int) -> float:
    """Bits a code that a block takes, checks included."""
    checks = 1 + sum(plane.num_bits < block for plane in planes)
    return (sum(plane.num_bits for plane in planes) + 8 * CHECK_BYTES * checks) / block


@functools.lru_cache(maxsize=4096)
def _entropy(octaves: int, index: int) -> float:
    place = 2.0**-index
    return min(1.0, plane_entropy(2.0 ** (octaves / SIGMAS_PER_OCTAVE) * place, place))
