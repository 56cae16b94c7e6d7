"""Slepian-Wolf codes of bit planes: a sender names fewer bits than a plane has, by polar codes.

The receiver has side information: a position z of each integer n, off by a Gaussian error and by
the rounding that made n of a real number. Planes are coded one after the other, the lowest first,
each given those below it: a plane that side information leaves H bits of a bit of is sent in little
more than H. Most planes are not sent, being known, or sent as they are, being unknown.

For a plane the receiver chooses an ``entropy_bin`` and a ``count``, and tells them; the sender
returns that many u of each block (see :mod:`commrt.ops.polar`), the least reliable ones. Where a
block cannot be decoded, it is asked for more of them: the order in which they are sent goes on.

Source: Arikan, "Source polarization", 2010 (arXiv 1001.3087); for the order, density evolution of
Gaussian LLRs by their means: Chung, "On the construction of some capacity-approaching coding
schemes", 2000, and Trifonov, "Efficient design and decoding of polar codes", 2012.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops.polar import LEAST_LOG2, MOST_LOG2

NUM_BINS = 160
BINS_AN_OCTAVE = 16
LEAST_LOG2_MEAN = -5
LEAST_MEAN = 1e-100  # so that no square of it is subnormal, which some processes flush to zero
DEFAULT_PATHS = 4
TABLE = 4096
MOST_LLR = 2.0**20
MOST_SIGMA = 4.0  # in places of a plane; beyond, what is known of a bit is less than 1e-30 bits
# bits_needed() adds GAP * 2**(-SHRINK * log2_size) * H**LOW * (1 - H)**HIGH to the entropy H.
GAP, SHRINK, LOW, HIGH = 1.0, 0.153, 0.74, 0.86
# A plane that saves less of a bit a bit is sent as it is; one whose blocks lack fewer bits is not.
LEAST_SAVING = 1 / 256
NEGLIGIBLE = 1 / 64
# With several paths the order is best that is made for H - DESIGN_SHIFT * H * (1 - H); measured.
DESIGN_SHIFT = 0.125


def unreliable_first(log2_size: int, entropy_bin: int) -> Tensor:
    """The order in which u are sent: indices, those that are decided worst first.

    The same to the last bit on every machine: of float64 additions, multiplications, divisions,
    square roots and comparisons only, each on its own, and a stable sort.

    Args:
        log2_size: Of the block, from 8 to 16.
        entropy_bin: See :func:`entropy_bin_of`.

    Returns:
        int64 (N), shared by all who ask: not to be written to.
    """
    _check_log2_size(log2_size)
    if not 0 <= entropy_bin < NUM_BINS:
        raise ConfigError(f"entropy_bin={entropy_bin}: must be from 0 to {NUM_BINS - 1}")
    return _unreliable_first(log2_size, entropy_bin, torch.device("cpu"))


def entropy_bin_of(entropy: float) -> int:
    """The bin for a plane of which the receiver lacks ``entropy`` bits a bit.

    A bin is a mean of Gaussian LLRs, 2 ** (-5 + bin / 16); their variance is twice that.
    """
    wanted = entropy - DESIGN_SHIFT * entropy * (1 - entropy)
    return min(range(NUM_BINS), key=lambda each: abs(_entropy_of_bin(each) - wanted))


def bits_needed(log2_size: int, entropy: float, margin: float = 0.0) -> int:
    """How many u of a block to send, so that about one in 25 cannot be decoded, by four paths.

    A fit to what ``python -m bench.polar`` measured for blocks of 2**12 to 2**16: one in 10 to 100.

    Args:
        log2_size: Of the block, from 8 to 16.
        entropy: H of the plane, in [0, 1]; where it is an estimate, a little too much is better.
        margin: Of what is sent beyond H, the share to add: 0.1 halves the failures.

    Returns:
        A multiple of 8: from 0, where nothing is unknown, to N, where the plane had best be sent as
        it is.
    """
    _check_log2_size(log2_size)
    if not 0 <= entropy <= 1:
        raise ConfigError(f"entropy={entropy!r}: must be in [0, 1]")
    size = 1 << log2_size
    if size * entropy <= NEGLIGIBLE:
        return 0
    gap = GAP * 2 ** (-SHRINK * log2_size) * entropy**LOW * (1 - entropy) ** HIGH
    share = entropy + gap * (1 + margin)
    return size if share > 1 - LEAST_SAVING else 8 * math.ceil(size * share / 8)


def encode_plane(bits: Tensor, entropy_bin: int, count: int, *, first: int = 0) -> Tensor:
    """What is sent of blocks of a plane: ``count`` u of the order, from the ``first`` on.

    A block that is then asked for more sends ``encode_plane(..., more, first=count)``; joined along
    the bytes, it is what ``count + more`` would have given.

    Args:
        bits: uint8 (B, N) of zeros and ones, contiguous; not changed.
        entropy_bin: Of the order.
        count: u to send, a multiple of 8.
        first: u that were sent before, a multiple of 8.

    Returns:
        uint8 (B, count / 8), eight u a byte, the lowest bit first.
    """
    size = bits.shape[-1]
    if count % 8 or first % 8 or not 0 <= first <= first + count <= size:
        raise ConfigError(
            f"u [{first}, {first + count}) of {size}: must be multiples of 8 within the block"
        )
    u_BN = bits.clone()
    ops.polar_transform_(u_BN)
    order = _order_for(bits, entropy_bin)[first : first + count]
    u_BC8 = u_BN.index_select(1, order).view(len(bits), -1, 8)
    return (u_BC8 << _places(bits.device)).sum(dim=-1, dtype=torch.uint8)


def decode_plane(
    llr: Tensor, sent: Tensor, entropy_bin: int, *, paths: int = DEFAULT_PATHS
) -> Tensor:
    """Blocks of a plane from what was sent of them. Whether they are right, a checksum has to say.

    Args:
        llr: fp32 (B, N), contiguous: log P(0) - log P(1) of each bit, given the planes below.
        sent: uint8 (B, bytes), from :func:`encode_plane`, all from the first u on.
        entropy_bin: As it was encoded with.
        paths: See :func:`commrt.ops.polar_decode`.

    Returns:
        uint8 (B, N) of zeros and ones.

    Cost: extra memory of 6 + 6 * paths bytes a bit.
    """
    num_blocks, size = llr.shape
    if sent.dtype != torch.uint8 or sent.dim() != 2 or len(sent) != num_blocks:
        raise ConfigError(f"sent is {sent.dtype} {tuple(sent.shape)}: must be uint8 rows of llr")
    count = 8 * sent.shape[1]
    if count > size:
        raise ConfigError(f"sent has {count} u a block: must be at most {size}")
    order = _order_for(llr, entropy_bin)[:count]
    u_BC = (sent[:, :, None] >> _places(llr.device) & 1).view(num_blocks, count)
    values_BN = torch.zeros(llr.shape, dtype=torch.uint8, device=llr.device)
    values_BN.index_copy_(1, order, u_BC)
    known_N = torch.zeros(size, dtype=torch.uint8, device=llr.device)
    known_N[order] = 1
    log2_size = size.bit_length() - 1
    scratch = torch.empty(ops.polar_scratch(num_blocks, log2_size, paths), device=llr.device)
    bits_BN = torch.empty_like(values_BN)
    ops.polar_decode(llr, known_N, values_BN, bits_BN, scratch, paths=paths)
    return bits_BN


def plane_table(sigma: float, cell: float, length: int = TABLE) -> Tensor:
    """The table that :func:`commrt.ops.coset_llr` takes.

    Element i is of the middle t of the i-th of ``length`` parts of [0, 2): the log of the
    probability that an even multiple of the plane's place lies t below, over that of an odd one.

    Args:
        sigma: Standard deviation of the Gaussian error of a position, in places of the plane:
            ``s * 2**-plane``.
        cell: Width of what is rounded to one integer, in these: ``2**-plane``.
        length: A power of two.

    Returns:
        fp32 (length) on the CPU, finite whatever sigma.
    """
    even, odd = _log_masses(sigma, cell, length // 2)
    llr = (even - odd).clamp(-MOST_LLR, MOST_LLR).float()
    return torch.cat((llr, -llr))


def plane_entropy(sigma: float, cell: float) -> float:
    """Bits that are unknown of a bit of the plane; see :func:`plane_table` for the arguments."""
    even, odd = _log_masses(sigma, cell, TABLE // 2)
    either = torch.logaddexp(even, odd)
    of_bit = -sum((part - either).exp() * (part - either) for part in (even, odd)) / math.log(2)
    weight = (either - either.max()).exp()
    return min(1.0, float((weight * of_bit).sum() / weight.sum()))


def _log_masses(sigma: float, cell: float, length: int) -> tuple[Tensor, Tensor]:
    """Of even and of odd multiples, at ``length`` positions between 0 and 1."""
    if not (sigma > 0 and cell > 0):
        raise ConfigError(f"sigma={sigma!r}, cell={cell!r}: must be above 0")
    sigma = min(sigma, MOST_SIGMA)
    position_T = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    reach = 2 * math.ceil(4 * sigma + 1)
    multiple_M1 = torch.arange(-reach, reach + 1, 2, dtype=torch.float64)[:, None]
    even = _log_mass(multiple_M1 - position_T, sigma, cell).logsumexp(dim=0)
    return even, even.flip(0)  # odd ones lie as even ones do, seen from 1


def _log_mass(distance: Tensor, sigma: float, cell: float) -> Tensor:
    """Of a Gaussian in a cell whose middle is so far from its mean."""
    distance = -distance.abs()  # the lower tail, where differences are exact
    above: Tensor = torch.special.log_ndtr((distance + cell / 2) / sigma)
    below: Tensor = torch.special.log_ndtr((distance - cell / 2) / sigma)
    return above + torch.log(-torch.expm1(below - above))


@functools.cache
def _entropy_of_bin(entropy_bin: int) -> float:
    """Of a bit whose LLR is Gaussian, with the bin's mean."""
    mean = 2.0 ** (LEAST_LOG2_MEAN + entropy_bin / BINS_AN_OCTAVE)
    noise = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    weight = (-noise * noise / 2).exp()
    llr = mean + math.sqrt(2 * mean) * noise
    return float((weight * torch.nn.functional.softplus(-llr)).sum() / weight.sum()) / math.log(2)


