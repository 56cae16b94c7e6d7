"""The two legs of a compressed all-reduce over one process group.

Gradients are not summed in transit: low-bit codes would overflow, and requantising at every hop of
a ring would add error at every hop. Instead every rank sends each shard's payload straight to its
owner (all-to-all), which averages in fp32; the mean travels back in the gather codec::

    encode -> all-to-all -> decode, average, encode -> all-gather -> decode
    |---------- reduce_leg ---|------------------ gather_leg ------------|

Ranks: every rank of the group calls, in the same order, with the same codecs and shapes.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import BlockCodec, BlockwiseCodec, Codec, ExactCodec, NoopCodec
from commrt.collectives.exchange import exchange_payloads
from commrt.collectives.layout import Layout, balanced
from commrt.collectives.scratch import Scratch
from commrt.collectives.torch_names import all_gather_single
from commrt.collectives.traffic import Traffic, ring_all_reduce_bytes
from commrt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor to be averaged, and what this rank keeps of it from step to step.

    Attributes:
        tensor: Flat, overwritten with the mean.
        seed: Of stochastic rounding.
        residual: Updated; None without memory. With two levels, of this rank's share of the tensor.
        shape: Of the parameter, for codecs of matrices.
        basis: Updated, for codecs of matrices.
    """

    tensor: Tensor
    seed: int
    residual: Tensor | None
    shape: torch.Size | None = None
    basis: Tensor | None = None


class Averager(Protocol):
    """Replaces tensors by their mean over ranks, in two legs that may run on different threads."""

    def reduce_leg(self, items: Sequence[Item], traffic: Traffic) -> Any:
        """Send the items to their owners, of one dtype and device; returns what was received."""

    def gather_leg(self, received: Any, items: Sequence[Item], traffic: Traffic) -> None:
        """Average what was received, send it to everybody and decode it into the tensors."""


