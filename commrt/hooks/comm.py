"""The communication of one DDP model, bucket by bucket."""

import functools
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.futures import Future

from commrt import ops
from commrt.codecs import Codec, LowRankCodec, NoopCodec
from commrt.collectives import (
    Pipeline,
    StreamPipeline,
    ThreadPipeline,
    Traffic,
    check_agreement,
    order,
    ring_all_reduce_bytes,
    share_of,
)
from commrt.errors import ConfigError
from commrt.hooks.base import BaseComm
from commrt.hooks.legs import Entry, Legs, split_runs
from commrt.hooks.residuals import Shard
from commrt.hooks.wiring import Codecs, Wiring, place
from commrt.ops.format import FLOAT_DTYPES

SPARSE = "sparse gradient, its bytes not counted"


class Comm(BaseComm):
    """Compressed gradient averaging for one DDP model.

    Made by :func:`commrt.attach`. To register the hook yourself, or through Lightning's
    ``DDPStrategy(ddp_comm_state=..., ddp_comm_hook=...)``, make one and pass it as the state of
    :func:`commrt.ddp_hook`; parameters are then named by the order in which DDP first shows them,
    unless :meth:`bind` is called.

    Args:
        codec: Of the reduce leg: a spec string or codec; ``"none"`` is plain averaging, counted,
            and ``"noop"`` no communication at all, to see what is to be gained.
        gather: Of the return leg; its block size follows the codec's.
        min_numel: Parameters with fewer elements, and all with fewer than two dimensions, travel
            uncompressed: 0.3 % of the elements, most of the harm.
        group: Process group of the model; None is the default one.
        seed: Of stochastic rounding.
        warmup: Steps at the start that are averaged uncompressed.
        hierarchy: Ranks a node (consecutive ranks being neighbours), or the ranks of each node:
            gradients are averaged inside each node first, and only the node's mean is compressed.
        intra: Codec inside a node: ``"none"`` or a block codec such as ``"block8"``.
        small: Codec of the parameters that ``min_numel`` and the rules beside it exempt:
            ``"none"`` or a block codec such as ``"block8"``.
        grad_scaler: The scaler of the loss, whose changes then rescale the residuals; without it
            they would weigh wrongly after a change of the loss scale.

    Raises:
        ConfigError: For values outside these.
    """

    def __init__(
        self,
        codec: str | Codec = "loco4",
        gather: str | Codec | None = None,
        min_numel: int = 1024,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        *,
        warmup: int = 0,
        hierarchy: int | Sequence[Sequence[int]] | None = None,
        intra: str | Codec = "none",
        small: str | Codec = "none",
        grad_scaler: GradScaler | None = None,
    ) -> None:
        gather = "block8" if gather is None else gather
        super().__init__(
            Codecs.parse(codec, gather=gather, intra=intra, small=small),
            min_numel=min_numel,
            group=group,
            seed=seed,
            warmup=warmup,
            hierarchy=hierarchy,
            grad_scaler=grad_scaler,
        )
        self.may_have_unused = True
        """Whether a gradient of zeros may mean a parameter that no rank has used."""
        self._world_size = 1
        self._wiring: Wiring | None = None
        self._legs: Legs | None = None
        self._pipeline: Pipeline | None = None

    def bind(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        exempt: Mapping[str, str] | None = None,
    ) -> None:
        """Name the parameters, and make the residuals of those that are trained.

        Args:
            named_parameters: Of the model.
            exempt: Names of those that are not to be compressed, with the reason.

        Raises:
            ConfigError: The hierarchy does not fit the ranks.
        """
        if self.hierarchy is not None:
            _ = self._nodes
        for name, parameter in named_parameters:
            self._registry.name(parameter, name)
            if exempt and name in exempt:
                self._registry.exclude(parameter, exempt[name])
            elif parameter.requires_grad:
                self._bind_one(parameter)

    def start(self, device: torch.device) -> None:
        """Make the process groups and threads, and compare settings over the ranks.

        Ranks: every rank of the group. Done by the first backward if not before.

        Raises:
            ConfigError: The hierarchy does not fit the ranks.
            PeerMismatchError: On every rank, if the settings differ.
        """
        parent = self.group or dist.group.WORLD
        assert parent is not None
        check_agreement(self._settings(device), parent, device)
        self._device = device
        self._loss_scale = self._loss_scale.to(device)
        if device.type == "cuda" and ops.status(device).startswith("reference"):
            warnings.warn(f"slow ops on {device}: {ops.status(device)}", stacklevel=3)
        self._world_size = dist.get_world_size(parent)
        self._wiring = Wiring(self.codecs, self._nodes, parent, device, self.may_have_unused)
        self._legs = Legs(self.codec, self._wiring, self._residuals, self.seed)
        self._pipeline = StreamPipeline(device) if order.is_queued(device) else ThreadPipeline()
        weakref.finalize(self, self._pipeline.close, wait=False)

    def average(
        self, buffer: Tensor, parts: list[tuple[Tensor, Tensor]], is_last: bool
    ) -> Future[Tensor]:
        """Average one bucket over the group, without waiting for it.

        Args:
            buffer: The flat bucket, overwritten with the mean.
            parts: Each parameter in it, with the flat view of its gradient.
            is_last: Whether this bucket ends the backward pass.

        Returns:
            Future of ``buffer``.
        """
        step, legs, pipeline = self._begin(buffer.device, is_last)
        if self._is_local:
            return _completed(buffer)
        num_bytes = buffer.numel() * buffer.element_size()
        names = [self._bind_one(parameter) for parameter, _ in parts]
        if self._plain_reason(step) or buffer.dtype not in FLOAT_DTYPES:
            self._dense_bytes += ring_all_reduce_bytes(num_bytes, self._world_size)
            return pipeline.submit(lambda: legs.exact([buffer]), lambda _: buffer)
        num_nodes, num_local = len(self._nodes), len(self._nodes[0])
        self._dense_bytes += ring_all_reduce_bytes(num_bytes, num_nodes) // num_local
        rescale = self._loss_scale_change(step)
        entries = [
            Entry(name, grad, parameter.shape, is_small=name in self._registry.exempt)
            for name, (parameter, grad) in zip(names, parts, strict=True)
        ]
        for run in split_runs(entries):
            future = pipeline.submit(
                functools.partial(legs.reduce, run, step, rescale),
                functools.partial(legs.gather, buffer),
            )
            rescale = None
        return future

    def average_sparse(
        self, buffer: Tensor, parameters: Sequence[Tensor], is_last: bool
    ) -> Future[Tensor]:
        """As :meth:`average`, for a bucket of one sparse gradient, which travels as it is.

        Raises:
            ConfigError: On a GPU: NCCL cannot send it.
        """
        if order.is_queued(buffer.device):
            names = ", ".join(map(self._registry.name, parameters))
            raise ConfigError(f"sparse gradient of {names} on {buffer.device}: must be dense")
        for parameter in parameters:
            self._registry.exclude(parameter, SPARSE)
            self._residuals.drop(self._registry.name(parameter))
        _, legs, pipeline = self._begin(buffer.device, is_last)
        if self._is_local:
            return _completed(buffer)
        return pipeline.submit(lambda: legs.sparse(buffer), lambda _: buffer)

    def close(self) -> None:
        """End the threads and give back the process groups. The model can do no further backward.

        Without it threads end with this object, but its groups (two, with a hierarchy six) are not
        used again.

        Ranks: all, between the same two steps.
        """
        if self._pipeline is not None and self._wiring is not None:
            self._pipeline.close()
            self._wiring.give_back()
            self._wiring = None

    def _placement(self) -> str:
        return f"nodes {self._ranks_of_nodes(self._nodes)}"

    def _traffics(self) -> Sequence[Traffic]:
        return (self._legs.reduce_traffic, self._legs.gather_traffic) if self._legs else ()

    def _title(self) -> str:
        return "DDP"

    def _remarks(self, *, verbose: bool) -> list[str]:
        remarks = super()._remarks(verbose=verbose)
        if self.hierarchy is not None:
            remarks.append(
                f"two levels: {len(self._nodes)} nodes of {len(self._nodes[0])} ranks, intra "
                f"{self.codecs.intra.spec}; bytes are those between nodes"
            )
        return remarks

    def _begin(self, device: torch.device, is_last: bool) -> tuple[int, Legs, Pipeline]:
        """The step of a bucket, counted, and what averages it."""
        if self._pipeline is None:
            self.start(device)
        assert self._pipeline is not None
        assert self._legs is not None
        step, self._steps = self._steps, self._steps + is_last
        return step, self._legs, self._pipeline

    @property
    def _is_local(self) -> bool:
        return self._world_size == 1 or isinstance(self.codec, NoopCodec)

    def _bind_one(self, parameter: Tensor) -> str:
        name = self._registry.name(parameter)
        if self._registry.admit(parameter):
            self._residuals.add(name, parameter, [self._shard(parameter.numel())])
        return name

    def _shard(self, numel: int) -> Shard:
        if self.hierarchy is None:
            return Shard(0, numel, numel)
        node, local_rank = place(self._nodes)
        return Shard(*share_of(numel, self.codec.block, local_rank, len(node)), numel)

    def _settings(self, device: torch.device) -> dict[str, str | int | float]:
        own = self._arithmetic(device) if isinstance(self.codec, LowRankCodec) else {}
        return {**super()._settings(device), **own}

    def _arithmetic(self, device: torch.device) -> dict[str, str | int]:
        """What matrix products depend on, which ranks must round alike."""
        return {
            "torch": torch.__version__,
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "float32 matmul precision": torch.get_float32_matmul_precision(),
            **({"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        }


def _completed(result: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[result.device] if result.is_cuda else [])
    future.set_result(result)
    return future
