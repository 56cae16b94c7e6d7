"""Low-bit differences of weights: ``"delta4"``, for gathers of weights that stay gathered.

Every rank keeps the weights as they were decoded last. An owner sends how far its own have moved
from there, as block codes, and everybody adds that; what the codes left out is part of the next
difference, so nothing is lost and no other error memory is needed.

Source: Jia et al., "SDP4Bit: Toward 4-bit Communication Quantization in Sharded Data Parallelism
for LLM Training", NeurIPS 2024 (arXiv 2410.15526), section 3.1 (qWD).
"""

import dataclasses

from commrt.codecs.base import Codec
from commrt.codecs.block import DEFAULT_BLOCK, BlockCodec


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaCodec(Codec):
    """Send weights as differences to what was sent before.

    Args:
        bits: Of the differences: 2, 4 or 8.
        block: Elements that share a scale.

    Cost: ``bits + 16 / block`` bits an element and gather, and the gathered weights in memory, on
    every rank, all the time.

    Raises:
        ConfigError: For a value outside these.
    """

    bits: int
    block: int = DEFAULT_BLOCK

    def __post_init__(self) -> None:
        object.__setattr__(self, "differences", BlockCodec(bits=self.bits, block=self.block))

    differences: BlockCodec = dataclasses.field(init=False, repr=False, compare=False)

    @property
    def spec(self) -> str:
        """See :class:`Codec`."""
        return f"delta{self.bits}:block={self.block}"
