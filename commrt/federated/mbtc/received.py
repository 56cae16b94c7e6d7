"""What comes from a client, taken apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from commrt.errors import WireFormatError
from commrt.federated.layout import Layout
from commrt.federated.mbtc import coding, side
from commrt.federated.mbtc.coding import Coding, Codings
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


class Frame(NamedTuple):
    """An update whose check is right.

    Attributes:
        body: See :mod:`commrt.federated.mbtc.coding`.
        told: What the client was told.
        sources: Those that the flags name.
        seed: Of the dither.
    """

    body: bytes
    told: Parameters
    sources: Sources
    seed: int


class Received(NamedTuple):
    """An update, as far as it is decoded, with others that were received at the same time.

    Attributes:
        place: Among these.
        all_how: How these were coded.
        all_codes: int16 (K, N) of these: the codes that were coded alone, and what fills the last
            points.
        has_own: Whether it was predicted from the client's own last update.
        blocks: The cosets of each group that has planes.
        largest: No element of the update is larger, whatever is decoded.
    """

    place: int
    all_how: Codings
    all_codes: Tensor
    has_own: bool
    blocks: dict[int, Blocks]
    largest: float

    @property
    def how(self) -> Coding:
        """How it was coded."""
        return self.all_how[self.place]

    @property
    def codes(self) -> Tensor:
        """int16 (N,), sharing memory with those of the others."""
        return self.all_codes[self.place]

    def settle_(self, layout: Layout) -> None:
        """Put what was decided of the cosets among the codes; zeros for the rest."""
        for index, blocks in self.blocks.items():
            part = layout.groups[index].of(self.codes)
            filled = part[: blocks.codes.numel()].view_as(blocks.codes)
            filled[blocks.is_whole] = blocks.codes[blocks.is_whole]

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


def read_updates(codec: "Mbtc", layout: Layout, frames: Sequence[Frame]) -> list[Received]:
    """Take updates apart.

    Args:
        codec: Its lattice, and the block of its cosets.
        layout: Of the updates.
        frames: The updates; all have the same previous one among their sources, or none has.

    Raises:
        WireFormatError: One cannot be decoded.
    """
    readers = [Reader(frame.body) for frame in frames]
    size = len(layout.groups)
    heads = [_read_head(*each, size) for each in zip(readers, frames, strict=True)]
    coefficients = [
        side.unpack(reader, frame.sources, size)
        for reader, frame in zip(readers, frames, strict=True)
    ]
    how = Codings(
        codec.lattice,
        layout,
        frames[0].sources.previous,
        [frame.sources.own for frame in frames],
        coefficients=np.stack(coefficients),
        tables=[tables for _, tables in heads],
        steps=[step for step, _ in heads],
        seeds=[frame.seed for frame in frames],
    )
    blocks = [
        {
            index: Blocks(reader, group.numel, planes, codec.block)
            for index, (group, planes) in enumerate(
                zip(layout.groups, frame.told.planes, strict=True)
            )
            if planes
        }
        for reader, frame in zip(readers, frames, strict=True)
    ]
    codes = _read_alone(codec, layout, how, frames, readers)
    largest = how.predicted.abs().amax(dim=1).tolist()
    return [
        Received(
            k,
            how,
            codes,
            frame.sources.own is not None,
            blocks[k],
            largest[k] + how.steps[k] * (coding.MOST_CODE + 1),
        )
        for k, frame in enumerate(frames)
    ]


def _read_alone(
    codec: "Mbtc",
    layout: Layout,
    how: Codings,
    frames: Sequence[Frame],
    readers: Sequence[Reader],
) -> Tensor:
    """The codes (K, N) that are not sent as cosets, zeros elsewhere."""
    payloads = [reader.take(reader.left) for reader in readers]
    if how.lattice == "z" and not any(any(frame.told.planes) for frame in frames):
        return coding.read_vectors(payloads, how.rows)
    codes = [
        how[k].decode(payload, coding.coded_alone(layout, frame.told.planes, codec.block))
        for k, (payload, frame) in enumerate(zip(payloads, frames, strict=True))
    ]
    return torch.stack(codes)


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


def _read_head(reader: Reader, frame: Frame, num_groups: int) -> tuple[float, Tensor]:
    """The step and the tables that an update has."""
    told = frame.told
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
