"""What is done with the parameters of one bucket, on the threads of the pipeline."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.codecs import Codec, LocoCodec, derive_seed
from commrt.collectives import Averager, Traffic, all_reduce_exact_
from commrt.hooks.residuals import Residuals


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter's part of a bucket: a flat view of its gradient."""

    name: str
    grad: Tensor


class Legs:
    """The reduce leg and the gather leg of a bucket, each to be called by one thread in order.

    Args:
        codec: Of the reduce leg.
        averager: Averages the compressed parameters.
        group: Of the uncompressed all-reduces, used on the reduce leg only.
        residuals: Of the parameters, by name.
        seed: Of stochastic rounding.

    Attributes:
        reduce_traffic: Sent by the reduce leg and the uncompressed all-reduces.
        gather_traffic: Sent by the gather leg, which runs on a thread of its own.
    """

    def __init__(
        self,
        codec: Codec,
        averager: Averager,
        group: dist.ProcessGroup,
        residuals: Residuals,
        seed: int,
    ) -> None:
        self._codec = codec
        self._averager = averager
        self._group = group
        self._residuals = residuals
        self._seed = seed
        self._rank = dist.get_rank(group)
        self.reduce_traffic, self.gather_traffic = Traffic(), Traffic()

    def exact(self, tensors: list[Tensor]) -> None:
        """Average uncompressed, in place."""
        self.reduce_traffic.add(all_reduce_exact_(tensors, self._group))

    def reduce(
        self, coded: list[Entry], exact: list[Tensor], step: int, rescale: Tensor | None
    ) -> Tensor | None:
        """First leg: encode and exchange; uncompressed parameters go in one small all-reduce.

        ``rescale``, where a step begins, is how much larger its gradients are than the last one's.
        """
        received = None
        if rescale is not None:
            self._residuals.rescale_(rescale)
        if coded:
            names = [entry.name for entry in coded]
            if isinstance(self._codec, LocoCodec) and self._codec.is_reset(step):
                self._residuals.reset(names)
            received = self._averager.reduce_leg(
                [entry.grad for entry in coded],
                [self._residuals.get(name) for name in names],
                [derive_seed(self._seed, self._rank, step, name) for name in names],
                self.reduce_traffic,
            )
        if exact:
            flat = torch.cat(exact)
            self.exact([flat])
            for grad, mean in zip(exact, flat.split([grad.numel() for grad in exact]), strict=True):
                grad.copy_(mean)
        return received

    def gather(self, coded: list[Entry], buffer: Tensor, received: Tensor | None) -> Tensor:
        """Second leg: average, gather and decode into the bucket, which is returned."""
        if received is not None:
            grads = [entry.grad for entry in coded]
            self._averager.gather_leg(received, grads, self.gather_traffic)
        return buffer
