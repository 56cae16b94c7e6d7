"""How a block of elements becomes bytes: the payload layout every op agrees on.

A payload of B blocks is ``codes | scales``, nothing else::

    codes    B * block * bits / 8 bytes   two's complement, see below
    scales   B * 2 bytes                  bfloat16, one a block

The codes of 32 consecutive elements lie together. At 1, 2 and 8 bits they are a little-endian bit
stream; at 4 bits, byte j holds element j in its low half and element j + 16 in its high half, which
saves vector units the shuffles of neighbours.

A tensor is cut into blocks from its first element; the last block is padded with zeros. A block
with an element that is not finite has a NaN scale, so that all of it decodes to NaN.
"""

import dataclasses

import torch

from commrt.errors import ConfigError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = (1, 2, 4, 8)
BLOCKS = (32, 64, 128, 256, 512, 1024)
LEVELS = ("absmax", "mean")
SCALE_BYTES = 2
# Of the layout above; ranks compare it before they talk.
PAYLOAD_VERSION = 1
# Weight of LoCo's old residual; nearer to one, what a residual of 8 bits takes in would round away.
MAX_BETA = 0.999


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockFormat:
    """Width, block size and level rule of a block-wise symmetric quantizer.

    Args:
        bits: Width of a code: 1, 2, 4 or 8. Codes are symmetric: +-1 at 1 bit, -1..1 at 2,
            -7..7 at 4, -127..127 at 8.
        block: Elements that share a scale, a power of two from 32 to 1024.
        levels: ``"absmax"`` puts the largest code on the block's largest magnitude; ``"mean"`` sets
            the level by a mean of magnitudes (1 and 2 bits only): at 2 bits the mean of those above
            0.7 times the mean of all (Li and Liu, "Ternary Weight Networks", 2016, eq. 6), at
            1 bit the mean of all (Rastegari et al., "XNOR-Net", 2016, eq. 6).

    Raises:
        ConfigError: For a value outside these.
    """

    bits: int
    block: int
    levels: str = "absmax"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits={self.bits!r}: must be one of {BITS}")
        if self.block not in BLOCKS:
            raise ConfigError(f"block={self.block!r}: must be one of {BLOCKS}")
        if self.levels not in LEVELS:
            raise ConfigError(f"levels={self.levels!r}: must be one of {LEVELS}")
        if self.levels == "mean" and self.bits > 2:
            raise ConfigError(f"levels='mean' with bits={self.bits}: only 1 and 2 bits have it")
        if self.levels == "absmax" and self.bits == 1:
            raise ConfigError("levels='absmax' with bits=1: one bit needs levels='mean'")

    @property
    def code_bytes(self) -> int:
        """Bytes of one block's codes."""
        return self.block * self.bits // 8

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in a payload, scale included."""
        return self.code_bytes + SCALE_BYTES

    @property
    def max_code(self) -> int:
        """The largest code."""
        return 1 if self.bits == 1 else (1 << (self.bits - 1)) - 1

    @property
    def mean_levels(self) -> bool:
        """Whether levels are set by the block's mean."""
        return self.levels == "mean"

    def num_blocks(self, numel: int) -> int:
        """Blocks that ``numel`` elements fill, the last perhaps in part."""
        return -(-numel // self.block)

    def payload_bytes(self, num_blocks: int) -> int:
        """Exact size of a payload of ``num_blocks`` blocks."""
        return num_blocks * self.block_bytes
