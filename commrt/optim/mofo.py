"""MoFO: AdamW that moves only the weights of largest momentum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops import StepOptions
from commrt.optim.adamw import MOMENTS, adam_options
from commrt.optim.base import MOMENTUM_DTYPES, Common, Params, StepOptimizer
from commrt.optim.batches import Rows
from commrt.optim.parts import Part
from commrt.optim.sections import Layout
from commrt.optim.states import Forms
from commrt.optim.totals import sum_over

# The bits of a magnitude, from above: the largest are found in three rounds.
_ROUNDS = ((20, 2048), (10, 1024), (0, 1024))
_CHUNK = 1 << 17  # elements that stay in the caches


class MoFO(StepOptimizer):
    """AdamW that in each step moves, of every tensor, the fraction of largest momentum.

    All other weights keep their bits, so that a fine-tuned model stays near the one it came from,
    and what changes can be sent sparse. The tensor is the whole one, in however many ranks it is;
    equal momenta are all in or all out.

    Args:
        params: A model, or parameters, (name, parameter) pairs or groups of them.
        lr: Learning rate, a number or a scalar tensor.
        betas: Decay of the first and the second moment.
        eps: Added to the root, after bias correction.
        weight_decay: Decoupled; of the weights that move.
        fraction: Of the elements of each tensor, in (0, 1]; rounded up.
        common: See :class:`commrt.optim.base.Common`.

    Ranks: all that share parameters must call ``step``; three all-reduces of at most 16 KiB a
    tensor, for those that several ranks have.

    Raises:
        ConfigError: A value is out of range; names it and what is allowed.

    Source: Chen et al., "MoFO: Momentum-Filtered Optimizer for Mitigating Forgetting in LLM
    Fine-Tuning" (arXiv 2407.20999), algorithm 1.
    """

    _FORMS = Forms({})
    _READS_MOMENTA = True
    _KEPT = (*StepOptimizer._KEPT, "fraction")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        fraction: float = 0.1,
        **common: Unpack[Common],
    ) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction={fraction}: must be in (0, 1]")
        momentum_dtype = common.get("momentum_dtype", "fp32")
        if momentum_dtype not in ("fp32", "bf16"):
            raise ConfigError(f"momentum_dtype={momentum_dtype!r}: must be fp32 or bf16")
        self.fraction = fraction
        self._thresholds: dict[Layout, Tensor] = {}
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            **common,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_thresholds": {}}

    def _moments(self, layout: Layout) -> dict[str, torch.dtype]:
        return {"exp_avg": MOMENTUM_DTYPES[self.momentum_dtype], "exp_avg_sq": torch.float32}

    def _prepare(
        self, groups: Sequence[tuple[dict[str, Any], Sequence[Part]]], grad_factor: Tensor | None
    ) -> None:
        """Find from which magnitude on the momenta of each tensor are the largest."""
        of_part = {
            part.layout: _Momentum(part, group["betas"][0], -1.0 if self.maximize else 1.0)
            for group, parts in groups
            for part in parts
        }
        for layouts in self._pools():
            momenta = [of_part.get(layout) for layout in layouts]
            found = _thresholds(layouts, momenta, grad_factor, self.fraction)
            for momentum, threshold in zip(momenta, found, strict=True):
                if momentum is not None:
                    self._threshold(momentum.part).copy_(threshold)

    def _threshold(self, part: Part) -> Tensor:
        """Where the kernel reads it."""
        place = self._thresholds.get(part.layout)
        if place is None or place.device != part.weights.device:
            place = self._thresholds[part.layout] = torch.zeros(1, device=part.weights.device)
        return place

    def _pools(self) -> Iterator[list[Layout]]:
        """The tensors of this rank alone, one after the other, and those of each set of ranks."""
        shared: dict[Any, list[Layout]] = {}
        for parameter in self._parameters():
            for layout in self._layouts[parameter]:
                if layout.shard.groups:
                    shared.setdefault((layout.shard.groups, parameter.device), []).append(layout)
                else:
                    yield [layout]
        yield from shared.values()

    def _tensors(self, part: Part) -> Rows:
        for piece in part.layout.pieces:
            yield "mofo_", piece, part.tensor(piece, MOMENTS, second=self._threshold(part))

    def _options(self, group: dict[str, Any], step: int) -> StepOptions:
        return adam_options(group, step, self.maximize)


class _Momentum:
    """A part's first moment after the step, with the roundings of the kernel."""

    def __init__(self, part: Part, beta1: float, grad_scale: float) -> None:
        self.part, self._grad_scale = part, grad_scale
        self._keep = torch.tensor(beta1, device=part.grad.device)

    def bits(self, grad_factor: Tensor | None) -> Iterator[Tensor]:
        """Of its magnitudes, int32: in the order of the magnitudes; some at a time."""
        scale = (
            self._grad_scale
            if grad_factor is None
            else self._grad_scale * grad_factor.to(self._keep.device)
        )
        share = (1 - self._keep) * scale
        for before, grad in zip(
            self.part.state("exp_avg").split(_CHUNK), self.part.grad.split(_CHUNK), strict=True
        ):
            moment = self._keep * before.float()
            yield moment.add_(share * grad.float()).abs_().view(torch.int32)


def _thresholds(
    layouts: Sequence[Layout],
    momenta: Sequence[_Momentum | None],
    grad_factor: Tensor | None,
    fraction: float,
) -> Iterator[Tensor]:
    """The least of the largest magnitudes of each tensor, fp32 (1,)."""
    device = next((m.part.grad.device for m in momenta if m is not None), torch.device("cpu"))
    wanted = [math.ceil(fraction * math.prod(layout.shard.shape)) for layout in layouts]
    left_L1 = torch.tensor(wanted, device=device)[:, None]
    found_L1 = torch.zeros_like(left_L1)
    for shift, bins in _ROUNDS:
        counts_LB = torch.zeros(len(layouts), bins, dtype=torch.int64, device=device)
        for i, momentum in enumerate(momenta):
            if momentum is not None:
                for bits in momentum.bits(grad_factor):
                    if shift < _ROUNDS[0][0]:
                        bits = bits[bits >> shift >> 10 == found_L1[i]]
                    counts_LB[i] += torch.bincount((bits >> shift) & (bins - 1), minlength=bins)
        sum_over(counts_LB, layouts[0].shard.groups)
        from_top_LB = counts_LB.flip(1).cumsum(1)
        place_L1 = (from_top_LB >= left_L1).int().argmax(dim=1, keepdim=True)
        bin_L1 = bins - 1 - place_L1
        left_L1 -= from_top_LB.gather(1, place_L1) - counts_LB.gather(1, bin_L1)
        found_L1 = found_L1 * bins + bin_L1
    yield from found_L1.to(torch.int32).view(torch.float32)
