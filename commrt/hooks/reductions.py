"""What is done with the gradients of a sharded model's unit, on a thread or stream of their own."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from commrt.codecs import Codec, LocoCodec, derive_seed
from commrt.collectives import (
    Item,
    Traffic,
    order,
    ring_all_reduce_bytes,
    ring_scatter_bytes,
    timed,
)
from commrt.hooks.lender import Lender
from commrt.hooks.registry import Registry
from commrt.hooks.residuals import Residuals
from commrt.hooks.units import Part, Unit, UnitLayout
from commrt.hooks.wiring import ShardWiring

Plain = Callable[[dist.ProcessGroup], object]
"""Does what the model does without commrt, over another group of the same ranks."""


class Reductions:
    """Reduce-scatters, and means over replicas.

    Args:
        codec: Of the gradients.
        registry: Which parameters are compressed.
        residuals: Of those.
        senders_of: By unit: the owners whose parts this rank sends at low bits, with a residual.
        seed: Of stochastic rounding.
        rank: Of this process among those that train the model.

    Attributes:
        lender: Set where residuals are in host memory.
    """

    def __init__(
        self,
        codec: Codec,
        registry: Registry,
        residuals: Residuals,
        senders_of: Mapping[str, Sequence[int]],
        *,
        seed: int,
        rank: int,
    ) -> None:
        self._codec = codec
        self._registry = registry
        self._residuals = residuals
        self._senders_of = senders_of
        self._seed, self._rank = seed, rank
        self.lender: Lender | None = None

    def plain_scatter(
        self, unit: Unit, wiring: ShardWiring, output: Tensor, input: Tensor, plain: Plain
    ) -> Tensor:
        """Fill ``output`` uncompressed."""
        group = wiring.group
        with timed(wiring.reduce_traffic, "network_s"):
            plain(group)
        # gloo's reduce-scatter is an all-reduce of which a shard is kept.
        trips = 1 if order.is_queued(input.device) else 2
        sent = trips * ring_scatter_bytes(input.nbytes, dist.get_world_size(group))
        if unit.replicas is None:
            wiring.reduce_traffic.exact_bytes += sent
        else:
            wiring.reduce_traffic.node_bytes += sent
        return output

    def scatter(
        self,
        unit: Unit,
        wiring: ShardWiring,
        layout: UnitLayout,
        output: Tensor,
        input: Tensor,
        step: int,
        scale: float,
    ) -> Tensor:
        """Fill ``output`` (chunk) with the mean of this rank's chunk of ``input`` (W * chunk).

        Args:
            unit: Whose gradients.
            wiring: Its groups.
            layout: Of the buffers.
            output: Overwritten.
            input: This rank's gradients.
            step: Of which.
            scale: By what the mean is multiplied.
        """
        scatterer = wiring.scatterer
        assert scatterer is not None
        traffic = Traffic()
        if unit.replicas is None:
            with self._lent(unit, layout, step) as lent:
                items = self._items(unit, layout.of_buffer(input), step, lent)
                means = scatterer.reduce_scatter(items, traffic) if items else []
        else:
            items = self._items(unit, layout.of_buffer(input), step, {})
            means = scatterer.reduce_scatter(items, traffic) if items else []
            traffic.keep_inside()
        with timed(traffic, "codec_s"):
            if sum(mean.numel() for mean in means) < output.numel():
                output.zero_()  # the padding
            own = layout.of_chunk(output, unit.rank)
            for (_, target), mean in zip(own, means, strict=True):
                target.copy_(mean if scale == 1 else mean.mul_(scale))
        wiring.reduce_traffic.add(traffic)
        return output

    def plain_mean(
        self, wiring: ShardWiring, output: Tensor, plain: Plain, num_ranks: int
    ) -> Tensor:
        """Average ``output`` over its replicas, uncompressed."""
        assert wiring.replica_group is not None
        with timed(wiring.reduce_traffic, "network_s"):
            plain(wiring.replica_group)
        wiring.reduce_traffic.exact_bytes += ring_all_reduce_bytes(output.nbytes, num_ranks)
        return output

    def first_leg(
        self,
        unit: Unit,
        wiring: ShardWiring,
        layout: UnitLayout,
        output: Tensor,
        step: int,
    ) -> tuple[list[Item], Any]:
        """Send this rank's chunk to its replicas; see :meth:`scatter`."""
        assert wiring.averager is not None
        with self._lent(unit, layout, step) as lent:
            items = self._items(unit, layout.of_chunk(output, unit.rank), step, lent)
            return items, wiring.averager.reduce_leg(items, wiring.reduce_traffic)

    def second_leg(
        self, wiring: ShardWiring, output: Tensor, scale: float, reduced: tuple[list[Item], Any]
    ) -> Tensor:
        """Average what :meth:`first_leg` received, and send it back."""
        assert wiring.averager is not None
        items, received = reduced
        wiring.averager.gather_leg(received, items, wiring.return_traffic)
        return output if scale == 1 else output.mul_(scale)

    def settle_host(self) -> None:
        """Wait until residuals in host memory are up to date."""
        if self.lender is not None:
            self.lender.settle()

    @contextmanager
    def _lent(self, unit: Unit, layout: UnitLayout, step: int) -> Iterator[dict[str, Tensor]]:
        """The residuals of a unit's parameters, to be updated; none after a failure inside."""
        names = [name for name in layout.largest if self._residuals.get(name) is not None]
        if isinstance(self._codec, LocoCodec) and self._codec.is_reset(step):
            self.settle_host()
            self._residuals.reset(names)
        if self.lender is not None:
            lent = self.lender.take(unit.name, names)
            yield lent
            self.lender.give_back(lent)
        else:
            kept = {name: self._residuals.get(name) for name in names}
            yield {name: payload for name, payload in kept.items() if payload is not None}
        self._residuals.settle(names)

    def _items(
        self,
        unit: Unit,
        parts: Iterable[tuple[Part, Tensor]],
        step: int,
        lent: Mapping[str, Tensor],
    ) -> list[Item]:
        """Parts of gradients, with what this rank keeps of those that it sends at low bits."""
        senders = self._senders_of[unit.name]
        seeds: dict[str, int] = {}
        kept = {
            name: zip(
                self._residuals.of_shards(name, payload),
                self._residuals.carries_of_shards(name),
                strict=True,
            )
            for name, payload in lent.items()
        }
        items = []
        for part, tensor in parts:
            residual, carry, name = None, None, part.name
            if name not in seeds:
                seeds[name] = derive_seed(self._seed, self._rank, step, name)
            if name in kept and part.owner in senders:
                residual, carry = next(kept[name])
            item = Item(
                tensor,
                seeds[name] + part.owner,
                residual,
                is_small=name not in self._registry.compressed,
                carry=carry,
                owner=part.owner,
            )
            items.append(item)
        return items