@dataclasses.dataclass(frozen=True)
class Reducer:
    """The mean over one group.

    The legs use a process group each, so that the reduce leg of one bucket may run while the gather
    leg of the one before is still under way, in any interleaving, on every rank differently.

    Args:
        codec: Of the reduce leg.
        gather: Of the gather leg.
        reduce_group: Used on the reduce leg only.
        gather_group: Used on the gather leg only; the same ranks.
        hold_zeros: Send nothing of the residual of a tensor of zeros, and leave it as it was.

    Raises:
        ConfigError: Where the two codecs do not fit together.
    """

    codec: BlockwiseCodec
    gather: BlockwiseCodec
    reduce_group: dist.ProcessGroup | None
    gather_group: dist.ProcessGroup | None
    hold_zeros: bool = False
    scratch: Scratch = dataclasses.field(default_factory=Scratch)
    rank: int = dataclasses.field(init=False)
    world_size: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        check_gather(self.codec, self.gather)
        object.__setattr__(self, "rank", dist.get_rank(self.reduce_group))
        object.__setattr__(self, "world_size", dist.get_world_size(self.reduce_group))

    def reduce_leg(self, items: Sequence[Item], traffic: Traffic) -> Tensor:
        """See :class:`Averager`; returns every rank's payload of this rank's shard, (W, bytes)."""
        layout = self.layout([item.tensor for item in items])
        return self.exchange(self.encode(items, layout, traffic), layout, traffic)

    def gather_leg(self, received: Tensor, items: Sequence[Item], traffic: Traffic) -> None:
        """See :class:`Averager`."""
        tensors = [item.tensor for item in items]
        layout = self.layout(tensors)
        gathered = self.share(received, layout, traffic)
        with timed(traffic, "codec_s"):
            self.decode(gathered, layout, tensors)

    def layout(self, tensors: Sequence[Tensor]) -> Layout:
        """Balanced shards of the tensors."""
        numels = tuple(tensor.numel() for tensor in tensors)
        return balanced(numels, self.codec.block, self.world_size)

    def encode(self, items: Sequence[Item], layout: Layout, traffic: Traffic) -> Tensor:
        """Every shard's payload, one after the other."""
        sizes = [layout.slot_bytes(self.codec, rank) for rank in range(self.world_size)]
        send = self.scratch.take("send", sum(sizes), items[0].tensor.device)
        with timed(traffic, "codec_s"):
            residuals = [self._residual(item) for item in items]
            for rank, slot in enumerate(send.split(sizes)):
                size = layout.payload_bytes(self.codec, rank)
                slot[size:].zero_()
                for index, window in layout.shards[rank]:
                    item = items[index]
                    self.codec.encode(
                        item.tensor,
                        slot[:size],
                        window,
                        residual=residuals[index],
                        seed=item.seed,
                    )
        return send

    def decode_sent(self, send: Tensor, layout: Layout, tensors: Sequence[Tensor]) -> None:
        """Write into the tensors what the others will decode of :meth:`encode`."""
        sizes = [layout.slot_bytes(self.codec, rank) for rank in range(self.world_size)]
        for slot, pieces in zip(send.split(sizes), layout.shards, strict=True):
            size = sum(window.num_blocks for _, window in pieces)
            payload = slot[: self.codec.payload_bytes(size)]
            for index, window in pieces:
                self.codec.decode(payload, tensors[index], window)

    def exchange(self, send: Tensor, layout: Layout, traffic: Traffic) -> Tensor:
        """Give every rank its shard's payload; returns those of this rank's, (W, bytes)."""
        sizes = [layout.slot_bytes(self.codec, rank) for rank in range(self.world_size)]
        own = sizes[self.rank]
        received = self.scratch.take_received(own * self.world_size, send.device)
        with timed(traffic, "network_s"):
            exchange_payloads(received, send, own, sizes, self.reduce_group)
        traffic.reduce_bytes += sum(sizes) - own
        return received.view(self.world_size, own)

    def average(self, received: Tensor, layout: Layout, output: Tensor) -> None:
        """The fp32 mean of this rank's shard, whole blocks."""
        exact = ExactCodec(block=self.codec.block)
        self._average_into(received, layout, exact, output.view(torch.uint8))

    def share(self, received: Tensor, layout: Layout, traffic: Traffic) -> Tensor:
        """Average this rank's shard; returns every rank's mean, encoded, in :meth:`slot_bytes`."""
        slot = self.slot_bytes(layout)
        own = self.scratch.take("own", slot, received.device)
        size = layout.payload_bytes(self.gather, self.rank)
        with timed(traffic, "codec_s"):
            own[size:].zero_()
            self._average_into(received, layout, self.gather, own[:size])
        gathered = self.scratch.take("gathered", slot * self.world_size, received.device)
        with timed(traffic, "network_s"):
            all_gather_single(gathered, own, group=self.gather_group)
        traffic.gather_bytes += slot * (self.world_size - 1)
        return gathered

    def slot_bytes(self, layout: Layout) -> int:
        """What each rank's mean takes in the buffer of :meth:`share`."""
        return max(layout.slot_bytes(self.gather, rank) for rank in range(self.world_size))

    def decode(self, gathered: Tensor, layout: Layout, tensors: Sequence[Tensor]) -> None:
        """Write the means of :meth:`share` into the tensors."""
        slot = self.slot_bytes(layout)
        for rank, pieces in enumerate(layout.shards):
            payload = gathered[rank * slot :][: layout.payload_bytes(self.gather, rank)]
            for index, window in pieces:
                self.gather.decode(payload, tensors[index], window)

    def _residual(self, item: Item) -> Tensor | None:
        if item.residual is None or not self.hold_zeros or not is_zero(item.tensor):
            return item.residual
        return torch.zeros_like(item.residual)

    def _average_into(
        self, received: Tensor, layout: Layout, codec: BlockwiseCodec, output: Tensor
    ) -> None:
        if isinstance(self.codec, ExactCodec):
            values = received.view(-1).view(torch.float32)
            rows = values.view(self.world_size, values.numel() // self.world_size)
            output.view(torch.float32).copy_(rows.sum(dim=0) / self.world_size)
            return
        payloads = received[:, : layout.payload_bytes(self.codec, self.rank)]
        codec.encode_average(payloads, self.codec, output)


def all_reduce_exact_(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> Traffic:
    """Replace tensors by their mean as plain DDP does: divide by W, then all-reduce the sum."""
    traffic = Traffic()
    world_size = dist.get_world_size(group)
    for tensor in tensors:
        tensor.div_(world_size)
        with timed(traffic, "network_s"):
            dist.all_reduce(tensor, group=group)
        num_bytes = tensor.numel() * tensor.element_size()
        traffic.exact_bytes += ring_all_reduce_bytes(num_bytes, world_size)
    return traffic


def check_gather(codec: Codec, gather: Codec, name: str = "gather") -> BlockwiseCodec:
    """Raise ConfigError where ``gather``, a setting of this name, cannot go with ``codec``."""
    is_stochastic = isinstance(gather, BlockCodec) and gather.is_stochastic
    is_plain = isinstance(gather, BlockwiseCodec) and gather.residual_fmt is None
    if not is_plain or isinstance(gather, NoopCodec) or is_stochastic:
        raise ConfigError(
            f"{name}={gather.spec!r}: must be 'none' or a block codec that rounds to nearest"
        )
    if gather.block != codec.block:
        raise ConfigError(f"{name} has block={gather.block}: must be the codec's {codec.block}")
    assert isinstance(gather, BlockwiseCodec)
    return gather


def is_zero(tensor: Tensor) -> bool:
    """Whether all elements are zero; waits for the device."""
    return tensor.numel() == 0 or float(torch.linalg.vector_norm(tensor, ord=float("inf"))) == 0


@contextmanager
def timed(traffic: Traffic, field: str) -> Iterator[None]:
    """Add the seconds spent inside to a field."""
    begin = time.perf_counter()
    yield
    setattr(traffic, field, getattr(traffic, field) + time.perf_counter() - begin)
