"""Compressed collectives over any process group.

Ranks: every rank of the group calls, in the same order, with the same codecs and shapes.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import (
    BlockwiseCodec,
    Codec,
    ExactCodec,
    LocoCodec,
    NoopCodec,
    Window,
    derive_seed,
    parse,
    with_block,
)
from commrt.collectives.exchange import gather_payloads
from commrt.collectives.layout import one_each
from commrt.collectives.reducer import Item, Reducer, Section, all_reduce_exact_
from commrt.collectives.traffic import Traffic
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
    codec = _parse(codec)
    if isinstance(codec, ExactCodec):
        return all_reduce_exact_(tensors, group)
    reducer = Reducer(codec, _parse(with_block(gather, codec.block)), group, group)
    traffic = Traffic()
    if reducer.world_size > 1 and any(tensor.numel() > 0 for tensor in tensors):
        items = _items(codec, tensors, residuals, seed, reducer.rank)
        reducer.gather_leg(reducer.reduce_leg(items, traffic), items, traffic)
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
    codec = _parse(codec)
    _check_flat(input)
    reducer = Reducer(codec, ExactCodec(block=codec.block), group, group)
    numels = _shard_numels(input.numel(), shard_numels, reducer.world_size)
    shards = list(input.split(numels))
    residuals = None
    if residual is not None:
        sizes = [codec.residual_bytes(numel) for numel in numels]
        if residual.numel() != sum(sizes):
            raise ConfigError(f"residual has {residual.numel()} bytes: must be {sum(sizes)}")
        residuals = residual.split(sizes)
    items = _items(codec, shards, residuals, seed, reducer.rank)
    traffic = Traffic()
    sections = [Section(codec, reducer.gather, items, one_each(numels, codec.block))]
    received = reducer.exchange(reducer.encode(sections, traffic), sections, traffic)
    numel = numels[reducer.rank]
    if numel == 0:
        return torch.empty(0, dtype=torch.float32, device=input.device)
    return reducer.average(received, sections)[0][:numel].clone()


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
    codec = _parse(codec)
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
    gather_payloads(received, own, group)
    output = torch.empty(sum(numels), dtype=input.dtype, device=input.device)
    for peer, shard in enumerate(output.split(numels)):
        payload = received[peer * slot :][: layout.payload_bytes(codec, peer)]
        codec.decode(payload, shard, Window(0, layout.num_blocks(peer), 0))
    return output


def new_residuals(codec: Codec, numels: Sequence[int], device: torch.device) -> list[Tensor]:
    """Empty (zero) residuals for tensors of these sizes."""
    return [
        torch.zeros(codec.residual_bytes(numel), dtype=torch.uint8, device=device)
        for numel in numels
    ]


def _parse(spec: str | Codec) -> BlockwiseCodec:
    codec = parse(spec)
    if isinstance(codec, NoopCodec) or not isinstance(codec, BlockwiseCodec):
        raise ConfigError(f"codec={codec.spec!r}: only commrt.attach takes it")
    return codec


def _check_flat(input: Tensor) -> None:
    if input.dim() != 1 or not input.is_contiguous():
        raise ConfigError(f"input has shape {tuple(input.shape)}: must be 1-D and contiguous")


def _items(
    codec: Codec,
    tensors: Sequence[Tensor],
    residuals: Sequence[Tensor] | None,
    seed: int,
    rank: int,
) -> list[Item]:
    seeds = [derive_seed(seed, rank, index) for index in range(len(tensors))]
    if codec.residual_fmt is None:
        return [Item(*pair, None) for pair in zip(tensors, seeds, strict=True)]
    if residuals is None or len(residuals) != len(tensors):
        given = "None" if residuals is None else str(len(residuals))
        raise ConfigError(f"residuals={given}: {codec.spec!r} needs one for each tensor")
    for tensor, residual in zip(tensors, residuals, strict=True):
        expected = codec.residual_bytes(tensor.numel())
        if residual.numel() != expected:
            raise ConfigError(f"residual has {residual.numel()} bytes: must be {expected}")
    return [Item(*parts) for parts in zip(tensors, seeds, residuals, strict=True)]


def _shard_numels(numel: int, given: Sequence[int] | None, world_size: int) -> list[int]:
    if given is None:
        return [numel // world_size + (rank < numel % world_size) for rank in range(world_size)]
    if len(given) != world_size or sum(given) != numel or min(given) < 0:
        raise ConfigError(
            f"shard_numels={list(given)}: must be {world_size} sizes that sum to {numel}"
        )
    return list(given)
