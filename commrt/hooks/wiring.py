"""From settings to averagers: which codecs talk over which process groups."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist

from commrt.codecs import BlockwiseCodec, Codec, LowRankCodec, parse, with_block
from commrt.collectives import (
    Averager,
    GroupMaker,
    LegGroups,
    LowRankReducer,
    Reducer,
    TwoLevelReducer,
    check_gather,
)

Nodes = Sequence[Sequence[int]]
"""The (global) ranks of each node; without a hierarchy every rank is one."""


@dataclasses.dataclass(frozen=True)
class Codecs:
    """What each kind of traffic is coded with: the arguments of :class:`commrt.Comm`, checked."""

    codec: Codec
    gather: BlockwiseCodec
    intra: BlockwiseCodec
    small: BlockwiseCodec

    @classmethod
    def parse(cls, codec: str | Codec, **others: str | Codec) -> Self:
        """From spec strings; all take the block size of the first.

        Raises:
            ConfigError: Names the argument and what it may be.
        """
        first = parse(codec)
        return cls(
            first,
            **{
                name: check_gather(first, with_block(spec, first.block), name)
                for name, spec in others.items()
            },
        )

    def specs(self) -> dict[str, str]:
        """The canonical spec string of each."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name).spec for field in fields}


class Wiring:
    """The process groups of one model's communication, and the averagers over them.

    Args:
        codecs: What they send.
        nodes: Where each rank is.
        parent: All ranks.
        device: Where the tensors are.
        hold_zeros: Whether residuals of gradients of zeros are held back.

    Attributes:
        group: All ranks, on the reduce leg.
        averager: Of the parameters.

    Ranks: all of the parent.
    """

    def __init__(
        self,
        codecs: Codecs,
        nodes: Nodes,
        parent: dist.ProcessGroup,
        device: torch.device,
        hold_zeros: bool,
    ) -> None:
        maker = GroupMaker(parent, device)
        whole = maker.make(dist.get_process_group_ranks(parent))
        self._groups = [whole]
        self.group = whole.reduce
        if isinstance(codecs.codec, LowRankCodec):
            self.averager = _low_rank(codecs.codec, codecs, whole, hold_zeros)
        elif len(nodes[0]) > 1:
            self.averager = self._two_levels(codecs, nodes, maker, hold_zeros)
        else:
            assert isinstance(codecs.codec, BlockwiseCodec)
            self.averager = Reducer(
                codecs.codec, codecs.gather, whole.reduce, whole.gather, hold_zeros, codecs.small
            )

    averager: Averager

    def destroy(self) -> None:
        """Give up the groups. Ranks: all, with nothing under way."""
        for groups in self._groups:
            for group in {groups.reduce, groups.gather}:
                dist.destroy_process_group(group)

    def _two_levels(
        self, codecs: Codecs, nodes: Nodes, maker: GroupMaker, hold_zeros: bool
    ) -> Averager:
        assert isinstance(codecs.codec, BlockwiseCodec)
        node, local_rank = place(nodes)
        local = maker.make(node)
        peers = maker.make([node[local_rank] for node in nodes])
        self._groups += [local, peers]
        return TwoLevelReducer(
            intra=Reducer(
                codecs.intra, codecs.gather, local.reduce, local.gather, small=codecs.small
            ),
            inter=Reducer(
                codecs.codec, codecs.gather, peers.reduce, peers.gather, hold_zeros, codecs.small
            ),
        )


def place(nodes: Nodes) -> tuple[Sequence[int], int]:
    """The ranks of this rank's node, and which of them this one is."""
    node = next(node for node in nodes if dist.get_rank() in node)
    return node, node.index(dist.get_rank())


def _low_rank(codec: LowRankCodec, codecs: Codecs, whole: LegGroups, hold_zeros: bool) -> Averager:
    basis, values = codec.basis_codec, codec.values_codec
    return LowRankReducer(
        codec,
        basis=Reducer(basis, basis, whole.reduce, whole.reduce),
        values=Reducer(values, codecs.gather, whole.reduce, whole.gather, small=codecs.small),
        hold_zeros=hold_zeros,
    )
