"""The two legs of a low-rank all-reduce.

With h = gradient + residual (m, n) and the rows B of the last basis (r, n), both known to a rank::

    reduce leg   P <- mean over ranks of B h^T      (r, m), coded
                 U <- orthonormal rows of P         the same on every rank
                 V <- U h                           (r, n), coded, sent to its owners
                 residual <- h - U^T (V as coded)
    gather leg   V <- mean over ranks of V;  result U^T V;  B <- orthonormal rows of V

The projection is linear and U is everybody's, so the mean of what was sent is the result, and the
residuals hold the rest: nothing is lost but the rounding of the returning mean.

Ranks must compute U and the result to the same bits, so they need the same kind of processor and
build of torch, and as many threads.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from commrt.codecs import LowRankCodec, matrix_shape, orthonormal
from commrt.collectives.reducer import Item, Reducer, has_elements, timed, update_
from commrt.collectives.traffic import Traffic


class Sent(NamedTuple):
    """What the gather leg needs of the reduce leg."""

    received: Tensor
    bases: list[Tensor]
    values: list[Tensor]


@dataclasses.dataclass(frozen=True)
class LowRankReducer:
    """The mean of matrices over one group; see :class:`Averager`.

    Args:
        codec: Of the matrices.
        basis: Averages P, on the reduce leg.
        values: Averages V, its gather leg on the gather leg.
        hold_zeros: Send nothing of the residual of a tensor of zeros, and leave it as it was.
    """

    codec: LowRankCodec
    basis: Reducer
    values: Reducer
    hold_zeros: bool = False

    def reduce_leg(self, items: Sequence[Item], traffic: Traffic) -> Sent:
        """See :class:`Averager`. Overwrites fp32 tensors."""
        small = [item for item in items if item.is_small]
        items = [item for item in items if not item.is_small]
        used = [not self.hold_zeros or has_elements(item.tensor) for item in items]
        with timed(traffic, "codec_s"):
            pairs = zip(items, used, strict=True)
            matrices = [self._compensated(item, is_used) for item, is_used in pairs]
            spans = [_basis(item) @ matrix.T for item, matrix in zip(items, matrices, strict=True)]
        if items:
            rows = self._rows(spans, items)
            received = self.basis.reduce_leg(rows, traffic)
            self.basis.gather_leg(received, rows, traffic)
        with timed(traffic, "codec_s"):
            bases = [orthonormal(span) for span in spans]
            values = [basis @ matrix for basis, matrix in zip(bases, matrices, strict=True)]
        sections = self.values.sections([*self._rows(values, items), *small])
        send = self.values.encode(sections, traffic)
        with timed(traffic, "codec_s"):
            self.values.decode_sent(send, sections)
            parts = zip(items, used, matrices, bases, values, strict=True)
            for item, is_used, matrix, basis, sent in parts:
                if is_used is not False:
                    self._keep(item, matrix.addmm_(basis.T, sent, alpha=-1), is_used)
        return Sent(self.values.exchange(send, sections, traffic), bases, values)

    def gather_leg(self, received: Sent, items: Sequence[Item], traffic: Traffic) -> None:
        """See :class:`Averager`."""
        small = [item for item in items if item.is_small]
        items = [item for item in items if not item.is_small]
        rows = self._rows(received.values, items)
        self.values.gather_leg(received.received, [*rows, *small], traffic)
        with timed(traffic, "codec_s"):
            for item, basis, mean in zip(items, received.bases, received.values, strict=True):
                output = _matrix(item)
                if output.dtype == mean.dtype:
                    torch.mm(basis.T, mean, out=output)
                else:
                    output.copy_(basis.T @ mean)
                is_useful = mean.isfinite().all() & mean.any()
                update_(_basis(item), orthonormal(mean), is_useful)

    def _compensated(self, item: Item, is_used: Tensor | bool) -> Tensor:
        matrix = _matrix(item).float()
        if is_used is not False:
            assert item.residual is not None
            scratch = self.values.scratch.take("error", 4 * matrix.numel(), matrix.device)
            error = scratch.view(torch.float32)
            self.codec.decode_residual(item.residual, error)
            if is_used is not True:
                error.mul_(is_used)
            matrix.add_(error.view_as(matrix))
            if item.carry is not None:
                matrix.add_(item.carry.view_as(matrix) * is_used)
        return matrix

    def _keep(self, item: Item, error: Tensor, is_used: Tensor | bool) -> None:
        """Store the residual; one that is not finite leaves the former as it was."""
        assert item.residual is not None
        stored = self.values.scratch.take("stored", item.residual.numel(), error.device)
        self.codec.encode_residual(error.view(-1), stored, item.seed)
        is_kept = self.codec.is_finite(stored) & is_used
        update_(item.residual, stored, is_kept)
        if item.carry is not None:
            update_(item.carry, torch.zeros_like(item.carry), is_kept)

    def _rows(self, factors: Sequence[Tensor], items: Sequence[Item]) -> list[Item]:
        """The factors as items, a row each where blocks would straddle rows."""
        rows = []
        for factor, item in zip(factors, items, strict=True):
            is_whole = factor.shape[1] % self.codec.block == 0
            parts = [factor.view(-1)] if is_whole else list(factor)
            rows += [Item(part, item.seed, None) for part in parts]
        return rows


def _matrix(item: Item) -> Tensor:
    assert item.shape is not None
    return item.tensor.view(matrix_shape(item.shape))


def _basis(item: Item) -> Tensor:
    assert item.basis is not None
    return item.basis
