"""The two legs over two levels: full precision or 8 bits inside a node, low bits between nodes.

Every local rank owns a share of each tensor's blocks, whatever the bucket. It averages its share
over its node, and only the node's mean is sent between nodes, by :class:`Reducer` over the ranks
that own the same share on every node. The payloads that return are passed on inside the node as
they are, so every rank decodes the same bits::

    node:    encode -> all-to-all -> average                         all-gather -> decode
    between:                          encode -> all-to-all -> average -> all-gather

Source: Wang et al., "ZeRO++: Extremely Efficient Collective Communication for Giant Model
Training", 2023 (arXiv 2306.10209), section 3.3 (qgZ); different: the mean inside the node is not
low-bit, and the residual belongs to the node's mean.
"""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from commrt.collectives.exchange import gather_payloads
from commrt.collectives.layout import share_of, split_each
from commrt.collectives.reducer import Item, Reducer, Section, timed
from commrt.collectives.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class TwoLevelReducer:
    """The mean over all ranks of equally large nodes; see :class:`Averager`.

    Args:
        intra: Over the ranks of this node; its codec is that of the way inside the node.
        inter: Over the ranks with this local rank, one a node; its codecs are those between nodes.

    Cost: between nodes, per rank, 1 / L of what one level sends (L ranks a node); residuals take
    1 / L of the memory.
    """

    intra: Reducer
    inter: Reducer

    def reduce_leg(self, items: Sequence[Item], traffic: Traffic) -> Tensor:
        """Average over the node, then send the shares between nodes. Residuals are of shares."""
        whole = [dataclasses.replace(item, residual=None, carry=None) for item in items]
        sections = self.intra.sections(whole, cut=split_each)
        inside = Traffic()
        send = self.intra.encode(sections, inside)
        received = self.intra.exchange(send, sections, inside)
        with timed(inside, "codec_s"):
            shares = self._node_mean(received, sections, items)
        inside.keep_inside()
        traffic.add(inside)
        return self.inter.reduce_leg(shares, traffic)

    def gather_leg(self, received: Tensor, items: Sequence[Item], traffic: Traffic) -> None:
        """Average between nodes, then pass the payloads on inside the node and decode them."""
        ranks = range(self.intra.world_size)
        sections = [self.inter.sections(self._shares(rank, items)) for rank in ranks]
        own = self.inter.share(received, sections[self.intra.rank], traffic)
        slot = max(map(self.inter.slot_bytes, sections)) * self.inter.world_size
        scratch = self.inter.scratch
        padded = scratch.take("padded", slot, own.device)
        padded[: own.numel()].copy_(own)
        passed_on = scratch.take("passed on", slot * len(ranks), own.device)
        with timed(traffic, "network_s"):
            gather_payloads(passed_on, padded, self.intra.gather_group)
        traffic.node_bytes += slot * (len(ranks) - 1)
        with timed(traffic, "codec_s"):
            for rank in ranks:
                self.inter.decode(passed_on[rank * slot :], sections[rank])

    def _shares(self, rank: int, items: Sequence[Item]) -> list[Item]:
        """A local rank's shares of the items."""
        shares = []
        for item in items:
            begin, end = self._bounds(rank, item.tensor)
            shares.append(dataclasses.replace(item, tensor=item.tensor[begin:end]))
        return shares

    def _bounds(self, rank: int, tensor: Tensor) -> tuple[int, int]:
        return share_of(tensor.numel(), self.inter.codec.block, rank, self.intra.world_size)

    def _node_mean(
        self, received: Tensor, sections: Sequence[Section], items: Sequence[Item]
    ) -> list[Item]:
        """This rank's share of each item, fp32, coded ones first as in the sections."""
        pieces = self.intra.average(received, sections)
        ordered = sorted(items, key=lambda item: item.is_small)
        shares = []
        for item, values in zip(ordered, pieces, strict=True):
            begin, end = self._bounds(self.intra.rank, item.tensor)
            shares.append(dataclasses.replace(item, tensor=values[: end - begin]))
        return shares
