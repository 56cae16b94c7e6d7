"""Fast Walsh-Hadamard transform, and random rotations made of it.

A rotated vector has nearly normal elements of equal variance whatever it was before, so that one
table of levels serves all. Source: Ailon and Chazelle, "The Fast Johnson-Lindenstrauss Transform",
SIAM J. Comput. 2009; Suresh et al., "Distributed Mean Estimation with Limited Communication", 2017.
"""

import functools
import math

import torch
from torch import Tensor

from commrt.codecs.base import derive_seed
from commrt.codecs.uniforms import random_signs

# Of random signs and a transform. After one, a vector of two spikes has two values only; after two,
# hardly any vector stands out. A spike in a short run is back where it was after one more.
_ROUNDS = 2
_ROUNDS_OF_RUNS = 3
# Elements transformed at a time, so that all passes but the first find them in cache.
_CHUNK = 1 << 17
_GOLDEN = (math.sqrt(5) - 1) / 2


def walsh_hadamard(rows: Tensor) -> Tensor:
    """Multiply each row by the Hadamard matrix (Sylvester's), scaled to be its own inverse.

    Only additions, in a fixed order, and one product: the same bits on every machine.

    Args:
        rows: float32 (B, K), K a power of two.

    Returns:
        A new tensor of the same shape.
    """
    num_rows, width = rows.shape
    output = torch.empty(num_rows, width)
    step = max(1, _CHUNK // width)
    for first in range(0, num_rows, step):
        output[first : first + step] = _transform(rows[first : first + step])
    return output.mul_(1 / math.sqrt(width))


def rotate(rows: Tensor, seed: int) -> Tensor:
    """Rotate each row at random; rows of any width, each by its own signs.

    Each of two rounds flips signs and transforms. Where the width is no power of two, there are
    three, of runs whose lengths are its binary digits, and after each of them elements are
    shuffled, so that each run feeds all.

    Args:
        rows: float32 (B, K).
        seed: In [0, 2**63).

    Returns:
        A new tensor of the same shape, each row as long (in L2) as it was.

    Cost: 2 log2(K) additions an element, or 3 log2(K), and a random bit a round.
    """
    shuffle = _shuffle(rows.shape[1])
    for turn in range(_num_rounds(shuffle)):
        rows = _transform_runs((rows.view(-1) * _signs(rows, seed, turn)).view(rows.shape))
        rows = rows if shuffle is None else rows[:, shuffle]
    return rows


def unrotate(rows: Tensor, seed: int) -> Tensor:
    """Undo :func:`rotate`: its inverse is its transpose."""
    shuffle = _shuffle(rows.shape[1])
    for turn in reversed(range(_num_rounds(shuffle))):
        if shuffle is not None:
            rows = torch.empty_like(rows).index_copy_(1, shuffle, rows)
        rows = _transform_runs(rows)
        rows = (rows.view(-1) * _signs(rows, seed, turn)).view(rows.shape)
    return rows


def _num_rounds(shuffle: Tensor | None) -> int:
    return _ROUNDS if shuffle is None else _ROUNDS_OF_RUNS


def _signs(rows: Tensor, seed: int, turn: int) -> Tensor:
    return random_signs(derive_seed(seed, turn), rows.numel())


def _transform_runs(rows: Tensor) -> Tensor:
    """Transform the runs of each row whose lengths are the binary digits of the width."""
    width = rows.shape[1]
    runs = [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
    if len(runs) == 1:
        return walsh_hadamard(rows)
    return torch.cat([walsh_hadamard(run) for run in rows.split(runs, dim=1)], dim=1)


@functools.lru_cache(maxsize=8)
def _shuffle(width: int) -> Tensor | None:
    """Where each element comes from: steps of the golden section, which spread any run evenly."""
    if width & (width - 1) == 0:
        return None
    stride = int(width * _GOLDEN)
    while math.gcd(stride, width) != 1:
        stride += 1
    return torch.arange(width) * stride % width


def _transform(rows: Tensor) -> Tensor:
    """Not scaled. As a square of about sqrt(K), so that no pass has a short inner loop."""
    num_rows, width = rows.shape
    inner = 1 << (width.bit_length() // 2)
    square = _butterflies(rows.reshape(num_rows, width // inner, inner))
    square = _butterflies(square.transpose(1, 2).contiguous())
    return square.transpose(1, 2).reshape(num_rows, width)


def _butterflies(source: Tensor) -> Tensor:
    """Transform over the middle dimension."""
    num_rows, length, inner = source.shape
    target = torch.empty_like(source)
    reach = 1
    while reach < length:
        shape = (num_rows, length // (2 * reach), 2, reach * inner)
        pairs, results = source.view(shape), target.view(shape)
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=results[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=results[:, :, 1])
        source, target = target, (torch.empty_like(source) if reach == 1 else source)
        reach *= 2
    return source
