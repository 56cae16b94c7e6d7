"""What comes from a client, taken apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from commrt.errors import WireFormatError
from commrt.federated.layout import Layout
from commrt.federated.mbtc import coding, side
from commrt.federated.mbtc.coding import Coding
from commrt.federated.mbtc.parameters import (
    LEAST_STEP,
    MOST_STEP,
    NUM_CLASSES,
    Parameters,
    read_firsts,
)
from commrt.federated.mbtc.planes import Blocks
from commrt.federated.mbtc.requests import Wanted
from commrt.federated.mbtc.side import Sources
from commrt.federated.wire import HEAD_BYTES, Reader

if TYPE_CHECKING:
    from commrt.federated.mbtc.spec import Mbtc


class Received(NamedTuple):
    """An update, as far as it is decoded.

    Attributes:
        how: How it was coded.
        sources: What it was predicted from.
        alone: int16 (N,), the codes that were coded alone, and what fills the last point.
        blocks: The cosets of each group that has planes.
    """

    how: Coding
    sources: Sources
    alone: Tensor
    blocks: dict[int, Blocks]

    @property
    def largest(self) -> float:
        """No element of the update is larger, whatever is decoded."""
        return float(self.how.predicted.abs().max()) + self.how.step * (coding.MOST_CODE + 1)

    def codes(self, layout: Layout) -> Tensor:
        """All codes that are decoded, int16 (N,); zeros elsewhere."""
        if not self.blocks:
            return self.alone
        codes = self.alone.clone()
        for index, blocks in self.blocks.items():
            part = layout.groups[index].of(codes)
            filled = part[: blocks.codes.numel()].view_as(blocks.codes)
            filled[blocks.is_whole] = blocks.codes[blocks.is_whole]
        return codes

    def missing(self, layout: Layout) -> list[slice]:
        """The parts of the flat vector that are not decoded."""
        parts = []
        for index, blocks in self.blocks.items():
            for which in (~blocks.is_whole).nonzero()[:, 0].tolist():
                begin = layout.groups[index].begin + which * blocks.block
                parts.append(slice(begin, begin + blocks.block))
        return parts


def flags_of(payload: bytes) -> int:
    """The flags of a payload that has not been checked yet."""
    return payload[HEAD_BYTES] if len(payload) > HEAD_BYTES else 0


def read_update(
    body: bytes, codec: "Mbtc", layout: Layout, told: Parameters, sources: Sources, seed: int
) -> Received:
    """Take the body of an update apart.

    Args:
        body: See :mod:`commrt.federated.mbtc.coding`.
        codec: Its lattice, and the block of its cosets.
        layout: Of the update.
        told: What the client was told.
        sources: Those that the flags name.
        seed: Of the dither.

    Raises:
        WireFormatError: It cannot be decoded.
    """
    reader = Reader(body)
    step, tables = _read_head(reader, told, len(layout.groups))
    coefficients = side.unpack(reader, sources, len(layout.groups))
    predicted = side.prediction(layout, sources, coefficients)
    how = coding.coding(codec, layout, sources, predicted, tables, step, seed)
    blocks = {
        index: Blocks(reader, group.numel, planes, codec.block)
        for index, (group, planes) in enumerate(zip(layout.groups, told.planes, strict=True))
        if planes
    }
    parts = coding.coded_alone(layout, told.planes, codec.block)
    alone = how.decode(reader.take(reader.left), parts)
    return Received(how, sources, alone, blocks)


def read_answer(
    body: bytes, wanted: Sequence[Wanted], update: Received, layout: Layout
) -> list[bytes | Tensor]:
    """What a client answered: u of a plane, or the codes of a block.

    Raises:
        WireFormatError: It cannot be decoded.
    """
    reader, taken = Reader(body), list[bytes | Tensor]()
    for each in wanted:
        if not each.is_whole:
            taken.append(reader.take(each.num_bits // 8))
            continue
        size = update.blocks[each.group].block
        begin = layout.groups[each.group].begin + each.block * size
        (num_bytes,) = reader.unpack("I")
        rows = update.how.rows[begin : begin + size]
        codes = coding.read_codes(reader.take(int(num_bytes)), rows)
        if not update.blocks[each.group].has_check_of(each.block, codes):
            raise WireFormatError(f"block {each.block} of group {each.group} has another check")
        taken.append(codes)
    reader.end()
    return taken


def _read_head(reader: Reader, told: Parameters, num_groups: int) -> tuple[float, Tensor]:
    """The step and the tables that an update has."""
    (flags,) = reader.unpack("B")
    if not int(flags) & coding.CHOSEN:
        if told.tables is None or not told.step:
            raise WireFormatError("an update with no step and tables, of which none were told")
        return told.step, told.tables
    (step,) = reader.unpack("f")
    if not LEAST_STEP <= step <= MOST_STEP:
        raise WireFormatError(f"a step of {step}")
    firsts = read_firsts(reader, num_groups)
    return float(step), firsts[:, None].expand(-1, NUM_CLASSES).contiguous()
