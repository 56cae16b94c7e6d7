"""The communication of one model: what it compresses, what it has sent, and its residuals."""

import dataclasses
import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from commrt import ops
from commrt.codecs import Codec, ExactCodec, LocoCodec, derive_seed, parse, with_block
from commrt.collectives import (
    Pipeline,
    Reducer,
    StreamPipeline,
    ThreadPipeline,
    Traffic,
    all_reduce_exact_,
    check_agreement,
    check_gather,
    ring_all_reduce_bytes,
)
from commrt.errors import ConfigError, StateError
from commrt.hooks.report import format_report
from commrt.hooks.residuals import STATE_VERSION, Residuals
from commrt.ops import FLOAT_DTYPES
from commrt.ops.format import PAYLOAD_VERSION

# Elements coded at a time: DDP's first bucket is the whole model, whose payloads would take memory
# that no later step needs.
MAX_RUN = 8 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommStats:
    """What this rank has sent since the hook was attached.

    Attributes:
        steps: Backward passes that were communicated.
        reduce_bytes: Sent on the reduce leg (gradients to their owners).
        gather_bytes: Sent on the gather leg (means back to everybody).
        exact_bytes: Sent by the uncompressed all-reduces.
        dense_bytes: What a ring all-reduce of the same buckets, uncompressed, sends.
        residual_bytes: Memory of the residuals.
        codec_s: Seconds spent encoding and decoding.
        network_s: Seconds spent inside the process group.
    """

    steps: int
    reduce_bytes: int
    gather_bytes: int
    exact_bytes: int
    dense_bytes: int
    residual_bytes: int
    codec_s: float
    network_s: float

    @property
    def wire_bytes(self) -> int:
        """All bytes sent."""
        return self.reduce_bytes + self.gather_bytes + self.exact_bytes

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than uncompressed; 1 before the first step."""
        return self.dense_bytes / self.wire_bytes if self.wire_bytes else 1.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter's part of a bucket: a flat view of its gradient."""

    name: str
    grad: Tensor


