"""AdamW and its learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from commrt.training.config import TrainConfig

_FINAL_SHARE = 0.1


def learning_rate(step: int, config: TrainConfig) -> float:
    """Returns the rate of a step (from 0): linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (_FINAL_SHARE + (1 - _FINAL_SHARE) * cosine)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Makes an AdamW that decays matrices and leaves biases and norms alone."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # By name, since FSDP1's parameters are flat.
        is_vector = name.endswith("bias") or ".norm_" in name or ".norm." in f".{name}"
        (vectors if is_vector else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
