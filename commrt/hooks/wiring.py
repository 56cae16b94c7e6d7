"""From settings to averagers: which codecs talk over which process groups."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.distributed as dist

from commrt.codecs import (
    BlockwiseCodec,
    Codec,
    DeltaCodec,
    ExactCodec,
    LowRankCodec,
    parse,
    with_block,
)
from commrt.collectives import (
    Averager,
    GroupMaker,
    LegGroups,
    LowRankReducer,
    Reducer,
    Scatterer,
    ShardReducer,
    Traffic,
    TwoLevelReducer,
    TwoLevelScatterer,
    check_gather,
    give_back,
)
from commrt.errors import ConfigError

Nodes = Sequence[Sequence[int]]
"""The (global) ranks of each node; without a hierarchy every rank is one."""


@dataclasses.dataclass(frozen=True)
class Codecs:
    """What each kind of traffic is coded with, checked.

    Attributes:
        codec: Gradients, to their owners.
        gather: Their mean, back to everybody.
        intra: Gradients inside a node.
        small: Gradients of small parameters.
        weights: The weights of a sharded model.
    """

    codec: Codec
    gather: BlockwiseCodec
    intra: BlockwiseCodec
    small: BlockwiseCodec
    weights: Codec

    @classmethod
    def parse(cls, codec: str | Codec, *, weights: str | Codec = "none", **others: Any) -> Self:
        """From spec strings; all take the block size of the first.

        Raises:
            ConfigError: Names the argument and what it may be.
        """
        first = parse(codec)
        if isinstance(first, DeltaCodec):
            raise ConfigError(f"codec={first.spec!r}: only gather= of a sharded model takes it")
        second = with_block(weights, first.block)
        if not isinstance(second, DeltaCodec):
            check_gather(first, second)
        plain = {
            name: check_gather(first, with_block(spec, first.block), name)
            for name, spec in others.items()
        }
        return cls(first, **plain, weights=second)

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

    def give_back(self) -> None:
        """Give the groups back. Ranks: all, with nothing under way."""
        for groups in self._groups:
            for group in dict.fromkeys((groups.reduce, groups.gather)):
                give_back(group)

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


LANES = 2
"""On a CPU units take turns on as many threads: while one encodes or decodes, the other sends."""


class ShardWiring:
    """The process groups of a sharded model's units that share them, and what runs over them.

    Args:
        codecs: What they send.
        shards: Group of the ranks that have a shard each.
        nodes: Where each of them is.
        replicas: Group of the ranks that have the same shard, with hybrid sharding.
        device: Where the tensors are.

    Attributes:
        group: The ranks with a shard each, for gradients.
        gather_group: The same, for weights.
        ranks: Theirs, in the default group.
        scatterer: Brings gradients to their owners; None where they go uncompressed.
        gatherer: Brings weights to everybody, likewise.
        replica_group: The ranks with the same shard, for gradients.
        averager: Of a shard's gradient over its replicas.
        reduce_traffic: Sent by reduce-scatters and reduce legs.
        return_traffic: Sent by gather legs between replicas, which have a thread of their own.
        weight_traffic: Sent by gathers of weights, likewise.

    Ranks: all of the parent.
    """

    scatterer: Scatterer | None = None
    gatherer: ShardReducer | None = None
    replica_group: dist.ProcessGroup | None = None
    averager: Averager | None = None

    def __init__(
        self,
        codecs: Codecs,
        shards: dist.ProcessGroup,
        nodes: Nodes,
        replicas: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        maker = GroupMaker(shards, device)
        self.ranks = dist.get_process_group_ranks(shards)
        self.reduce_traffic, self.return_traffic = Traffic(), Traffic()
        self.weight_traffic = Traffic()
        self.group, self.gather_group = maker.make_lanes(self.ranks, 2)
        self._groups = [self.group, self.gather_group]
        codec = codecs.codec
        assert isinstance(codec, BlockwiseCodec)
        weights = codecs.weights
        if isinstance(weights, DeltaCodec):
            weights = weights.differences
        if not isinstance(weights, ExactCodec):
            assert isinstance(weights, BlockwiseCodec)
            group = self.gather_group
            self.gatherer = ShardReducer(Reducer(weights, weights, group, group))
        if replicas is not None:
            others = GroupMaker(replicas, device).make(dist.get_process_group_ranks(replicas))
            self._groups += [others.reduce, others.gather]
            self.replica_group = others.reduce
            if not isinstance(codec, ExactCodec):
                self.averager = Reducer(
                    codec,
                    codecs.gather,
                    others.reduce,
                    others.gather,
                    hold_zeros=True,
                    small=codecs.small,
                )
            if not isinstance(codecs.intra, ExactCodec):
                self.scatterer = _shard_reducer(codecs.intra, codecs, self.group)
        elif isinstance(codec, ExactCodec):
            return
        elif len(nodes[0]) > 1:
            self.scatterer = self._two_levels(codec, codecs, nodes, maker)
        else:
            self.scatterer = _shard_reducer(codec, codecs, self.group)

    def give_back(self) -> None:
        """Give the groups back. Ranks: all, with nothing under way."""
        for group in dict.fromkeys(self._groups):
            give_back(group)

    def _two_levels(
        self, codec: BlockwiseCodec, codecs: Codecs, nodes: Nodes, maker: GroupMaker
    ) -> Scatterer:
        node, local_rank = place(nodes)
        (local,) = maker.make_lanes(node, 1)
        (peers,) = maker.make_lanes([node[local_rank] for node in nodes], 1)
        self._groups += [local, peers]
        places: dict[int, tuple[int, int]] = {}
        for number in range(len(node)):
            same = sorted(node[number] for node in nodes)  # as torch numbers ranks in groups
            places |= {rank: (place, number) for place, rank in enumerate(same)}
        return TwoLevelScatterer(
            intra=_shard_reducer(codecs.intra, codecs, local),
            inter=_shard_reducer(codec, codecs, peers),
            places=[places[rank] for rank in self.ranks],
        )


def _shard_reducer(codec: BlockwiseCodec, codecs: Codecs, group: dist.ProcessGroup) -> ShardReducer:
    exact = ExactCodec(block=codec.block)
    # FSDP2 sends zeros for parameters that were not used, and zeros are to come back.
    return ShardReducer(Reducer(codec, exact, group, group, hold_zeros=True, small=codecs.small))


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
