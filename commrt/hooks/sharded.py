"""The communication of one sharded model, unit by unit: what FSDP1 and FSDP2 have in common."""

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd import Variable
from torch.futures import Future

from commrt import ops
from commrt.codecs import (
    Codec,
    DeltaCodec,
    ExactCodec,
    LowRankCodec,
    NoopCodec,
)
from commrt.collectives import (
    ThreadPipeline,
    Traffic,
    check_agreement,
    find_nodes,
    order,
    ring_all_reduce_bytes,
    ring_scatter_bytes,
)
from commrt.errors import CollectiveError, ConfigError
from commrt.hooks.base import BaseComm
from commrt.hooks.gathers import Gathers
from commrt.hooks.lender import Lender
from commrt.hooks.reductions import Plain, Reductions
from commrt.hooks.report import exempt_lines
from commrt.hooks.residuals import Shard, Unmatched
from commrt.hooks.state import State
from commrt.hooks.units import Unit, UnitLayout
from commrt.hooks.wiring import LANES, Codecs, Nodes, ShardWiring, place
from commrt.ops.format import FLOAT_DTYPES

MAX_PENDING = 4
"""Units whose gradients may be on their way while backward goes on."""


class ShardedComm(BaseComm):
    """Compressed communication of one FSDP model; made by :func:`commrt.attach`.

    On a GPU everything is queued on the stream that FSDP calls it on. On a CPU, where nothing else
    would overlap with the computation, gradients and weights have a thread each, and backward waits
    at its end for the gradients whose use FSDP leaves to the optimizer.

    Args:
        kind: Of the model, for the report: ``"FSDP2"``.
        units: Its units, named, in the same order on all ranks.
        **others: See :func:`commrt.attach`.

    Raises:
        ConfigError: The settings do not fit together or to the model.
    """

    def __init__(
        self,
        kind: str,
        units: Sequence[Unit],
        codec: str | Codec,
        gather: str | Codec | None,
        *,
        min_numel: int,
        group: dist.ProcessGroup,
        seed: int,
        warmup: int,
        hierarchy: int | Sequence[Sequence[int]] | None,
        intra: str | Codec,
        small: str | Codec,
        returns: str | Codec | None,
        grad_scaler: GradScaler | None,
        residuals: str,
    ) -> None:
        gather = "none" if gather is None else gather
        returns = "block8" if returns is None else returns
        super().__init__(
            Codecs.parse(codec, weights=gather, gather=returns, intra=intra, small=small),
            min_numel=min_numel,
            group=group,
            seed=seed,
            warmup=warmup,
            hierarchy=hierarchy,
            grad_scaler=grad_scaler,
            residuals_on_host=residuals == "host",
        )
        if residuals not in ("device", "host"):
            raise ConfigError(f"residuals={residuals!r}: must be 'device' or 'host'")
        if residuals == "host" and grad_scaler is not None:
            raise ConfigError("residuals='host' with grad_scaler: must be 'device' to be rescaled")
        if isinstance(self.codec, LowRankCodec):
            raise ConfigError(f"codec={self.codec.spec!r}: no rank of a sharded model has matrices")
        self.kind = kind
        self.units = units
        self._is_hybrid = any(unit.replicas for unit in units)
        if self._is_hybrid and hierarchy is not None:
            raise ConfigError(f"hierarchy={hierarchy!r}: must be None where shards have replicas")
        self._gathers = Gathers(self.codecs.weights, min_numel)
        self._is_on_host = residuals == "host"
        self._is_closed = False
        self._wirings: list[ShardWiring] = []
        self._workers: list[ThreadPipeline] = []
        self._weight_workers: list[order.FifoWorker] = []
        self._restores: list[Callable[[], object]] = []
        self._seen: set[tuple[str, str]] = set()
        self._backward = -1
        self._pending: list[Future[Tensor]] = []
        self._senders_of = {unit.name: self._senders(unit) for unit in units}
        self._reductions = Reductions(
            self.codec,
            self._registry,
            self._residuals,
            self._senders_of,
            seed=seed,
            rank=dist.get_rank(group),
        )
        for unit in units:
            sizes = unit.layout.largest
            for name, (like, is_trained) in unit.parameters.items():
                self._gathers.bind(name, like, self._reason(sizes, name))
                if is_trained:
                    self._bind(unit, name)

    def start(self) -> None:
        """Make the process groups and threads, and compare settings over the ranks.

        Ranks: every rank of the group.

        Raises:
            PeerMismatchError: On every rank, if the settings differ.
        """
        assert self.group is not None
        self._device = device = self.units[0].device
        self._loss_scale = self._loss_scale.to(device)
        check_agreement(self._settings(device), self.group, device)
        if device.type == "cuda" and ops.status(device).startswith("reference"):
            warnings.warn(f"slow ops on {device}: {ops.status(device)}", stacklevel=3)
        num_lanes = 1 if order.is_queued(device) else LANES
        wirings: dict[tuple[object, ...], ShardWiring] = {}
        for number, unit in enumerate(self.units):
            unit.lane = number % num_lanes
            shared = (unit.shards, unit.replicas, unit.lane)
            if shared not in wirings:
                nodes = self._nodes_of(unit)
                wirings[shared] = ShardWiring(
                    self.codecs, unit.shards, nodes, unit.replicas, device
                )
            unit.wiring = wirings[shared]
        self._wirings = list(wirings.values())
        if self._is_on_host:
            self._reductions.lender = Lender(self._residuals, device)
        if order.is_queued(device):
            return
        for lane in range(num_lanes):
            # Threads of their own: ranks queue weights and means in different orders.
            self._workers.append(ThreadPipeline())
            self._weight_workers.append(order.FifoWorker(f"commrt-weights-{lane}"))
            weakref.finalize(self, self._workers[-1].close, wait=False)
            weakref.finalize(self, self._weight_workers[-1].close, wait=False)

    def reduce_scatter(
        self,
        unit: Unit,
        layout: Callable[[], UnitLayout],
        output: Tensor,
        input: Tensor,
        *,
        scale: float,
        plain: Plain,
        may_defer: bool,
    ) -> None:
        """Bring the gradients of a unit to their owners.

        Args:
            unit: Which.
            layout: Tells what is in the buffers, the same on all ranks.
            output: (chunk), overwritten with ``scale`` times the mean of this rank's chunk.
            input: (W * chunk), this rank's gradients.
            scale: W where a sum is wanted.
            plain: The uncompressed way to fill ``output``.
            may_defer: Whether nobody looks at ``output`` before backward is over.
        """
        step = self._begin(unit, "reduce")
        wiring = self._wiring(unit)
        self._count_dense(unit, input, self._nodes_of(unit))
        if self._is_noop:
            output.copy_(input.view(-1, output.numel())[unit.rank])
        elif self._is_plain(input, step) or wiring.scatterer is None:
            job = functools.partial(
                self._reductions.plain_scatter, unit, wiring, output, input, plain
            )
            self._run(unit, job, may_defer)
        else:
            self._rescale(step)
            parts = self._bind_new(unit, layout())
            job = functools.partial(
                self._reductions.scatter,
                *(unit, wiring, parts, output, input, step, scale),
            )
            self._run(unit, job, may_defer)

    def all_reduce(
        self,
        unit: Unit,
        layout: Callable[[], UnitLayout],
        output: Tensor,
        *,
        group: dist.ProcessGroup,
        scale: float,
        plain: Plain,
        may_defer: bool,
    ) -> None:
        """Average this rank's chunk of gradients over its replicas, in place.

        Args:
            unit: Which.
            layout: Tells what is in the chunk.
            output: (chunk), overwritten with ``scale`` times the mean.
            group: The replicas.
            scale: Their number where a sum is wanted.
            plain: The uncompressed way.
            may_defer: Whether nobody looks at ``output`` before backward is over.
        """
        step = self._begin(unit, "average")
        wiring = self._wiring(unit)
        num_ranks = dist.get_world_size(group)
        self._dense_bytes += ring_all_reduce_bytes(output.nbytes, num_ranks)
        if self._is_noop or num_ranks == 1:
            return
        if self._is_plain(output, step) or wiring.averager is None:
            job = functools.partial(self._reductions.plain_mean, wiring, output, plain, num_ranks)
            self._run(unit, job, may_defer)
            return
        self._rescale(step)
        parts = self._bind_new(unit, layout())
        if not any(part.owner == unit.rank for part in parts.parts):
            return  # padding alone, on all replicas
        reductions = self._reductions
        first = functools.partial(reductions.first_leg, unit, wiring, parts, output, step)
        second = functools.partial(reductions.second_leg, wiring, output, scale)
        if not self._workers:
            second(first())
        else:
            self._settle(self._workers[unit.lane].submit(first, second), may_defer)

    def all_gather(
        self,
        unit: Unit,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        *,
        is_async: bool,
    ) -> dist.Work | None:
        """Gather the weights of a unit.

        Args:
            unit: Which.
            output: (W * chunk), overwritten, the same bits on every rank.
            input: (chunk) of weights, this rank's; may be a view of its place in ``output``.
            group: The shard group, or another over which FSDP gathers what it has resharded.
            is_async: Whether the work may be returned unfinished.

        Returns:
            The work to wait for, if it is not finished or queued.
        """
        wiring = self._wiring(unit)
        lane = unit.lane
        if group is not unit.shards:
            # All on one thread: the group is FSDP's own, whose gathers must keep their order.
            lane, wiring = 0, self._wirings[0]
            job = functools.partial(self._gathers.resharded, wiring, output, input, group)
        else:
            self._count_dense(unit, output, [[rank] for rank in wiring.ranks])
            job = functools.partial(self._gathers.gather, unit, wiring, output, input)
        if self._is_noop:
            rows = output.view(-1, input.numel())
            rows.copy_(input.clone().expand_as(rows))
            return None
        if not self._weight_workers:
            job()
            return None
        is_inference = torch.is_inference_mode_enabled()

        def in_same_mode() -> Tensor:
            with torch.inference_mode(is_inference):
                return job()

        work = _FutureWork(order.submit_to(self._weight_workers[lane], in_same_mode))
        if is_async:
            return work
        work.wait()
        return None

    @property
    def _is_noop(self) -> bool:
        return isinstance(self.codec, NoopCodec) and not self._is_detached

    @property
    def compresses(self) -> bool:
        """Whether gradients are compressed, so that buffers must keep their layout."""
        return not isinstance(self.codec, ExactCodec)

    @property
    def sends_differences(self) -> bool:
        """Whether weights must stay gathered from forward to backward."""
        return isinstance(self.codecs.weights, DeltaCodec)

    def on_close(self, restore: Callable[[], object]) -> None:
        """Have :meth:`close` call it."""
        self._restores.append(restore)

    def forget_weights(self) -> None:
        """Send all weights in full at the next gather.

        For ``gather="delta4"``, after weights were changed otherwise than by a step: what a large
        change leaves out of 4 bits is made up for only by the gathers after the next.

        Ranks: all, between the same two steps.
        """
        self._gathers.forget(self.units)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`BaseComm`; with weights as differences also those decoded last."""
        self._reductions.settle_host()
        return {
            **super().state_dict(),
            "weights": self._gathers.state_dict(self.units),
            "has_weights": any(unit.references is not None for unit in self.units),
        }

    def residual_norm(self) -> float:
        """See :class:`BaseComm`."""
        self._reductions.settle_host()
        return super().residual_norm()

    def load_state_dict(self, state: State | Sequence[State], strict: bool = True) -> Unmatched:
        """See :class:`BaseComm`."""
        self._reductions.settle_host()
        return super().load_state_dict(state, strict)

    def _load(self, states: Sequence[State]) -> None:
        self._seen.clear()
        if all(state.get("has_weights") for state in states):
            self._gathers.load(self.units, [state["weights"] for state in states])
        else:
            self._gathers.forget(self.units)

    def close(self) -> None:
        """See :class:`BaseComm`; an FSDP2 model goes on as without commrt."""
        for pipeline in self._workers:
            pipeline.close()
        for worker in self._weight_workers:
            worker.close()
        for restore in self._restores:
            restore()
        self._restores.clear()
        if not self._is_closed:
            for wiring in self._wirings:
                wiring.give_back()
        self._is_closed = True
        for unit in self.units:
            unit.wiring = None

    def _bind(self, unit: Unit, name: str) -> None:
        """Decide on a parameter that is trained, and make its residual."""
        like = unit.parameters[name].like
        self._registry.name(like, name)
        if self._registry.admit(like, self._reason(unit.layout.largest, name)):
            shards = unit.layout.shards(self._senders_of[unit.name])
            none = [Shard(0, 0, like.numel())]  # it is others' to send
            self._residuals.add(name, like, shards.get(name, none), unit.device)

    def _bind_new(self, unit: Unit, layout: UnitLayout) -> UnitLayout:
        """Bind what was frozen when the communication began."""
        for name in layout.largest:
            if name not in self._registry.compressed and name not in self._registry.exempt:
                self._bind(unit, name)
        return layout

    def _reason(self, sizes: Mapping[str, int], name: str) -> str:
        """Why a parameter is cut too small to be compressed; empty if it is not."""
        is_small = sizes.get(name, 0) < self.codec.block
        return f"shards of fewer than {self.codec.block} elements" if is_small else ""

    def _senders(self, unit: Unit) -> list[int]:
        """The owners whose parts this rank sends at low bits, with a residual."""
        if unit.replicas is not None:
            return [unit.rank]
        nodes = self._nodes_of(unit)
        ranks = dist.get_process_group_ranks(unit.shards)
        local_rank = place(nodes)[1]
        return sorted(ranks.index(node[local_rank]) for node in nodes)

    def _nodes_of(self, unit: Unit) -> Nodes:
        hierarchy = 1 if self.hierarchy is None else self.hierarchy
        return find_nodes(hierarchy, dist.get_process_group_ranks(unit.shards))

    def _begin(self, unit: Unit, leg: str) -> int:
        """The step that a unit's leg belongs to: a new one, where this one has had it already."""
        if not self._seen or (unit.name, leg) in self._seen:
            self._seen.clear()
            self._steps += 1
        self._seen.add((unit.name, leg))
        return self._steps - 1

    def _wait_at_the_end(self) -> None:
        """Have the backward that is under way wait, when it ends, for all that was deferred.

        With reentrant checkpointing one backward is inside another, and each waits.
        """
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            Variable._execution_engine.queue_callback(self._wait)

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        self._backward = -1
        for future in pending:
            future.wait()

    def _rescale(self, step: int) -> None:
        """Bring residuals up to a step's loss scale; no thread is at work when a step begins."""
        change = self._loss_scale_change(step)
        if change is not None:
            self._residuals.rescale_(change)

    def _run(self, unit: Unit, job: Callable[[], Tensor], may_defer: bool) -> None:
        if not self._workers:
            job()
        else:
            self._settle(self._workers[unit.lane].submit_first(job), may_defer)

    def _settle(self, future: Future[Tensor], may_defer: bool) -> None:
        if may_defer and torch._C._current_graph_task_id() != -1:
            self._pending.append(future)
            self._wait_at_the_end()
            if len(self._pending) > MAX_PENDING:  # or all unsharded gradients could be alive
                self._pending.pop(0).wait()
        else:
            future.wait()

    def _is_plain(self, tensor: Tensor, step: int) -> bool:
        return bool(self._plain_reason(step)) or tensor.dtype not in FLOAT_DTYPES

    def _wiring(self, unit: Unit) -> ShardWiring:
        if unit.wiring is None:
            raise CollectiveError("closed: no more collectives after close()")
        return unit.wiring

    def _count_dense(self, unit: Unit, buffer: Tensor, nodes: Nodes) -> None:
        """What a ring between nodes sends of a unit's buffer, on this rank."""
        if unit.replicas is None:
            self._dense_bytes += ring_scatter_bytes(buffer.nbytes, len(nodes)) // len(nodes[0])

    def _placement(self) -> str:
        shards = {
            f"{unit.layout.world_size} shards"
            if unit.replicas is not None
            else f"nodes {self._ranks_of_nodes(self._nodes_of(unit))}"
            for unit in self.units
        }
        return f"{self.kind}, {', '.join(sorted(shards))}"

    def _traffics(self) -> Sequence[Traffic]:
        return [
            traffic
            for wiring in self._wirings
            for traffic in (wiring.reduce_traffic, wiring.return_traffic, wiring.weight_traffic)
        ]

    def _title(self) -> str:
        return self.kind

    def _remarks(self, *, verbose: bool) -> list[str]:
        weights = self._gathers.registry
        remarks = [
            f"weights as they are: {line}" for line in exempt_lines(weights.exempt, verbose=verbose)
        ]
        if self._is_on_host:
            remarks.append("residuals in host memory, on the device those of two units at a time")
        if self.kind == "FSDP1":
            remarks.append("weights are gathered by FSDP1 itself, and not counted")
        if self.hierarchy is not None:
            remarks.append(
                f"two levels: nodes of {len(self._nodes[0])} ranks, intra "
                f"{self.codecs.intra.spec}; bytes of gradients are those between nodes"
            )
        return remarks + super()._remarks(verbose=verbose)


class _FutureWork(dist.Work):
    """Work on another thread, for those who wait for a ``Work``."""

    def __init__(self, future: Future[Tensor]) -> None:
        super().__init__()
        self._future = future

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until it is done; raises what it raised."""
        del timeout
        self._future.wait()
        return True
