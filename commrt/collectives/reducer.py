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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import BlockCodec, BlockwiseCodec, Codec, ExactCodec, NoopCodec
from commrt.collectives import order
from commrt.collectives.exchange import exchange_payloads, gather_payloads
from commrt.collectives.layout import Layout, balanced
from commrt.collectives.scratch import Scratch
from commrt.collectives.traffic import Traffic, ring_all_reduce_bytes
from commrt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor to be averaged, and what this rank keeps of it from step to step.

    Attributes:
        tensor: Flat, overwritten with the mean.
        seed: Of stochastic rounding.
        residual: Updated; None without memory. With two levels, of this rank's share of the tensor.
        is_small: Whether it goes in the codec of small tensors.
        shape: Of the parameter, for codecs of matrices.
        basis: Updated, for codecs of matrices.
        carry: fp32, added to the tensor before it is sent, and zeroed where it was.
        owner: The rank whose shard it is, where each tensor has one.
    """

    tensor: Tensor
    seed: int
    residual: Tensor | None
    is_small: bool = False
    shape: torch.Size | None = None
    basis: Tensor | None = None
    carry: Tensor | None = None
    owner: int = 0


@dataclasses.dataclass(frozen=True)
class Section:
    """Items that share codecs, and how they are cut. A message has one section after the other.

    Attributes:
        codec: Of the reduce leg.
        gather: Of the gather leg.
        items: In the order of the layout.
        layout: Each rank's shard of them.
    """

    codec: BlockwiseCodec
    gather: BlockwiseCodec
    items: Sequence[Item]
    layout: Layout


class _Loan(NamedTuple):
    """What to encode an item from: its tensor and residual, or copies of them.

    The tensor's copy has in it what is carried; the residual's is kept if the gradient was used.
    """

    source: Tensor
    residual: Tensor | None
    is_used: Tensor | bool

    def give_back(self, item: Item) -> None:
        if item.residual is not None and self.residual is not item.residual:
            assert self.residual is not None
            update_(item.residual, self.residual, self.is_used)


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
    leg of the one before is still under way, in any interleaving, on every rank differently. Small
    tensors travel in the same messages as the others: on a link full of large ones, messages of
    their own would wait in line at every hop.

    Args:
        codec: Of the reduce leg.
        gather: Of the gather leg.
        reduce_group: Used on the reduce leg only.
        gather_group: Used on the gather leg only; the same ranks.
        hold_zeros: Send nothing of the residual of a tensor of zeros, and leave it as it was.
        small: Of small items, on both legs; None: fp32.

    Raises:
        ConfigError: Where the codecs do not fit together.
    """

    codec: BlockwiseCodec
    gather: BlockwiseCodec
    reduce_group: dist.ProcessGroup | None
    gather_group: dist.ProcessGroup | None
    hold_zeros: bool = False
    small: BlockwiseCodec | None = None
    scratch: Scratch = dataclasses.field(default_factory=Scratch)
    rank: int = dataclasses.field(init=False)
    world_size: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        check_gather(self.codec, self.gather)
        object.__setattr__(self, "rank", dist.get_rank(self.reduce_group))
        object.__setattr__(self, "world_size", dist.get_world_size(self.reduce_group))

    def reduce_leg(self, items: Sequence[Item], traffic: Traffic) -> Tensor:
        """See :class:`Averager`; returns every rank's payload of this rank's shard, (W, bytes)."""
        sections = self.sections(items)
        return self.exchange(self.encode(sections, traffic), sections, traffic)

    def gather_leg(self, received: Tensor, items: Sequence[Item], traffic: Traffic) -> None:
        """See :class:`Averager`."""
        sections = self.sections(items)
        gathered = self.share(received, sections, traffic)
        with timed(traffic, "codec_s"):
            self.decode(gathered, sections)

    def sections(
        self,
        items: Sequence[Item],
        cut: Callable[[tuple[int, ...], int, int], Layout] = balanced,
    ) -> list[Section]:
        """The items by codec, in balanced shards or as ``cut`` has them; at least one section."""
        coded = [item for item in items if not item.is_small]
        small = [item for item in items if item.is_small]
        exact = self.small or ExactCodec(block=self.codec.block)
        sections = [self._section(self.codec, self.gather, coded, cut)]
        if small:
            sections.append(self._section(exact, exact, small, cut))
        return sections

    def encode(self, sections: Sequence[Section], traffic: Traffic) -> Tensor:
        """Every shard's payload, one after the other."""
        sizes = self._reduce_sizes(sections)
        send = self.scratch.take("send", sum(sizes), _device(sections))
        with timed(traffic, "codec_s"):
            lent = [[self._lend(item) for item in part.items] for part in sections]
            for rank, slot in enumerate(send.split(sizes)):
                for part, loans in zip(sections, lent, strict=True):
                    payload, slot = _cut(slot, part.layout, part.codec, rank)
                    for index, window in part.layout.shards[rank]:
                        loan, seed = loans[index], part.items[index].seed
                        part.codec.encode(
                            loan.source, payload, window, residual=loan.residual, seed=seed
                        )
            for part, loans in zip(sections, lent, strict=True):
                for item, loan in zip(part.items, loans, strict=True):
                    loan.give_back(item)
        return send

    def decode_sent(self, send: Tensor, sections: Sequence[Section]) -> None:
        """Write into the tensors of the first section what others will decode of them."""
        part = sections[0]
        for rank, slot in enumerate(send.split(self._reduce_sizes(sections))):
            payload = slot[: part.layout.payload_bytes(part.codec, rank)]
            for index, window in part.layout.shards[rank]:
                part.codec.decode(payload, part.items[index].tensor, window)

    def exchange(self, send: Tensor, sections: Sequence[Section], traffic: Traffic) -> Tensor:
        """Give every rank its shard's payload; returns those of this rank's, (W, bytes)."""
        sizes = self._reduce_sizes(sections)
        own = sizes[self.rank]
        received = self.scratch.take_received(own * self.world_size, send.device)
        with timed(traffic, "network_s"):
            exchange_payloads(received, send, own, sizes, self.reduce_group)
        exact = sum(
            part.layout.slot_bytes(part.codec, rank)
            for part in sections
            for rank in range(self.world_size)
            if rank != self.rank and isinstance(part.codec, ExactCodec)
        )
        traffic.exact_bytes += exact
        traffic.reduce_bytes += sum(sizes) - own - exact
        return received.view(self.world_size, own)

    def average(self, received: Tensor, sections: Sequence[Section]) -> list[Tensor]:
        """The fp32 mean of each piece of this rank's shard, in whole blocks.

        One section's pieces come after the other's. They are valid until the next call.
        """
        block = self.codec.block
        sizes = [part.layout.num_blocks(self.rank) * block for part in sections]
        mean = self.scratch.take("mean", sum(sizes) * 4, received.device).view(torch.float32)
        pieces = []
        for part, output in zip(sections, mean.split(sizes), strict=True):
            exact = ExactCodec(block=block)
            received = self._average_into(received, part, exact, output.view(torch.uint8))
            pieces += [
                output[window.at_block * block :][: window.num_blocks * block]
                for _, window in part.layout.shards[self.rank]
            ]
        return pieces

    def share(self, received: Tensor, sections: Sequence[Section], traffic: Traffic) -> Tensor:
        """Average this rank's shard; returns every rank's mean, encoded, in :meth:`slot_bytes`."""
        slot = self.slot_bytes(sections)
        own = self.scratch.take("own", slot, received.device)
        with timed(traffic, "codec_s"):
            rest = own
            for part in sections:
                payload, rest = _cut(rest, part.layout, part.gather, self.rank)
                received = self._average_into(received, part, part.gather, payload)
            rest.zero_()
        gathered = self.spread(own, traffic)
        exact = sum(
            part.layout.slot_bytes(part.gather, self.rank)
            for part in sections
            if isinstance(part.codec, ExactCodec)
        )
        traffic.exact_bytes += exact * (self.world_size - 1)
        traffic.gather_bytes += (slot - exact) * (self.world_size - 1)
        return gathered

    def encode_own(self, sections: Sequence[Section], traffic: Traffic) -> Tensor:
        """This rank's shard in the gather codec, in :meth:`slot_bytes`."""
        own = self.scratch.take("own", self.slot_bytes(sections), _device(sections))
        with timed(traffic, "codec_s"):
            rest = own
            for part in sections:
                payload, rest = _cut(rest, part.layout, part.gather, self.rank)
                for index, window in part.layout.shards[self.rank]:
                    item = part.items[index]
                    part.gather.encode(item.tensor, payload, window, residual=None, seed=item.seed)
            rest.zero_()
        return own

    def spread(self, own: Tensor, traffic: Traffic) -> Tensor:
        """Every rank's ``own``, of the same size on all, in rank order."""
        gathered = self.scratch.take("gathered", own.numel() * self.world_size, own.device)
        with timed(traffic, "network_s"):
            gather_payloads(gathered, own, self.gather_group)
        return gathered

    def slot_bytes(self, sections: Sequence[Section]) -> int:
        """What each rank's mean takes in the buffer of :meth:`share`."""
        return max(
            sum(part.layout.slot_bytes(part.gather, rank) for part in sections)
            for rank in range(self.world_size)
        )

    def decode(self, gathered: Tensor, sections: Sequence[Section]) -> None:
        """Write the means of :meth:`share` into the items' tensors."""
        slot = self.slot_bytes(sections)
        for rank in range(self.world_size):
            rest = gathered[rank * slot :][:slot]
            for part in sections:
                size = part.layout.slot_bytes(part.gather, rank)
                payload = rest[: part.layout.payload_bytes(part.gather, rank)]
                rest = rest[size:]
                for index, window in part.layout.shards[rank]:
                    part.gather.decode(payload, part.items[index].tensor, window)

    def _section(
        self,
        codec: BlockwiseCodec,
        gather: BlockwiseCodec,
        items: Sequence[Item],
        cut: Callable[[tuple[int, ...], int, int], Layout],
    ) -> Section:
        numels = tuple(item.tensor.numel() for item in items)
        return Section(codec, gather, items, cut(numels, codec.block, self.world_size))

    def _reduce_sizes(self, sections: Sequence[Section]) -> list[int]:
        return [
            sum(part.layout.slot_bytes(part.codec, rank) for part in sections)
            for rank in range(self.world_size)
        ]

    def _lend(self, item: Item) -> "_Loan":
        """The residual to encode with: zeros for a gradient of zeros, if those are held back."""
        is_used: Tensor | bool = True
        if item.residual is not None and self.hold_zeros:
            is_used = has_elements(item.tensor)
        source = add_carry(item, is_used, self.codec.block)
        if item.residual is None or is_used is True:
            return _Loan(source, item.residual, True)
        return _Loan(source, item.residual * is_used, is_used)

    def _average_into(
        self, received: Tensor, part: Section, codec: BlockwiseCodec, output: Tensor
    ) -> Tensor:
        """Average a section at the beginning of the rows; returns what follows it."""
        size = part.layout.slot_bytes(part.codec, self.rank)
        payloads = received[:, : part.layout.payload_bytes(part.codec, self.rank)]
        if output.numel() == 0:
            return received
        if isinstance(part.codec, ExactCodec):
            mean = payloads.view(torch.float32).sum(dim=0).div_(self.world_size)
            output.view(torch.float32).copy_(mean)
        else:
            codec.encode_average(payloads, part.codec, output)
        return received[:, size:]


