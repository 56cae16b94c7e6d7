"""Compressed collectives over any process group.

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

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import (
    BlockCodec,
    Codec,
    ExactCodec,
    LocoCodec,
    Window,
    derive_seed,
    parse,
    with_block,
)
from commrt.collectives.layout import Layout, balanced, one_each
from commrt.collectives.scratch import Scratch
from commrt.collectives.torch_names import all_gather_single
from commrt.collectives.traffic import Traffic, ring_all_reduce_bytes
from commrt.errors import ConfigError


def all_reduce_(
    tensors: Tensor | Sequence[Tensor],
    *,
    codec: str | Codec,
    gather: str | Codec = "block8",
    group: dist.ProcessGroup | None = None,
    residuals: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> Traffic:
    """Replace the tensors by their mean over the group, in place.

    Args:
        tensors: Flat contiguous tensors of one floating dtype and device; any lengths.
        codec: For the reduce leg; ``"none"`` makes it a plain all-reduce.
        gather: For the return leg; its block size follows ``codec``.
        group: Process group; None is the default one.
        residuals: For a LoCo codec, one buffer a tensor from :func:`new_residuals`, updated.
        seed: Of stochastic rounding; change it every step. Ranks draw independently.

    Returns:
        What this rank sent.

    Raises:
        ConfigError: For tensors or codecs that do not fit together.

    Cost: per rank, (W - 1) / W of the payload on each leg. Extra memory: two payloads of ``codec``
    and 1 + 1 / W of ``gather``.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    codec = parse(codec)
    if isinstance(codec, ExactCodec):
        return all_reduce_exact_(tensors, group)
    reducer = Reducer(codec, with_block(gather, codec.block), group, group)
    traffic = Traffic()
    if reducer.world_size > 1 and any(tensor.numel() > 0 for tensor in tensors):
        seeds = [derive_seed(seed, reducer.rank, index) for index in range(len(tensors))]
        layout = reducer.layout(tensors)
        errors = _residuals(codec, tensors, residuals)
        send = reducer.encode(tensors, layout, errors, seeds, traffic)
        received = reducer.reduce_leg(send, layout, traffic)
        reducer.gather_leg(received, layout, tensors, traffic)
    return traffic


