"""What is done with the parameters of one bucket, on the threads of the pipeline."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import Codec, LocoCodec, derive_seed
from commrt.collectives import Item, Traffic, all_reduce_exact_, order
from commrt.hooks.residuals import Residuals
from commrt.hooks.wiring import Wiring

# Elements coded at a time: DDP's first bucket is the whole model, whose payloads would take memory
# that no later step needs.
MAX_RUN = 8 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter's part of a bucket: a flat view of its gradient."""

    name: str
    grad: Tensor
    shape: torch.Size
    is_small: bool


def split_runs(entries: list[Entry]) -> list[list[Entry]]:
    """Consecutive entries of at most MAX_RUN elements together, or one larger; at least one run."""
    runs: list[list[Entry]] = [[]]
    numel = 0
    for entry in entries:
        if runs[-1] and numel + entry.grad.numel() > MAX_RUN:
            runs.append([])
            numel = 0
        runs[-1].append(entry)
        numel += entry.grad.numel()
    return runs


class Legs:
    """The reduce leg and the gather leg of a bucket, each to be called by one thread in order.

    Args:
        codec: Of the reduce leg.
        wiring: Averages the parameters.
        residuals: Of the parameters, by name.
        seed: Of stochastic rounding.

    Attributes:
        reduce_traffic: Sent by the reduce leg and the uncompressed all-reduces.
        gather_traffic: Sent by the gather leg, which runs on a thread of its own.
    """

    def __init__(
        self,
        codec: Codec,
        wiring: Wiring,
        residuals: Residuals,
        seed: int,
    ) -> None:
        self._codec = codec
        self._wiring = wiring
        self._residuals = residuals
        self._seed = seed
        self._rank = dist.get_rank(wiring.group)
        self.reduce_traffic, self.gather_traffic = Traffic(), Traffic()

    def exact(self, tensors: list[Tensor]) -> None:
        """Average uncompressed, in place."""
        self.reduce_traffic.add(all_reduce_exact_(tensors, self._wiring.group))

    def sparse(self, tensor: Tensor) -> None:
        """Average a sparse tensor, in place."""
        tensor.div_(dist.get_world_size(self._wiring.group))
        dist.all_reduce(tensor, group=self._wiring.group)

    def reduce(
        self, entries: list[Entry], step: int, rescale: Tensor | None
    ) -> tuple[list[Item], Any]:
        """First leg: encode and exchange.

        ``rescale``, where a step begins, is how much larger its gradients are than those before.
        """
        if rescale is not None:
            if order.is_queued(rescale.device):  # else backward's stream could reuse its memory
                rescale.record_stream(torch.cuda.current_stream(rescale.device))
            self._residuals.rescale_(rescale)
        if isinstance(self._codec, LocoCodec) and self._codec.is_reset(step):
            self._residuals.reset([entry.name for entry in entries])
        items = [self._item(entry, step) for entry in entries]
        received = self._wiring.averager.reduce_leg(items, self.reduce_traffic)
        self._residuals.settle(entry.name for entry in entries)
        return items, received

    def gather(self, buffer: Tensor, reduced: tuple[list[Item], Any]) -> Tensor:
        """Second leg: average, gather and decode into the bucket, which is returned."""
        items, received = reduced
        self._wiring.averager.gather_leg(received, items, self.gather_traffic)
        return buffer

    def _item(self, entry: Entry, step: int) -> Item:
        return Item(
            entry.grad,
            derive_seed(self._seed, self._rank, step, entry.name),
            self._residuals.get(entry.name),
            entry.is_small,
            entry.shape,
            self._residuals.basis(entry.name),
            self._residuals.carry(entry.name),
        )
