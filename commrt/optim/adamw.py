"""AdamW with moments of 8 bits."""

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

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(StepOptimizer):
    """AdamW whose two moments have 8 bits each: 2.03 bytes of state a parameter for AdamW's 8.

    What is left of Adam-mini's saving if every weight keeps a learning rate of its own. Momentum is
    coded by the square of the code, the second moment by its fourth power, both with a scale for
    256 elements of a row; small parameters and vectors keep fp32.

    Args:
        params: A model, or parameters, (name, parameter) pairs or groups of them.
        lr: Learning rate, a number or a scalar tensor.
        betas: Decay of the first and the second moment.
        eps: Added to the root, after bias correction.
        weight_decay: Decoupled.
        common: See :class:`commrt.optim.base.Common`; ``momentum_dtype`` is "int8" if not said
            otherwise. With "bf16" the second moment is fp32.

    Raises:
        ConfigError: A value is out of range; names it and what is allowed.

    Cost: 2.03 bytes of state a parameter; 16 bytes a step and parameter from and to memory.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022 (arXiv
    2110.02861), with powers of the code in place of their table.
    """

    _FORMS = Forms({"exp_avg": "square", "exp_avg_sq": "fourth"})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **common: Unpack[Common],
    ) -> None:
        common.setdefault("momentum_dtype", "int8")
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            **common,
        )

    def _moments(self, layout: Layout) -> dict[str, torch.dtype]:
        first = moment_dtype(self.momentum_dtype, layout)
        return {"exp_avg": first, "exp_avg_sq": first if first == torch.int8 else torch.float32}

    def _tensors(self, part: Part) -> Rows:
        for piece in part.layout.pieces:
            yield "adamw_", piece, part.tensor(piece, MOMENTS)

    def _options(self, group: dict[str, Any], step: int) -> StepOptions:
        return adam_options(group, step, self.maximize)


def adam_options(group: dict[str, Any], step: int, maximize: bool) -> StepOptions:
    """Adam's coefficients in step number ``step``, from 1."""
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    return StepOptions(
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        decay=1 - lr * group["weight_decay"],
        step_size=lr / (1 - beta1**step),
        root_correction=math.sqrt(1 - beta2**step),
        grad_scale=-1.0 if maximize else 1.0,
    )
