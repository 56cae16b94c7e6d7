"""A byte-level GPT: pre-norm blocks, learned positions, causal attention, tied input and output.

Tokens are bytes, so the vocabulary has 256 entries and no tokenizer is needed. The output layer
is the transposed embedding (tied), as in GPT-2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commrt.training.config import ModelConfig

VOCAB_SIZE = 256
_INIT_STD = 0.02


class Block(nn.Module):
    """Attention and a 4x wide feed-forward part, each after a layer norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm_feed_forward = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps activations (batch, time, dim) to the same shape."""
        attended: Tensor = self.project(self._attend(self.norm_attention(x)))
        x = x + attended
        fed_forward: Tensor = self.down(F.gelu(self.up(self.norm_feed_forward(x))))
        return x + fed_forward

    def _attend(self, x: Tensor) -> Tensor:
        batch, time, dim = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, time, dim)


class GPT(nn.Module):
    """The model of the reference job.

    Weights are drawn from torch's global generator: seed it for a reproducible start.

    Args:
        config: Width, depth, heads and the longest sequence.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, config.dim)
        self.positions = nn.Parameter(torch.empty(config.seq_len, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self._reset(config.num_layers)

    def _reset(self, num_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(("project.weight", "down.weight")):
                # Each block adds twice to the residual stream: this keeps its variance.
                nn.init.normal_(parameter, std=_INIT_STD / (2 * num_layers) ** 0.5)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=_INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predicts each next byte.

        Args:
            tokens: int64 (batch, time), values 0-255, time at most ``config.seq_len``.

        Returns:
            Logits (batch, time, 256); those at time t depend on ``tokens[:, : t + 1]`` alone.
        """
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


def next_byte_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of every byte in nats, shaped like ``targets`` (batch, time)."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
