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

import torch
from torch import Tensor

from commrt.collectives.layout import Layout, balanced, share_of, split_each
from commrt.collectives.reducer import Item, Reducer, timed
from commrt.collectives.torch_names import all_gather_single
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
        layout = self._layout([item.tensor for item in items])
        whole = [dataclasses.replace(item, residual=None) for item in items]
        inside = Traffic()
        received = self.intra.exchange(self.intra.encode(whole, layout, inside), layout, inside)
        with timed(inside, "codec_s"):
            shares = self._node_mean(received, layout, items)
        inside.node_bytes, inside.reduce_bytes = inside.reduce_bytes, 0
        traffic.add(inside)
        return self.inter.reduce_leg(shares, traffic)

    def gather_leg(self, received: Tensor, items: Sequence[Item], traffic: Traffic) -> None:
        """Average between nodes, then pass the payloads on inside the node and decode them."""
        tensors = [item.tensor for item in items]
        layouts = [self._share_layout(rank, tensors) for rank in range(self.intra.world_size)]
        own = self.inter.share(received, layouts[self.intra.rank], traffic)
        slot = max(self.inter.slot_bytes(layout) for layout in layouts) * self.inter.world_size
        scratch = self.inter.scratch
        padded = scratch.take("padded", slot, own.device)
        padded[: own.numel()].copy_(own)
        passed_on = scratch.take("passed on", slot * self.intra.world_size, own.device)
        with timed(traffic, "network_s"):
            all_gather_single(passed_on, padded, group=self.intra.gather_group)
        traffic.node_bytes += slot * (self.intra.world_size - 1)
        with timed(traffic, "codec_s"):
            for rank, layout in enumerate(layouts):
                shares = [self._share(tensor, rank) for tensor in tensors]
                self.inter.decode(passed_on[rank * slot :], layout, shares)

    def _layout(self, tensors: Sequence[Tensor]) -> Layout:
        numels = tuple(tensor.numel() for tensor in tensors)
        return split_each(numels, self.inter.codec.block, self.intra.world_size)

    def _bounds(self, rank: int, tensor: Tensor) -> tuple[int, int]:
        return share_of(tensor.numel(), self.inter.codec.block, rank, self.intra.world_size)

    def _share(self, tensor: Tensor, rank: int) -> Tensor:
        begin, end = self._bounds(rank, tensor)
        return tensor[begin:end]

    def _share_layout(self, rank: int, tensors: Sequence[Tensor]) -> Layout:
        bounds = (self._bounds(rank, tensor) for tensor in tensors)
        numels = tuple(end - begin for begin, end in bounds)
        return balanced(numels, self.inter.codec.block, self.inter.world_size)

    def _node_mean(self, received: Tensor, layout: Layout, items: Sequence[Item]) -> list[Item]:
        """This rank's share of each item, fp32."""
        block, rank = self.inter.codec.block, self.intra.rank
        num_bytes = layout.num_blocks(rank) * block * 4
        mean = self.intra.scratch.take("mean", num_bytes, received.device).view(torch.float32)
        self.intra.average(received, layout, mean)
        shares = []
        for index, window in layout.shards[rank]:
            begin, end = self._bounds(rank, items[index].tensor)
            share = mean[window.at_block * block :][: end - begin]
            shares.append(dataclasses.replace(items[index], tensor=share))
        return shares
