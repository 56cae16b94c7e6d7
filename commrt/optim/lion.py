"""Lion: the sign of the momentum."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from commrt.ops import StepOptions
from commrt.optim.base import Common, Params, StepOptimizer, moment_dtype
from commrt.optim.batches import Rows
from commrt.optim.parts import Part
from commrt.optim.sections import Layout
from commrt.optim.states import Forms


class Lion(StepOptimizer):
    """Lion, whose only state is a momentum: 4 bytes a parameter, or 1.02 with 8 bits.

    ::

        w <- (1 - lr weight_decay) w - lr sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g

    Args:
        params: A model, or parameters, (name, parameter) pairs or groups of them.
        lr: Learning rate, a number or a scalar tensor; the paper's are 3 to 10 times smaller than
            AdamW's, with as much larger a decay.
        betas: Of the update, and of the momentum.
        weight_decay: Decoupled.
        common: See :class:`commrt.optim.base.Common`.

    Raises:
        ConfigError: A value is out of range; names it and what is allowed.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023 (arXiv
    2302.06675), program 1.
    """

    _FORMS = Forms({"exp_avg": "square"})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
            **common,
        )

    def _moments(self, layout: Layout) -> dict[str, torch.dtype]:
        return {"exp_avg": moment_dtype(self.momentum_dtype, layout)}

    def _tensors(self, part: Part) -> Rows:
        for piece in part.layout.pieces:
            yield "lion_", piece, part.tensor(piece, ("exp_avg",))

    def _options(self, group: dict[str, Any], step: int) -> StepOptions:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        return StepOptions(
            beta1=beta1,
            beta2=beta2,
            decay=1 - lr * group["weight_decay"],
            step_size=lr,
            grad_scale=-1.0 if self.maximize else 1.0,
        )
