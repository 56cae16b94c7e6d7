"""What the collectives ask of a codec."""

import abc
import hashlib
import operator
from typing import NamedTuple

from torch import Tensor

from commrt import ops
from commrt.ops import BlockFormat

_PLAIN = frozenset((int, str))


class Window(NamedTuple):
    """Blocks ``[first_block, first_block + num_blocks)`` of a tensor, ``at_block`` of a payload."""

    first_block: int
    num_blocks: int
    at_block: int


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) for stochastic rounding, the same for the same parts on any machine."""
    digest = hashlib.blake2b(told(parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def told(parts: tuple[int | str, ...]) -> bytes:
    """Numbers, of any kind that is whole, and words: the same bytes for the same ones."""
    if not _PLAIN.issuperset(map(type, parts)):
        parts = tuple(part if isinstance(part, str) else operator.index(part) for part in parts)
    return repr(parts).encode()


class Codec(abc.ABC):
    """How tensors are sent.

    Codecs are immutable and hold no state: an encoder with memory keeps it in the residual that its
    caller passes in, so the caller decides what a residual belongs to and saves it.
    """

    block: int
    """Elements in a block."""
    beta: float = 0.0
    """Weight of the old residual when it is updated."""

    @property
    @abc.abstractmethod
    def spec(self) -> str:
        """The canonical spec string, which ``parse`` turns into a codec that sends the same."""

    @property
    def residual_fmt(self) -> BlockFormat | None:
        """Format of the stored residual, itself a payload; None for a codec without memory."""
        return None

    def residual_bytes(self, numel: int) -> int:
        """Size of the residual of a tensor of ``numel`` elements; 0 for a codec without memory."""
        fmt = self.residual_fmt
        return fmt.payload_bytes(fmt.num_blocks(numel)) if fmt else 0

    def decode_residual(self, residual: Tensor, flat: Tensor) -> None:
        """Write a stored residual e into ``flat``."""
        assert self.residual_fmt is not None
        ops.block_decode(residual, flat, self.residual_fmt)

    def encode_residual(self, flat: Tensor, residual: Tensor, seed: int) -> None:
        """Store ``flat`` as a residual, rounded stochastically, so that no rounding adds up."""
        assert self.residual_fmt is not None
        ops.block_encode(flat, residual, self.residual_fmt, seed=seed)

    def rescale_residual(self, residual: Tensor, ratio: Tensor) -> None:
        """Multiply a stored residual by ``ratio``, see :func:`commrt.ops.rescale_`."""
        assert self.residual_fmt is not None
        ops.rescale_(residual, ratio, self.residual_fmt)


class BlockwiseCodec(Codec):
    """Turns blocks of flat tensors into payloads and back."""

    @abc.abstractmethod
    def payload_bytes(self, num_blocks: int) -> int:
        """Exact size of a payload of ``num_blocks`` blocks."""

    @abc.abstractmethod
    def encode(
        self, flat: Tensor, payload: Tensor, window: Window, *, residual: Tensor | None, seed: int
    ) -> None:
        """Encode a window of ``flat`` into ``payload`` (uint8) and update ``residual``, if any."""

    @abc.abstractmethod
    def decode(self, payload: Tensor, flat: Tensor, window: Window) -> None:
        """Decode a window of ``payload`` into ``flat``."""

    @abc.abstractmethod
    def encode_average(self, payloads: Tensor, source: "BlockwiseCodec", output: Tensor) -> None:
        """Average the rows of ``payloads`` (R, bytes) of codec ``source`` and encode the mean."""

    def num_blocks(self, numel: int) -> int:
        """Blocks that ``numel`` elements fill, the last perhaps in part."""
        return -(-numel // self.block)
