"""Low-rank factors at low bits, with one error memory around both: ``"lowrank8"`` (rank 8).

For links so slow that 4 bits an element are too many. A gradient matrix is sent as two thin
factors, found by one step of subspace iteration from the last step's basis, as PowerSGD does; the
factors travel as block codes, and what projection and codes together leave out stays in the
residual.

Source: Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019 (arXiv 1905.13727), algorithm 1. Different: coded factors; the residual
is what this rank's own codes left out, not its distance from the mean, so it does not grow with the
noise between ranks.
"""

import dataclasses

import torch
from torch import Tensor

from commrt.codecs.base import Codec, derive_seed
from commrt.codecs.block import DEFAULT_BLOCK, BlockCodec
from commrt.errors import ConfigError
from commrt.ops import BlockFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankCodec(Codec):
    """Send a matrix (m, n) as factors (m, r) and (r, n).

    Args:
        rank: r, at least 1.
        bits: Of the values, the factor (r, n): 1, 2, 4 or 8.
        basis: Bits of the basis, the factor (m, r).
        block: Elements that share a scale, along a row of a factor.

    Raises:
        ConfigError: For a value outside these.

    Cost: ``r (m * basis + n * bits) / (m n)`` bits an element; 8 m n r floating point operations;
    a residual of ``1 + 2 / block`` bytes an element on every rank (stored at 8 bits, stochastically
    rounded), and the basis, n r fp32 values.
    """

    rank: int
    bits: int = 8
    basis: int = 8
    block: int = DEFAULT_BLOCK

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank={self.rank!r}: must be an integer of at least 1")
        for bits in (self.bits, self.basis):
            BlockCodec(bits=bits, block=self.block)

    @property
    def spec(self) -> str:
        """See :class:`Codec`."""
        return f"lowrank{self.rank}:bits={self.bits},basis={self.basis},block={self.block}"

    @property
    def residual_fmt(self) -> BlockFormat:
        """See :class:`Codec`."""
        return BlockFormat(bits=8, block=self.block)

    @property
    def values_codec(self) -> BlockCodec:
        """Of the factor (r, n), which carries the values."""
        return BlockCodec(bits=self.bits, block=self.block)

    @property
    def basis_codec(self) -> BlockCodec:
        """Of the factor (m, r), of which only the span matters."""
        return BlockCodec(bits=self.basis, block=self.block)

    def is_finite(self, residual: Tensor) -> Tensor:
        """Whether all of a stored residual is finite, a scalar: other blocks have no scale."""
        first_scale = (
            residual.numel() // self.residual_fmt.block_bytes * self.residual_fmt.code_bytes
        )
        return residual[first_scale:].view(torch.bfloat16).isfinite().all()

    def pays(self, shape: torch.Size) -> bool:
        """Whether factors of this matrix have at most half its elements."""
        m, n = matrix_shape(shape)
        return 2 * self.rank * (m + n) <= m * n

    def new_basis(self, shape: torch.Size, name: str) -> Tensor:
        """Rows to begin with, (r, n), orthonormal, the same on every rank."""
        generator = torch.Generator().manual_seed(derive_seed("basis", name))
        _, n = matrix_shape(shape)
        return orthonormal(torch.rand(self.rank, n, generator=generator) - 0.5)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """A parameter as a matrix: its first dimension, and all the others."""
    return shape[0], shape.numel() // max(shape[0], 1)


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span, (r, n) with r <= n."""
    columns: Tensor = torch.linalg.qr(rows.T).Q
    return columns.T.contiguous()
