"""The job's optimizer and its learning rate schedule."""

from __future__ import annotations

import math
import typing
from typing import Any

import torch
from torch import nn

from commrt.optim import AdamMini, AdamW8bit, Adan, Lion, MoFO, StepOptimizer, offload
from commrt.optim.offloading.offload import Mode
from commrt.training.config import TrainConfig

_FINAL_SHARE = 0.1
_BETAS = (0.9, 0.95)
_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    # Of AdamW's rule, where its state is offloaded.
    "adamw": (AdamW8bit, {"betas": _BETAS, "momentum_dtype": "fp32"}),
    "adam-mini": (AdamMini, {"betas": _BETAS}),
    "adamw8": (AdamW8bit, {"betas": _BETAS}),
    "lion": (Lion, {}),
    "adan": (Adan, {}),
    "mofo": (MoFO, {"betas": _BETAS}),
}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Returns the rate of a step (from 0): linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (_FINAL_SHARE + (1 - _FINAL_SHARE) * cosine)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Makes an optimizer that decays matrices and leaves biases and norms alone.

    Args:
        model: As it is wrapped, so that it has the parameters that are trained.
        config: Says which optimizer.
    """
    matrices: list[tuple[str, nn.Parameter]] = []
    vectors: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        # By name, since FSDP1's parameters are flat.
        is_vector = name.endswith("bias") or ".norm_" in name or ".norm." in f".{name}"
        (vectors if is_vector else matrices).append((name, parameter))
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.optim == "adamw" and config.offload is None:
        return torch.optim.AdamW(groups, lr=config.lr, betas=_BETAS, fused=True)
    kind, options = _KINDS[config.optim]
    if config.momentum is not None:
        options = {**options, "momentum_dtype": config.momentum}
    optimizer: StepOptimizer = kind(
        groups,
        lr=config.lr,
        model=model,
        max_grad_norm=config.clip or None,
        seed=config.seed % 2**31,
        **options,
    )
    if config.offload is not None:
        mode = typing.cast(Mode, config.offload)
        offload(optimizer, mode, model=model, link_rate=config.link_rate)
    return optimizer