class Comm:
    """Compressed gradient averaging for one DDP model.

    Made by :func:`commrt.attach`. To register the hook yourself, or through Lightning's
    ``DDPStrategy(ddp_comm_state=..., ddp_comm_hook=...)``, make one and pass it as the state of
    :func:`commrt.ddp_hook`; parameters are then named by the order in which DDP first shows them,
    unless :meth:`bind` is called.

    Args:
        codec: Of the reduce leg: a spec string or codec; ``"none"`` is plain averaging, counted.
        gather: Of the return leg; its block size follows the codec's.
        min_numel: Parameters with fewer elements, and all with fewer than two dimensions, travel
            uncompressed: 0.3 % of the elements, most of the harm.
        group: Process group of the model; None is the default one.
        seed: Of stochastic rounding.

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
    ) -> None:
        if not isinstance(min_numel, int) or min_numel < 0:
            raise ConfigError(f"min_numel={min_numel!r}: must be an integer of at least 0")
        self.codec = parse(codec)
        self.gather = with_block("block8" if gather is None else gather, self.codec.block)
        check_gather(self.codec, self.gather)
        self.min_numel = min_numel
        self.group = group
        self.seed = seed
        self._names: dict[Tensor, str] = {}
        self._exempt: dict[str, tuple[str, int]] = {}
        self._num_compressed = 0
        self._residuals = Residuals(self.codec)
        # One for each leg: they run on threads of their own.
        self._reduce_traffic, self._gather_traffic = Traffic(), Traffic()
        self._dense_bytes = 0
        self._steps = 0
        self._first_step = 0
        self.may_have_unused = True
        """Whether a gradient of zeros may mean a parameter that no rank has used."""
        self._is_detached = False
        self._reducer: Reducer | None = None
        self._pipeline: Pipeline | None = None

    def bind(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Name the parameters, and make their residuals."""
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                self._bind_one(name, parameter)

    def start(self, device: torch.device) -> None:
        """Make the process groups and threads, and compare settings over the ranks.

        Ranks: every rank of the group. Done by the first backward if not before.

        Raises:
            PeerMismatchError: On every rank, if the settings differ.
        """
        parent = self.group or dist.group.WORLD
        assert parent is not None
        check_agreement(self._settings(), parent, device)
        reduce_group, gather_group = _own_groups(parent, device)
        self._reducer = Reducer(self.codec, self.gather, reduce_group, gather_group)
        is_cuda = device.type == "cuda"
        self._pipeline = StreamPipeline(device) if is_cuda else ThreadPipeline()
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
        if self._pipeline is None:
            self.start(buffer.device)
        assert self._pipeline is not None
        assert self._reducer is not None
        step, self._steps = self._steps, self._steps + is_last
        if self._reducer.world_size == 1:
            return _completed(buffer)
        num_bytes = buffer.numel() * buffer.element_size()
        self._dense_bytes += ring_all_reduce_bytes(num_bytes, self._reducer.world_size)
        if self._is_detached or isinstance(self.codec, ExactCodec):
            whole = [buffer]
            return self._pipeline.submit(lambda: self._exact(whole), lambda _: buffer)
        entries = [Entry(self._bind_one(self._name(param), param), grad) for param, grad in parts]
        exact = [entry.grad for entry in entries if entry.name in self._exempt]
        for coded in _runs([entry for entry in entries if entry.name not in self._exempt]):
            future = self._pipeline.submit(
                functools.partial(self._reduce, coded, exact, step),
                functools.partial(self._gather, coded, buffer),
            )
            exact = []
        return future

    def stats(self) -> CommStats:
        """What has been sent so far. Call it between steps."""
        traffic = Traffic()
        traffic.add(self._reduce_traffic)
        traffic.add(self._gather_traffic)
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
            codec=self.codec.spec,
            gather=self.gather.spec,
            world_size=dist.get_world_size(self.group) if dist.is_initialized() else 1,
            kernels=ops.status(),
            num_compressed=self._num_compressed,
            exempt=self._exempt,
            is_detached=self._is_detached,
        )

    def state_dict(self) -> dict[str, Any]:
        """Residuals by parameter name, and the step count. Call it between steps.

        It differs from rank to rank: save one a rank. Holds tensors, strings and integers only, so
        ``torch.load(weights_only=True)`` reads it.
        """
        return {
            "version": STATE_VERSION,
            "codec": self.codec.spec,
            "rank": dist.get_rank(self.group),
            "world_size": dist.get_world_size(self.group),
            "steps": self._steps,
            "residuals": self._residuals.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict` of the same rank, world size, codec and model.

        Raises:
            StateError: Names what differs; nothing is changed.
        """
        expected = {
            "version": STATE_VERSION,
            "codec": self.codec.spec,
            "rank": dist.get_rank(self.group),
            "world_size": dist.get_world_size(self.group),
        }
        for key in (*expected, "steps", "residuals"):
            if key not in state:
                raise StateError(f"state dict has no {key!r}: it is not one of commrt's")
        for key, value in expected.items():
            if state[key] != value:
                raise StateError(f"state dict has {key}={state[key]!r}: must be {value!r} here")
        self._residuals.load_state_dict(state["residuals"])
        self._first_step += int(state["steps"]) - self._steps
        self._steps = int(state["steps"])

    def detach(self) -> None:
        """From now on average uncompressed, as plain DDP does; the residuals are given up.

        Ranks: all, between the same two steps. DDP cannot forget a hook: to compress again, wrap
        the model anew.
        """
        self._is_detached = True
        self._residuals = Residuals(ExactCodec())

    def _bind_one(self, name: str, parameter: Tensor) -> str:
        if parameter not in self._names:
            self._names[parameter] = name
            reason = self._exemption(parameter)
            if reason:
                self._exempt[name] = (reason, parameter.numel())
            else:
                self._num_compressed += parameter.numel()
                self._residuals.add(name, parameter.numel(), parameter.device)
        return self._names[parameter]

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(parameter, f"parameter.{len(self._names)}")

    def _exemption(self, parameter: Tensor) -> str:
        if isinstance(self.codec, ExactCodec):
            return "codec is none"
        if parameter.dtype not in FLOAT_DTYPES:
            return f"dtype {parameter.dtype}"
        if parameter.numel() == 0:
            return "empty"
        if parameter.dim() < 2:
            return "fewer than 2 dimensions"
        if parameter.numel() < self.min_numel:
            return f"fewer than {self.min_numel} elements"
        return ""

    def _settings(self) -> dict[str, str | int | float]:
        layout = [(name, parameter.numel()) for parameter, name in self._names.items()]
        return {
            "codec": self.codec.spec,
            "gather": self.gather.spec,
            "min_numel": self.min_numel,
            "parameters": len(layout),
            "layout": derive_seed(repr(layout)),
            "payload version": PAYLOAD_VERSION,
        }

    def _exact(self, tensors: list[Tensor]) -> None:
        assert self._reducer is not None
        self._reduce_traffic.add(all_reduce_exact_(tensors, self._reducer.reduce_group))

    def _reduce(self, coded: list[Entry], exact: list[Tensor], step: int) -> Any:
        """First leg: encode and exchange; uncompressed parameters go in one small all-reduce."""
        assert self._reducer is not None
        received = None
        if coded:
            names = [entry.name for entry in coded]
            grads = [entry.grad for entry in coded]
            if isinstance(self.codec, LocoCodec) and self.codec.is_reset(step):
                self._residuals.reset(names)
            layout = self._reducer.layout(grads)
            residuals = [self._residual_of(entry) for entry in coded]
            rank = self._reducer.rank
            seeds = [derive_seed(self.seed, rank, step, name) for name in names]
            send = self._reducer.encode(grads, layout, residuals, seeds, self._reduce_traffic)
            received = self._reducer.reduce_leg(send, layout, self._reduce_traffic)
        if exact:
            flat = torch.cat(exact)
            self._exact([flat])
            for grad, mean in zip(exact, flat.split([grad.numel() for grad in exact]), strict=True):
                grad.copy_(mean)
        return received

    def _residual_of(self, entry: Entry) -> Tensor | None:
        """The parameter's residual; an empty stand-in where the parameter may be unused.

        DDP drops the mean of a parameter that no rank has used, so nothing may be sent for it.
        """
        residual = self._residuals.get(entry.name)
        if residual is None or not self.may_have_unused:
            return residual
        is_zero = float(torch.linalg.vector_norm(entry.grad, ord=float("inf"))) == 0
        return torch.zeros_like(residual) if is_zero else residual

    def _gather(self, coded: list[Entry], buffer: Tensor, received: Tensor | None) -> Tensor:
        """Second leg: average, gather and decode into the bucket."""
        assert self._reducer is not None
        if received is not None:
            grads = [entry.grad for entry in coded]
            layout = self._reducer.layout(grads)
            self._reducer.gather_leg(received, layout, grads, self._gather_traffic)
        return buffer


def _own_groups(
    parent: dist.ProcessGroup, device: torch.device
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """A group for each leg, of the parent's ranks; on CUDA one stream orders both in one group.

    Ranks outside the parent do not call. torch names a group made without them after the number of
    groups a rank knows, so that has to be the same on all of the parent's ranks.
    """
    ranks = dist.get_process_group_ranks(parent)
    is_world = len(ranks) == dist.get_world_size()
    if not is_world:
        check_agreement({"number of process groups": _num_groups()}, parent, device)
    timeout = parent._get_backend(device).options._timeout
    groups = [
        dist.new_group(ranks, timeout=timeout, use_local_synchronization=not is_world)
        for _ in range(1 if device.type == "cuda" else 2)
    ]
    return groups[0], groups[-1]


def _num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_names)


def _runs(entries: list[Entry]) -> list[list[Entry]]:
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


def _completed(result: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[result.device] if result.is_cuda else [])
    future.set_result(result)
    return future