def reduce_scatter(
    input: Tensor,
    *,
    codec: str | Codec,
    shard_numels: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    residual: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The mean over the group of this rank's shard of ``input``.

    Args:
        input: Flat contiguous tensor of N elements, not changed.
        codec: ``"none"`` sends fp32.
        shard_numels: Elements of each rank's shard, in rank order, summing to N; any sizes, zero
            among them. Default: N split as evenly as it goes, longer shards first.
        group: Process group; None is the default one.
        residual: For a LoCo codec, a buffer from :func:`new_residuals` for the shards
            (``input.split(shard_numels)``), concatenated; updated.
        seed: Of stochastic rounding.

    Returns:
        fp32 tensor of ``shard_numels[rank]`` elements.

    Cost: (W - 1) / W of the payload sent per rank; extra memory two payloads.
    """
    codec = parse(codec)
    _check_flat(input)
    reducer = Reducer(codec, ExactCodec(block=codec.block), group, group)
    numels = _shard_numels(input.numel(), shard_numels, reducer.world_size)
    shards = list(input.split(numels))
    layout = one_each(numels, codec.block)
    residuals = None
    if residual is not None:
        sizes = [codec.residual_bytes(numel) for numel in numels]
        if residual.numel() != sum(sizes):
            raise ConfigError(f"residual has {residual.numel()} bytes: must be {sum(sizes)}")
        residuals = residual.split(sizes)
    errors = _residuals(codec, shards, residuals)
    seeds = [derive_seed(seed, reducer.rank, index) for index in range(len(shards))]
    traffic = Traffic()
    send = reducer.encode(shards, layout, errors, seeds, traffic)
    received = reducer.reduce_leg(send, layout, traffic)
    output = torch.empty(
        layout.num_blocks(reducer.rank) * codec.block, dtype=torch.float32, device=input.device
    )
    reducer.average(received, layout, output)
    return output[: numels[reducer.rank]]


def all_gather(
    input: Tensor,
    *,
    codec: str | Codec,
    shard_numels: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    seed: int = 0,
) -> Tensor:
    """Concatenate every rank's ``input``, as decoded from one payload: the same bits on every rank.

    Args:
        input: Flat contiguous tensor: this rank's shard.
        codec: A codec without residual; ``"none"`` sends fp32.
        shard_numels: Elements of each rank's shard; default, all as many as this one's.
        group: Process group; None is the default one.
        seed: Of stochastic rounding.

    Returns:
        Tensor of ``sum(shard_numels)`` elements, of the dtype of ``input``.

    Cost: each rank sends (W - 1) times the largest payload.
    """
    codec = parse(codec)
    if isinstance(codec, LocoCodec):
        raise ConfigError(f"codec={codec.spec!r}: an all-gather has no residual; use 'block8'")
    _check_flat(input)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    numels = list(shard_numels or [input.numel()] * world_size)
    if len(numels) != world_size or numels[rank] != input.numel():
        raise ConfigError(
            f"shard_numels={numels}: must have {world_size} entries, entry {rank} "
            f"being the {input.numel()} elements of the input"
        )
    layout = one_each(numels, codec.block)
    slot = max(layout.slot_bytes(codec, peer) for peer in range(world_size))
    own = torch.zeros(slot, dtype=torch.uint8, device=input.device)
    window = Window(0, layout.num_blocks(rank), 0)
    payload = own[: layout.payload_bytes(codec, rank)]
    codec.encode(input, payload, window, residual=None, seed=seed)
    received = torch.empty(world_size * slot, dtype=torch.uint8, device=input.device)
    all_gather_single(received, own, group=group)
    output = torch.empty(sum(numels), dtype=input.dtype, device=input.device)
    for peer, shard in enumerate(output.split(numels)):
        payload = received[peer * slot :][: layout.payload_bytes(codec, peer)]
        codec.decode(payload, shard, Window(0, layout.num_blocks(peer), 0))
    return output


def all_reduce_exact_(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> Traffic:
    """Replace tensors by their mean as plain DDP does: divide by W, then all-reduce the sum."""
    traffic = Traffic()
    world_size = dist.get_world_size(group)
    for tensor in tensors:
        tensor.div_(world_size)
        with _timed(traffic, "network_s"):
            dist.all_reduce(tensor, group=group)
        num_bytes = tensor.numel() * tensor.element_size()
        traffic.exact_bytes += ring_all_reduce_bytes(num_bytes, world_size)
    return traffic


def new_residuals(codec: Codec, numels: Sequence[int], device: torch.device) -> list[Tensor]:
    """Empty (zero) residuals for tensors of these sizes."""
    return [
        torch.zeros(codec.residual_bytes(numel), dtype=torch.uint8, device=device)
        for numel in numels
    ]


@dataclasses.dataclass(frozen=True)
class Reducer:
    """The legs of :func:`all_reduce_`, for callers that overlap them.

    The legs use a process group each, so that the reduce leg of one bucket may run while the gather
    leg of the one before is still under way, in any interleaving, on every rank differently.

    Raises:
        ConfigError: Where the two codecs do not fit together.
    """

    codec: Codec
    gather: Codec
    reduce_group: dist.ProcessGroup | None
    gather_group: dist.ProcessGroup | None
    scratch: Scratch = dataclasses.field(default_factory=Scratch)
    rank: int = dataclasses.field(init=False)
    world_size: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        check_gather(self.codec, self.gather)
        object.__setattr__(self, "rank", dist.get_rank(self.reduce_group))
        object.__setattr__(self, "world_size", dist.get_world_size(self.reduce_group))

    def layout(self, tensors: Sequence[Tensor]) -> Layout:
        """Balanced shards of the tensors."""
        numels = tuple(tensor.numel() for tensor in tensors)
        return balanced(numels, self.codec.block, self.world_size)

    def encode(
        self,
        tensors: Sequence[Tensor],
        layout: Layout,
        residuals: Sequence[Tensor | None],
        seeds: Sequence[int],
        traffic: Traffic,
    ) -> Tensor:
        """Every shard's payload, one after the other."""
        sizes = [layout.slot_bytes(self.codec, rank) for rank in range(self.world_size)]
        send = self.scratch.take("send", sum(sizes), tensors[0].device)
        with _timed(traffic, "codec_s"):
            for rank, slot in enumerate(send.split(sizes)):
                size = layout.payload_bytes(self.codec, rank)
                slot[size:].zero_()
                for index, window in layout.shards[rank]:
                    self.codec.encode(
                        tensors[index],
                        slot[:size],
                        window,
                        residual=residuals[index],
                        seed=seeds[index],
                    )
        return send

    def reduce_leg(self, send: Tensor, layout: Layout, traffic: Traffic) -> Tensor:
        """Exchange payloads; returns every rank's payload of this rank's shard, (W, bytes)."""
        sizes = [layout.slot_bytes(self.codec, rank) for rank in range(self.world_size)]
        own = sizes[self.rank]
        received = self.scratch.take_received(own * self.world_size, send.device)
        with _timed(traffic, "network_s"):
            dist.all_to_all_single(
                received, send, [own] * self.world_size, sizes, group=self.reduce_group
            )
        traffic.reduce_bytes += sum(sizes) - own
        return received.view(self.world_size, own)

    def average(self, received: Tensor, layout: Layout, output: Tensor) -> None:
        """The fp32 mean of this rank's shard, whole blocks."""
        exact = ExactCodec(block=self.codec.block)
        self._average_into(received, layout, exact, output.view(torch.uint8))

    def gather_leg(
        self, received: Tensor, layout: Layout, tensors: Sequence[Tensor], traffic: Traffic
    ) -> None:
        """Average this rank's shard, gather everybody's, and decode them into the tensors."""
        slot = max(layout.slot_bytes(self.gather, rank) for rank in range(self.world_size))
        own = self.scratch.take("own", slot, received.device)
        size = layout.payload_bytes(self.gather, self.rank)
        with _timed(traffic, "codec_s"):
            own[size:].zero_()
            self._average_into(received, layout, self.gather, own[:size])
        gathered = self.scratch.take("gathered", slot * self.world_size, received.device)
        with _timed(traffic, "network_s"):
            all_gather_single(gathered, own, group=self.gather_group)
        traffic.gather_bytes += slot * (self.world_size - 1)
        with _timed(traffic, "codec_s"):
            for rank, pieces in enumerate(layout.shards):
                payload = gathered[rank * slot :][: layout.payload_bytes(self.gather, rank)]
                for index, window in pieces:
                    self.gather.decode(payload, tensors[index], window)

    def _average_into(self, received: Tensor, layout: Layout, codec: Codec, output: Tensor) -> None:
        if isinstance(self.codec, ExactCodec):
            values = received.view(-1).view(torch.float32)
            rows = values.view(self.world_size, values.numel() // self.world_size)
            output.view(torch.float32).copy_(rows.sum(dim=0) / self.world_size)
            return
        payloads = received[:, : layout.payload_bytes(self.codec, self.rank)]
        codec.encode_average(payloads, self.codec, output)


def check_gather(codec: Codec, gather: Codec) -> None:
    """Raise ConfigError where ``gather`` cannot return what ``codec`` sent."""
    if isinstance(gather, LocoCodec) or (isinstance(gather, BlockCodec) and gather.is_stochastic):
        raise ConfigError(
            f"gather={gather.spec!r}: must be 'none' or a block codec that rounds to nearest"
        )
    if gather.block != codec.block:
        raise ConfigError(f"gather has block={gather.block}: must be the codec's {codec.block}")


def _check_flat(input: Tensor) -> None:
    if input.dim() != 1 or not input.is_contiguous():
        raise ConfigError(f"input has shape {tuple(input.shape)}: must be 1-D and contiguous")


def _residuals(
    codec: Codec, tensors: Sequence[Tensor], residuals: Sequence[Tensor] | None
) -> Sequence[Tensor | None]:
    if not isinstance(codec, LocoCodec):
        return [None] * len(tensors)
    if residuals is None or len(residuals) != len(tensors):
        given = "None" if residuals is None else str(len(residuals))
        raise ConfigError(f"residuals={given}: {codec.spec!r} needs one for each tensor")
    for tensor, residual in zip(tensors, residuals, strict=True):
        expected = codec.residual_bytes(tensor.numel())
        if residual.numel() != expected:
            raise ConfigError(f"residual has {residual.numel()} bytes: must be {expected}")
    return residuals


def _shard_numels(numel: int, given: Sequence[int] | None, world_size: int) -> list[int]:
    if given is None:
        return [numel // world_size + (rank < numel % world_size) for rank in range(world_size)]
    if len(given) != world_size or sum(given) != numel or min(given) < 0:
        raise ConfigError(
            f"shard_numels={list(given)}: must be {world_size} sizes that sum to {numel}"
        )
    return list(given)


@contextmanager
def _timed(traffic: Traffic, field: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    setattr(traffic, field, getattr(traffic, field) + time.perf_counter() - begin)