def _mean_of_bin(entropy_bin: int) -> np.float64:
    """By square roots, which are the same everywhere, as powers are not."""
    root = np.float64(2.0)
    for _ in range(BINS_AN_OCTAVE.bit_length() - 1):
        root = np.sqrt(root)
    mean = np.float64(2.0**LEAST_LOG2_MEAN)
    for _ in range(entropy_bin):
        mean = mean * root
    return mean


def _of_sum(mean: np.ndarray) -> np.ndarray:
    """The mean of the LLR of the sum of two bits whose LLRs have this mean.

    m**2 / (m + k(m)), where k goes from 2 to 4 ln 2, its limits for bad and for good channels; in
    between it was fitted, to 2 % of the result, to the mean that keeps the entropy by Chung's
    reciprocal channel approximation.
    """
    above = 2.0 + mean * (1.675 + mean * 0.3062)
    below = 1.0 + mean * (0.4392 + mean * 0.11044)
    of_sum: np.ndarray = np.maximum(mean * mean / (mean + above / below), LEAST_MEAN)
    return of_sum


@functools.lru_cache(maxsize=64)
def _unreliable_first(log2_size: int, entropy_bin: int, device: torch.device) -> Tensor:
    mean = np.array([_mean_of_bin(entropy_bin)])
    for _ in range(log2_size):
        mean = np.stack((_of_sum(mean), mean + mean), axis=-1).reshape(-1)
    return torch.from_numpy(np.argsort(mean, kind="stable")).to(device)


def _order_for(blocks: Tensor, entropy_bin: int) -> Tensor:
    size = blocks.shape[-1]
    if size & (size - 1):
        raise ConfigError(f"blocks of {size} bits: must be a power of two")
    unreliable_first(size.bit_length() - 1, entropy_bin)
    return _unreliable_first(size.bit_length() - 1, entropy_bin, blocks.device)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _check_log2_size(log2_size: int) -> None:
    if not LEAST_LOG2 <= log2_size <= MOST_LOG2:
        raise ConfigError(f"log2_size={log2_size}: must be from {LEAST_LOG2} to {MOST_LOG2}")
