"""Reduce-scatter and all-gather of tensors that have an owner each, as sharded training has them.

A gradient makes one trip, to the rank that keeps that part of the parameter; a weight makes one
from there to everybody::

    gradients   encode -> all-to-all -> decode, average
    weights     encode own -> all-gather -> decode

Ranks: every rank of the group calls, in the same order, with the same codecs, shapes and owners.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from commrt.codecs import BlockwiseCodec, ExactCodec
from commrt.collectives.layout import owned
from commrt.collectives.reducer import Item, Reducer, Section, timed
from commrt.collectives.traffic import Traffic


class Scatterer(Protocol):
    """Brings each item's mean to its owner."""

    def reduce_scatter(self, items: Sequence[Item], traffic: Traffic) -> list[Tensor]:
        """The fp32 mean of each item that this rank owns, in their order.

        There is at least one item. The means are valid until the next call.
        """


@dataclasses.dataclass(frozen=True)
class ShardReducer:
    """Reduce-scatter and all-gather over one group; see :class:`Scatterer`.

    Args:
        reducer: Its codec is that of gradients, its gather codec that of weights. Small items that
            travel uncompressed travel together, so that none is padded to a block.

    Cost: each way (W - 1) / W of the payload sent per rank.
    """

    reducer: Reducer

    def reduce_scatter(self, items: Sequence[Item], traffic: Traffic) -> list[Tensor]:
        """See :class:`Scatterer`."""
        reducer = self.reducer
        message = _Message(items, reducer)
        send = reducer.encode(message.sections, traffic)
        received = reducer.exchange(send, message.sections, traffic)
        with timed(traffic, "codec_s"):
            means = reducer.average(received, message.sections)
            return message.of_owner(means, reducer.rank)

    def all_gather_(self, items: Sequence[Item], traffic: Traffic) -> None:
        """Overwrite every item with what its owner has, as all ranks decode it, itself too."""
        reducer = self.reducer
        message = _Message(items, reducer)
        own = reducer.encode_own(message.sections, traffic)
        gathered = reducer.spread(own, traffic)
        traffic.weight_bytes += own.numel() * (reducer.world_size - 1)
        with timed(traffic, "codec_s"):
            reducer.decode(gathered, message.sections)
            message.unpack()


@dataclasses.dataclass(frozen=True)
class TwoLevelScatterer:
    """A reduce-scatter over nodes of several ranks; see :class:`Scatterer`.

    Local rank l of a node first receives, from the ranks of its node, what the local ranks l of all
    nodes own, and averages it; only that mean is sent between nodes. Residuals are of it, so a rank
    keeps those of the items whose owners have its own local rank.

    Source: as :mod:`commrt.collectives.hierarchy`.

    Args:
        intra: Over the ranks of this node.
        inter: Over the ranks with this local rank, one a node.
        places: Of each owner: its node, in the order of ``inter``, and its local rank.
    """

    intra: ShardReducer
    inter: ShardReducer
    places: Sequence[tuple[int, int]]

    def reduce_scatter(self, items: Sequence[Item], traffic: Traffic) -> list[Tensor]:
        """See :class:`Scatterer`."""
        inside = Traffic()
        whole = [
            dataclasses.replace(item, residual=None, carry=None, owner=self.places[item.owner][1])
            for item in items
        ]
        means = self.intra.reduce_scatter(whole, inside)
        inside.keep_inside()
        traffic.add(inside)
        local_rank = self.intra.reducer.rank
        mine = [item for item in items if self.places[item.owner][1] == local_rank]
        if not mine:
            return []
        shares = [
            dataclasses.replace(item, tensor=mean, owner=self.places[item.owner][0])
            for item, mean in zip(mine, means, strict=True)
        ]
        return self.inter.reduce_scatter(shares, traffic)


class _Message:
    """Items as the sections of a message."""

    def __init__(self, items: Sequence[Item], reducer: Reducer) -> None:
        self._items = items
        exact = reducer.small or ExactCodec(block=reducer.codec.block)
        small = [item for item in items if item.is_small]
        self._joined: dict[int, Item] = {}
        if isinstance(exact, ExactCodec):
            self._joined = {owner: _join(small, owner) for owner in {i.owner for i in small}}
            small = list(self._joined.values())
        coded = [item for item in items if not item.is_small]
        self.sections = [_section(reducer.codec, reducer.gather, coded, reducer)]
        if small:
            self.sections.append(_section(exact, exact, small, reducer))

    def of_owner(self, pieces: Sequence[Tensor], rank: int) -> list[Tensor]:
        """From a tensor for each of a rank's pieces to one for each of its items, trimmed."""
        items = [item for item in self._items if item.owner == rank]
        num_coded = sum(not item.is_small for item in items)
        coded, small = iter(pieces[:num_coded]), iter(pieces[num_coded:])
        if rank in self._joined:
            sizes = [item.tensor.numel() for item in items if item.is_small]
            small = iter(pieces[-1][: sum(sizes)].split(sizes))
        return [next(small if item.is_small else coded)[: item.tensor.numel()] for item in items]

    def unpack(self) -> None:
        """Copy what was decoded of joined items to where they came from."""
        for owner, joined in self._joined.items():
            small = [item for item in self._items if item.is_small and item.owner == owner]
            sizes = [item.tensor.numel() for item in small]
            for item, values in zip(small, joined.tensor.split(sizes), strict=True):
                item.tensor.copy_(values)


def _join(small: Sequence[Item], owner: int) -> Item:
    """An owner's small items as one."""
    parts = [item.tensor for item in small if item.owner == owner]
    return Item(torch.cat(parts), 0, None, is_small=True, owner=owner)


def _section(
    codec: BlockwiseCodec, gather: BlockwiseCodec, items: Sequence[Item], reducer: Reducer
) -> Section:
    numels = tuple(item.tensor.numel() for item in items)
    owners = tuple(item.owner for item in items)
    return Section(codec, gather, items, owned(numels, owners, codec.block, reducer.world_size))
