"""Adan: Nesterov momentum from differences of gradients."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from commrt.ops import StepOptions
from commrt.optim.base import Common, Params, StepOptimizer, moment_dtype
from commrt.optim.batches import Rows
from commrt.optim.parts import Part
from commrt.optim.sections import Layout
from commrt.optim.states import Forms

_MOMENTS = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")


class Adan(StepOptimizer):
    """Adan, with four moments: 16 bytes of state a parameter, or 4.06 with 8 bits.

    ::

        d = g - (the gradient before)
        m <- beta1 m + (1 - beta1) g;  n <- beta2 n + (1 - beta2) d
        v <- beta3 v + (1 - beta3) (g + beta2 d)^2
        w <- (w - lr (m' + beta2 n') / (sqrt(v') + eps)) / (1 + lr weight_decay)

    with m', n' and v' corrected for their bias. Betas are as in its authors' code; the paper's are
    1 - beta.

    Args:
        params: A model, or parameters, (name, parameter) pairs or groups of them.
        lr: Learning rate, a number or a scalar tensor; 5 to 10 times AdamW's in the paper.
        betas: Decay of gradients, of their differences, and of squares.
        eps: Added to the root, after bias correction.
        weight_decay: Decoupled.
        common: See :class:`commrt.optim.base.Common`.

    Raises:
        ConfigError: A value is out of range; names it and what is allowed.

    Source: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models", TPAMI 2024 (arXiv 2208.06677), algorithm 1.
    """

    _NUM_BETAS = 3
    _FORMS = Forms(
        {
            "exp_avg": "square",
            "exp_avg_diff": "square",
            "exp_avg_sq": "fourth",
            "previous_grad": "square",
        }
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            **common,
        )

    def _moments(self, layout: Layout) -> dict[str, torch.dtype]:
        chosen = moment_dtype(self.momentum_dtype, layout)
        square = chosen if chosen == torch.int8 else torch.float32
        return {name: square if name == "exp_avg_sq" else chosen for name in _MOMENTS}

    def _tensors(self, part: Part) -> Rows:
        for piece in part.layout.pieces:
            yield "adan_", piece, part.tensor(piece, _MOMENTS)

    def _options(self, group: dict[str, Any], step: int) -> StepOptions:
        (beta1, beta2, beta3), lr = group["betas"], float(group["lr"])
        return StepOptions(
            beta1=beta1,
            beta2=beta2,
            beta3=beta3,
            eps=group["eps"],
            decay=1 / (1 + lr * group["weight_decay"]),
            step_size=lr / (1 - beta1**step),
            difference_size=lr * beta2 / (1 - beta2**step),
            has_before=float(step > 1),
            root_correction=math.sqrt(1 - beta3**step),
            grad_scale=-1.0 if self.maximize else 1.0,
        )
