"""Block-wise symmetric quantizer at 1, 2, 4 or 8 bits: ``"block8"``, ``"block4:block=64"``."""

import dataclasses

from torch import Tensor

from commrt import ops
from commrt.codecs.base import BlockwiseCodec, Window
from commrt.errors import ConfigError
from commrt.ops import BlockFormat

DEFAULT_BLOCK = 128
ROUNDINGS = ("nearest", "stochastic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockCodec(BlockwiseCodec):
    """Quantise each block of a tensor with one scale.

    Payload: ``bits + 16 / block`` bits an element (4.125 at 4 bits in blocks of 128).
    Deterministic; with stochastic rounding a deterministic function of the seed, and unbiased when
    ``levels="absmax"``.

    Args:
        bits: 1, 2, 4 or 8.
        block: Elements that share a scale: a power of two from 32 to 1024.
        levels: ``"absmax"`` or ``"mean"``, see :class:`commrt.ops.BlockFormat`. Default: mean at 1
            and 2 bits, absmax above.
        rounding: ``"nearest"`` (even) or ``"stochastic"`` (2 bits and more).

    Raises:
        ConfigError: For a value outside these.
    """

    bits: int
    block: int = DEFAULT_BLOCK
    levels: str = ""
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if not self.levels:
            object.__setattr__(self, "levels", "mean" if self.bits in (1, 2) else "absmax")
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"rounding={self.rounding!r}: must be one of {ROUNDINGS}")
        if self.is_stochastic and self.bits == 1:
            raise ConfigError("rounding='stochastic' with bits=1: needs 2, 4 or 8 bits")
        object.__setattr__(
            self, "fmt", BlockFormat(bits=self.bits, block=self.block, levels=self.levels)
        )

    fmt: BlockFormat = dataclasses.field(init=False, repr=False, compare=False)

    @property
    def is_stochastic(self) -> bool:
        """Whether codes are rounded stochastically."""
        return self.rounding == "stochastic"

    @property
    def spec(self) -> str:
        """See :class:`Codec`."""
        return f"block{self.bits}:" + ",".join(self._options())

    def _options(self) -> list[str]:
        return [f"block={self.block}", f"levels={self.levels}", f"rounding={self.rounding}"]

    def payload_bytes(self, num_blocks: int) -> int:
        """See :class:`Codec`."""
        return self.fmt.payload_bytes(num_blocks)

    def encode(
        self, flat: Tensor, payload: Tensor, window: Window, *, residual: Tensor | None, seed: int
    ) -> None:
        """See :class:`Codec`; there is no residual."""
        del residual
        ops.block_encode(
            flat, payload, self.fmt, seed=seed if self.is_stochastic else None, **window._asdict()
        )

    def decode(self, payload: Tensor, flat: Tensor, window: Window) -> None:
        """See :class:`Codec`."""
        ops.block_decode(payload, flat, self.fmt, **window._asdict())

    def encode_average(self, payloads: Tensor, source: BlockwiseCodec, output: Tensor) -> None:
        """See :class:`Codec`. ``source`` is a block codec of the same block size."""
        assert isinstance(source, BlockCodec)
        ops.decode_average_encode(payloads, output, source.fmt, self.fmt)