def _device(sections: Sequence[Section]) -> torch.device:
    return next(item.tensor.device for part in sections for item in part.items)


def _cut(slot: Tensor, layout: Layout, codec: BlockwiseCodec, rank: int) -> tuple[Tensor, Tensor]:
    """A section's payload at the beginning of a slot, its padding zeroed, and the rest."""
    size = layout.payload_bytes(codec, rank)
    end = layout.slot_bytes(codec, rank)
    slot[size:end].zero_()
    return slot[:size], slot[end:]


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


def add_carry(item: Item, is_used: Tensor | bool, block: int) -> Tensor:
    """What to send of an item: its tensor and, if that is used, what it carries.

    What was added is taken out of the carry, but for blocks with an element that is not finite:
    they are not compensated either.
    """
    if item.carry is None or is_used is False:
        return item.tensor
    source = torch.add(item.tensor.float(), item.carry * is_used)
    numel = source.numel()
    blocks = torch.nn.functional.pad(source, (0, -numel % block)).view(-1, block)
    is_sent = blocks.isfinite().all(dim=1, keepdim=True) & is_used
    item.carry.mul_(~is_sent.expand_as(blocks).reshape(-1)[:numel])
    return source


HEAD = 64
"""Elements that are looked at first: most gradients that are used have one there."""


def has_elements(tensor: Tensor) -> Tensor | bool:
    """Whether any element is not zero; on a GPU a scalar there, for which nobody waits."""
    if order.is_queued(tensor.device):
        return tensor.any()
    if tensor[:HEAD].any():
        return True
    return tensor.numel() > 0 and float(torch.linalg.vector_norm(tensor, ord=float("inf"))) != 0


def update_(old: Tensor, new: Tensor, condition: Tensor | bool) -> None:
    """Overwrite ``old`` where the condition, a scalar, holds; does not wait for a GPU to tell."""
    if isinstance(condition, Tensor) and order.is_queued(condition.device):
        old.copy_(torch.where(condition, new, old))
    elif condition:
        old.copy_(new)


@contextmanager
def timed(traffic: Traffic, field: str) -> Iterator[None]:
    """Add the seconds spent inside to a field."""
    begin = time.perf_counter()
    yield
    setattr(traffic, field, getattr(traffic, field) + time.perf_counter() - begin)
