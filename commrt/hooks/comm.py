"""The communication of one model: what it compresses, what it has sent, and its residuals."""

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.futures import Future

from commrt import ops
from commrt.codecs import Codec, ExactCodec, LowRankCodec, NoopCodec, derive_seed
from commrt.collectives import (
    Pipeline,
    StreamPipeline,
    ThreadPipeline,
    Traffic,
    check_agreement,
    find_nodes,
    order,
    ring_all_reduce_bytes,
    share_of,
)
from commrt.errors import ConfigError
from commrt.hooks.legs import Entry, Legs, split_runs
from commrt.hooks.registry import Registry
from commrt.hooks.report import CommStats, format_report
from commrt.hooks.residuals import Residuals, Shard, Unmatched
from commrt.hooks.state import STATE_VERSION, State, check_own, check_world, find_own
from commrt.hooks.wiring import Codecs, Nodes, Wiring, place
from commrt.ops import FLOAT_DTYPES
from commrt.ops.format import PAYLOAD_VERSION

SPARSE = "sparse gradient, its bytes not counted"


class Comm:
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
        for name, value in (("min_numel", min_numel), ("warmup", warmup)):
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r}: must be an integer of at least 0")
        gather = "block8" if gather is None else gather
        self.codecs = Codecs.parse(codec, gather=gather, intra=intra, small=small)
        self.codec, self.gather = self.codecs.codec, self.codecs.gather
        if isinstance(self.codec, LowRankCodec) and hierarchy is not None:
            raise ConfigError(f"hierarchy={hierarchy!r} with {self.codec.spec!r}: must be None")
        self.min_numel = min_numel
        self.group = group
        self.seed = seed
        self.warmup = warmup
        self.hierarchy = hierarchy
        self.may_have_unused = True
        """Whether a gradient of zeros may mean a parameter that no rank has used."""
        self._grad_scaler = grad_scaler
        self._loss_scale = torch.ones(())
        self._registry = Registry(self.codec, min_numel)
        self._residuals = Residuals(self.codec)
        self._dense_bytes = 0
        self._steps = 0
        self._first_step = 0
        self._newest_coded = -1
        self._is_detached = False
        self._world_size = 1
        self._device = torch.device("cpu")
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
        rescale = self._loss_scale_change() if step != self._newest_coded else None
        self._newest_coded = step
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

    def stats(self) -> CommStats:
        """What has been sent so far. Call it between steps."""
        traffic = Traffic()
        if self._legs is not None:
            traffic.add(self._legs.reduce_traffic)
            traffic.add(self._legs.gather_traffic)
        return CommStats(
            steps=self._steps - self._first_step,
            dense_bytes=self._dense_bytes,
            residual_bytes=self._residuals.num_bytes(),
            **dataclasses.asdict(traffic),
        )

    def residual_norm(self) -> float:
        """Euclidean norm of this rank's residuals. Decodes all of them: for now and then."""
        return self._residuals.norm()

    def report(self) -> str:
        """What is compressed and how, what is not and why, and the bytes of each leg."""
        return format_report(
            stats=self.stats(),
            codecs=self.codecs,
            world_size=dist.get_world_size(self.group) if dist.is_initialized() else 1,
            nodes=None if self.hierarchy is None else self._nodes,
            kernels=ops.status(self._device),
            num_compressed=sum(self._registry.compressed.values()),
            exempt=self._registry.exempt,
            plain_reason=self._plain_reason(self._steps),
            is_queued=order.is_queued(self._device),
        )

    def state_dict(self) -> dict[str, Any]:
        """Residuals by parameter name, and the step count. Call it between steps.

        It differs from rank to rank: save one a rank. Holds tensors, strings and numbers only, so
        ``torch.load(weights_only=True)`` reads it.
        """
        return {
            **self._identity(),
            "steps": self._steps,
            "loss_scale": float(self._loss_scale),
            **self._residuals.state_dict(),
        }

    def load_state_dict(self, state: State | Sequence[State], strict: bool = True) -> Unmatched:
        """Continue from the :meth:`state_dict` of this rank, or from those of a former world.

        Args:
            state: That of the same rank and world size, restored to the bit. Or a list with those
                of all ranks of a former world, of any size and hierarchy, in any order: every rank
                then gets the mean of what they still owed, stochastically rounded, so that
                sum(e) / ranks, what the mean gradient is still due, stays what it was.
            strict: Refuse a state of other parameters. Otherwise those without a residual in it
                begin without, and residuals without a parameter are given up, as is right where
                layers were frozen or unfrozen and the model was wrapped anew.

        Returns:
            The names of both, none of either where ``strict``.

        Raises:
            StateError: Names what differs; nothing is changed.
        """
        identity = self._identity()
        own: State | None
        if isinstance(state, Mapping):
            unmatched = check_own(state, identity, self._residuals, strict)
            states, own = [state], state
        else:
            unmatched = check_world(state, identity, self._residuals, strict)
            states, own = list(state), find_own(state, identity)
        if own is not None:
            self._residuals.load(own)
        else:
            seed = derive_seed(self.seed, identity["rank"], states[0]["steps"])
            self._residuals.load_mean(states, len(states[0]["nodes"]), seed)
        self._loss_scale = torch.tensor(states[0]["loss_scale"], device=self._device)
        self._first_step += int(states[0]["steps"]) - self._steps
        self._steps = int(states[0]["steps"])
        self._newest_coded = -1
        return unmatched

    def detach(self) -> None:
        """From now on average uncompressed, as plain DDP does; the residuals are given up.

        Ranks: all, between the same two steps. DDP cannot forget a hook: to compress again, wrap
        the model anew.
        """
        self._is_detached = True
        self._residuals.clear()

    def close(self) -> None:
        """End the threads and process groups. The model can do no further backward.

        Without it threads end with this object, but groups (two, with a hierarchy six) stay as long
        as the default group.

        Ranks: all, between the same two steps.
        """
        if self._pipeline is not None and self._wiring is not None:
            self._pipeline.close()
            self._wiring.destroy()
            self._wiring = None

    @functools.cached_property
    def _nodes(self) -> Nodes:
        parent = self.group or dist.group.WORLD
        assert parent is not None
        hierarchy = 1 if self.hierarchy is None else self.hierarchy
        return find_nodes(hierarchy, dist.get_process_group_ranks(parent))

    def _plain_reason(self, step: int) -> str:
        """Why this step is averaged uncompressed; empty if it is not."""
        if self._is_detached:
            return "detached"
        if isinstance(self.codec, ExactCodec):
            return f"codec is {self.codec.spec}"
        if step < self.warmup:
            return f"warm-up: compressed from step {self.warmup} on"
        if self.hierarchy is not None and len(self._nodes) == 1:
            return "one node: nothing travels between nodes"
        return ""

    def _loss_scale_change(self) -> Tensor | None:
        """How much larger gradients are than in the last step; stays on the device."""
        if self._grad_scaler is None:
            return None
        scale = self._grad_scaler.scale(torch.ones((), device=self._device))
        assert isinstance(scale, Tensor)
        ratio, self._loss_scale = scale / self._loss_scale, scale
        return None if not order.is_queued(self._device) and ratio == 1 else ratio

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
            self._residuals.add(name, parameter, self._shard(parameter.numel()))
        return name

    def _shard(self, numel: int) -> Shard:
        if self.hierarchy is None:
            return Shard(0, numel, numel)
        node, local_rank = place(self._nodes)
        return Shard(*share_of(numel, self.codec.block, local_rank, len(node)), numel)

    def _settings(self, device: torch.device) -> dict[str, str | int | float]:
        return {
            **self.codecs.specs(),
            "hierarchy": repr(self._nodes) if self.hierarchy is not None else "none",
            "min_numel": self.min_numel,
            "warmup": self.warmup,
            "grad_scaler": self._grad_scaler is not None,
            **self._registry.layout(),
            "payload version": PAYLOAD_VERSION,
            **(self._arithmetic(device) if isinstance(self.codec, LowRankCodec) else {}),
        }

    def _arithmetic(self, device: torch.device) -> dict[str, str | int]:
        """What matrix products depend on, which ranks must round alike."""
        return {
            "torch": torch.__version__,
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "float32 matmul precision": torch.get_float32_matmul_precision(),
            **({"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "codec": self.codec.spec,
            "rank": dist.get_rank(self.group),
            "world_size": dist.get_world_size(self.group),
            "nodes": self._node_ranks(),
        }

    def _node_ranks(self) -> list[list[int]]:
        """The ranks of each node, counted within the group."""
        ranks = sorted(rank for node in self._nodes for rank in node)
        return [[ranks.index(rank) for rank in node] for node in self._nodes]


def _completed(result: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[result.device] if result.is_cuda else [])
    future.set_result(result)
    return future
