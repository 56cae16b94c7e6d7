"""What the communication of any model has: settings, residuals, a state dict and a report."""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from commrt import ops
from commrt.codecs import ExactCodec, LowRankCodec, derive_seed
from commrt.collectives import Traffic, find_nodes, order
from commrt.errors import ConfigError
from commrt.hooks.registry import Registry
from commrt.hooks.report import CommStats, format_report
from commrt.hooks.residuals import Residuals, Unmatched
from commrt.hooks.state import STATE_VERSION, State, check_own, check_world, find_own
from commrt.hooks.wiring import Codecs, Nodes
from commrt.ops.format import PAYLOAD_VERSION

if TYPE_CHECKING:
    from torch.distributed.checkpoint import StorageReader


class BaseComm(abc.ABC):
    """The communication of one model: what it compresses, what it has sent, and its residuals."""

    def __init__(
        self,
        codecs: Codecs,
        *,
        min_numel: int,
        group: dist.ProcessGroup | None,
        seed: int,
        warmup: int,
        hierarchy: int | Sequence[Sequence[int]] | None,
        grad_scaler: GradScaler | None,
        residuals_on_host: bool = False,
    ) -> None:
        for name, value in (("min_numel", min_numel), ("warmup", warmup)):
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r}: must be an integer of at least 0")
        self.codecs = codecs
        self.codec, self.gather = codecs.codec, codecs.gather
        if isinstance(self.codec, LowRankCodec) and hierarchy is not None:
            raise ConfigError(f"hierarchy={hierarchy!r} with {self.codec.spec!r}: must be None")
        self.min_numel = min_numel
        self.group = group
        self.seed = seed
        self.warmup = warmup
        self.hierarchy = hierarchy
        self._grad_scaler = grad_scaler
        self._loss_scale = torch.ones(())
        self._registry = Registry(self.codec, min_numel)
        self._residuals = Residuals(self.codec, on_host=residuals_on_host)
        self._dense_bytes = 0
        self._steps = 0
        self._first_step = 0
        self._newest_scaled = -1
        self._is_detached = False
        self._device = torch.device("cpu")

    def stats(self) -> CommStats:
        """What has been sent so far. Call it between steps."""
        traffic = Traffic()
        for part in self._traffics():
            traffic.add(part)
        return CommStats(
            steps=self._steps - self._first_step,
            dense_bytes=self._dense_bytes,
            residual_bytes=self._residuals.num_bytes(),
            **dataclasses.asdict(traffic),
        )

    def residual_norm(self) -> float:
        """Euclidean norm of this rank's residuals. Decodes all of them: for now and then."""
        return self._residuals.norm()

    def report(self, *, verbose: bool = False) -> str:
        """What is compressed and how, what is not and why, and the bytes of each leg.

        ``verbose`` names every parameter that is not compressed, not only the first of each reason.
        """
        return format_report(
            stats=self.stats(),
            title=self._title(),
            codecs=self.codecs,
            world_size=dist.get_world_size(self.group) if dist.is_initialized() else 1,
            kernels=ops.status(self._device),
            num_compressed=sum(self._registry.compressed.values()),
            exempt=self._registry.exempt,
            remarks=self._remarks(verbose=verbose),
            verbose=verbose,
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
                then gets the mean of what they still owed, so that sum(e) / ranks, what the mean
                gradient is still due, stays what it was. A sharded model takes those of a DDP model
                and the other way round.
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
            unmatched = check_own(state, identity, self._residuals, strict, self._registry.exempt)
            states, own = [state], state
        else:
            unmatched = check_world(state, identity, self._residuals, strict, self._registry.exempt)
            states, own = list(state), find_own(state, identity)
        if own is not None:
            self._residuals.load(own)
        else:
            seed = derive_seed(self.seed, identity["rank"], states[0]["steps"])
            self._residuals.load_mean(states, seed)
        self._load(states)
        self._loss_scale = torch.tensor(states[0]["loss_scale"], device=self._device)
        self._first_step += int(states[0]["steps"]) - self._steps
        self._steps = int(states[0]["steps"])
        self._newest_scaled = -1
        return unmatched

    def distributed_state(self) -> dict[str, Tensor]:
        """The :meth:`state_dict` as ``torch.distributed.checkpoint.save`` takes it.

        On every rank::

            dcp.save({"model": ..., "comm": comm.distributed_state()}, checkpoint_id=path)
        """
        from commrt.hooks.distributed import flatten  # torch's checkpoints take long to import

        return flatten(self.state_dict(), self.group)

    def load_distributed(
        self, checkpoint: "str | Path | StorageReader", key: str = "comm"
    ) -> Unmatched:
        """Continue from what :meth:`distributed_state` wrote, on as many ranks or others.

        Args:
            checkpoint: Its folder, or a reader of its storage.
            key: Of the state in what was saved.

        Raises:
            StateError: As :meth:`load_state_dict`.

        Cost: each rank reads its own state or, if another world wrote it, everyone's, one residual
        at a time.
        """
        from commrt.hooks.distributed import read_states

        return self.load_state_dict(read_states(checkpoint, key, self.group))

    def detach(self) -> None:
        """From now on average gradients uncompressed; the residuals are given up.

        Ranks: all, between the same two steps. To compress again, wrap the model anew: DDP cannot
        forget a hook.
        """
        self._is_detached = True
        self._residuals.clear()

    @abc.abstractmethod
    def close(self) -> None:
        """End the threads and give back the process groups, for those who attach again.

        Without it threads end with this object, but its groups are not used again.

        Ranks: all, between the same two steps.
        """

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

    def _loss_scale_change(self, step: int) -> Tensor | None:
        """How much larger a step's gradients are than the last one's; stays on the device.

        None if they are not, or if the step has asked before.
        """
        if self._grad_scaler is None or step == self._newest_scaled:
            return None
        self._newest_scaled = step
        scale = self._grad_scaler.scale(torch.ones((), device=self._device))
        assert isinstance(scale, Tensor)
        ratio, self._loss_scale = scale / self._loss_scale, scale
        return None if not order.is_queued(self._device) and ratio == 1 else ratio

    def _settings(self, device: torch.device) -> dict[str, str | int | float]:
        """What ranks must have alike."""
        return {
            **self.codecs.specs(),
            "hierarchy": repr(self._nodes) if self.hierarchy is not None else "none",
            "min_numel": self.min_numel,
            "warmup": self.warmup,
            "grad_scaler": self._grad_scaler is not None,
            **self._registry.layout(),
            "payload version": PAYLOAD_VERSION,
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "codec": self.codec.spec,
            "rank": dist.get_rank(self.group),
            "world_size": dist.get_world_size(self.group),
            "placement": self._placement(),
        }

    @abc.abstractmethod
    def _placement(self) -> str:
        """Which rank keeps which residuals; equal on all ranks."""

    @abc.abstractmethod
    def _traffics(self) -> Sequence[Traffic]:
        """What was sent, one count for each thread."""

    @abc.abstractmethod
    def _title(self) -> str:
        """The kind of model, for the report."""

    def _load(self, states: Sequence[State]) -> None:  # noqa: B027 - nothing more for most
        """Load what else is in checked state dicts."""

    def _remarks(self, *, verbose: bool) -> list[str]:
        """Further lines of the report."""
        del verbose
        reason = self._plain_reason(self._steps)
        return [f"uncompressed all gradients now: {reason}"] if reason else []

    def _ranks_of_nodes(self, nodes: Nodes) -> list[list[int]]:
        """The ranks of each node, counted within the group."""
        ranks = sorted(rank for node in nodes for rank in node)
        return [[ranks.index(rank) for rank in node] for node in nodes]
