"""No compression: ``"none"``, as a return leg the fp32 mean. No communication: ``"noop"``."""

import dataclasses

import torch
from torch import Tensor

from commrt import ops
from commrt.codecs.base import BlockwiseCodec, Window
from commrt.codecs.block import DEFAULT_BLOCK, BlockCodec
from commrt.errors import ConfigError
from commrt.ops.format import BLOCKS

FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactCodec(BlockwiseCodec):
    """Payloads are fp32 values; ``block`` only says in what units tensors are cut into shards."""

    block: int = DEFAULT_BLOCK

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ConfigError(f"block={self.block!r}: must be one of {BLOCKS}")

    @property
    def spec(self) -> str:
        """See :class:`Codec`."""
        return "none"

    def payload_bytes(self, num_blocks: int) -> int:
        """See :class:`Codec`."""
        return num_blocks * self.block * FLOAT_BYTES

    def encode(
        self, flat: Tensor, payload: Tensor, window: Window, *, residual: Tensor | None, seed: int
    ) -> None:
        """See :class:`Codec`; there is no residual. The padding of the last block is zero."""
        del residual, seed
        values = self._values(payload, window)
        part = self._part(flat, window)
        values[: part.numel()].copy_(part)
        values[part.numel() :].zero_()

    def decode(self, payload: Tensor, flat: Tensor, window: Window) -> None:
        """See :class:`Codec`."""
        part = self._part(flat, window)
        part.copy_(self._values(payload, window)[: part.numel()])

    def encode_average(self, payloads: Tensor, source: BlockwiseCodec, output: Tensor) -> None:
        """See :class:`Codec`. ``source`` is a block codec."""
        assert isinstance(source, BlockCodec)
        ops.decode_average(payloads, output.view(torch.float32), source.fmt)

    def _values(self, payload: Tensor, window: Window) -> Tensor:
        first = window.at_block * self.block
        return payload.view(torch.float32)[first : first + window.num_blocks * self.block]

    def _part(self, flat: Tensor, window: Window) -> Tensor:
        first = window.first_block * self.block
        return flat[first : first + window.num_blocks * self.block]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoopCodec(ExactCodec):
    """Nothing is sent and every rank keeps its own gradients: what a free network would give.

    A probe of the head-room, as torch's ``noop_hook``: models diverge, so never to train with.
    """

    @property
    def spec(self) -> str:
        """See :class:`Codec`."""
        return "noop"
