"""LoCo: block quantizer with moving-average error compensation: ``"loco4"``, ``"loco2:beta=0.9"``.

Source: Xie et al., "LoCo: Low-Bit Communication Adaptor for Large-scale Model Training", TPAMI 2025
(arXiv 2407.04480). Different from the paper: a scale per block instead of one global constant,
which needs no tuning, and no reset by default, since a reset drops what the residual still owes.
"""

import dataclasses

from torch import Tensor

from commrt import ops
from commrt.codecs.base import Window
from commrt.codecs.block import BlockCodec
from commrt.errors import ConfigError
from commrt.ops import BlockFormat
from commrt.ops.format import MAX_BETA


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocoCodec(BlockCodec):
    """Block quantizer that delays its error instead of dropping it.

    With residual e: h = g + e is sent as Q(h), then e <- beta e + (1 - beta)(h - Q(h)). Over any
    number of steps, sum of Q(h) + e / (1 - beta) = sum of g, up to the rounding of e in storage.

    Args:
        bits: As in :class:`BlockCodec`, and so ``block``, ``levels`` and ``rounding``.
        beta: Weight of the old residual, in [0, 1); 0 is classic error feedback. Default: 0.8, as
            the paper's code has it, at 4 and 8 bits; 0.95 at 1 and 2 bits, where the error is so
            large that releasing a fifth of it a step disturbs training (bench/results).
        residual: Bits of the stored residual: 8, or 4 (stochastically rounded) to save memory.
        reset: Zero the residual every this many steps, as in the paper (512); 0 never does.

    Cost: a residual of ``residual / 8 + 2 / block`` bytes an element on every rank.
    """

    beta: float = None  # type: ignore[assignment]  # by width, in __post_init__
    residual: int = 8
    reset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is None:
            object.__setattr__(self, "beta", 0.95 if self.bits in (1, 2) else 0.8)
        object.__setattr__(self, "beta", float(self.beta))
        if not 0.0 <= self.beta <= MAX_BETA:
            raise ConfigError(f"beta={self.beta!r}: must be in [0, 1), at most {MAX_BETA}")
        if self.residual not in (4, 8):
            raise ConfigError(f"residual={self.residual!r}: must be 4 or 8 bits")
        if self.reset < 0:
            raise ConfigError(f"reset={self.reset!r}: must be 0 (never) or a number of steps")

    @property
    def residual_fmt(self) -> BlockFormat:
        """See :class:`Codec`."""
        return BlockFormat(bits=self.residual, block=self.block)

    @property
    def spec(self) -> str:
        """See :class:`Codec`."""
        own = [f"beta={self.beta}", f"residual={self.residual}", f"reset={self.reset}"]
        return f"loco{self.bits}:" + ",".join(self._options() + own)

    def is_reset(self, step: int) -> bool:
        """Whether the residual is emptied before this step, counted from 0."""
        return self.reset > 0 and step > 0 and step % self.reset == 0

    def encode(
        self, flat: Tensor, payload: Tensor, window: Window, *, residual: Tensor | None, seed: int
    ) -> None:
        """See :class:`Codec`; the residual is needed, and updated in place."""
        assert residual is not None
        ops.loco_encode(
            flat,
            residual,
            payload,
            self.fmt,
            beta=self.beta,
            residual_bits=self.residual,
            stochastic=self.is_stochastic,
            seed=seed,
            **window._asdict(),
        )
