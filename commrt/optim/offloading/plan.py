"""What streams and what the host steps: chosen by the time that a step would take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from commrt.collectives import order
from commrt.optim.offloading.gradients import Gradients
from commrt.optim.offloading.link import Copy, Direction, Link
from commrt.optim.offloading.memory import streaming
from commrt.optim.parts import Part, flat
from commrt.optim.states import of_weights

if TYPE_CHECKING:
    from commrt.optim.base import StepOptimizer

PATCHED_SHARE = 0.15
"""Of a bf16 weight's bytes that travel if only changed bits do: a guess, for a small rate."""
_PROBE_BYTES = 32 << 20
_PROBE_NUMEL = 8 << 20
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a parameter costs.

    Attributes:
        parameter: Which.
        numel: Elements of this rank.
        state_bytes: That cross the link in each direction if it streams.
        grad_bytes: That come down if the host steps it.
        weight_bytes: That go up then.
    """

    parameter: nn.Parameter
    numel: int
    state_bytes: int
    grad_bytes: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of the machine, with this optimizer.

    Attributes:
        up: Bytes a second from host to device.
        down: Bytes a second from device to host.
        device: Elements a second that the device steps.
        host: Elements a second that the host steps.
    """

    up: float
    down: float
    device: float
    host: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which parameters the host steps.

    Attributes:
        loads: Of all parameters.
        rates: Measured.
        hosted: These; the others stream.
        times_s: Seconds a step, of each of ``up``, ``down``, ``device``, ``host``.
    """

    loads: Sequence[Load]
    rates: Rates
    hosted: frozenset[nn.Parameter]
    times_s: dict[str, float]

    @property
    def predicted_s(self) -> float:
        """Of a step: they work side by side."""
        return max(self.times_s.values())


def loads(optimizer: StepOptimizer, gradients: Gradients, *, is_patched: bool) -> list[Load]:
    """Of all parameters of an optimizer."""
    return [
        _load(optimizer, parameter, gradients, is_patched) for parameter in optimizer._parameters()
    ]


def _load(
    optimizer: StepOptimizer, parameter: nn.Parameter, gradients: Gradients, is_patched: bool
) -> Load:
    size = parameter.element_size()
    numel = state_bytes = grad_bytes = 0
    for layout in optimizer._layouts[parameter]:
        state = optimizer._new_part(layout, torch.device("meta"))
        names = streaming(optimizer, layout, state)
        state_bytes += sum(flat(state[name]).nbytes for name in names)
        grad_bytes += gradients.bytes_of(layout, parameter.dtype)
        numel += layout.numel
    share = PATCHED_SHARE if is_patched and size == 2 else 1.0
    return Load(
        parameter=parameter,
        numel=numel,
        state_bytes=state_bytes,
        grad_bytes=grad_bytes,
        weight_bytes=int(numel * size * share),
    )


def predict(streamed: Sequence[Load], hosted: Sequence[Load], rates: Rates) -> Plan:
    """The time of a step that is divided like this."""
    state = sum(load.state_bytes for load in streamed)
    return Plan(
        loads=(*hosted, *streamed),
        rates=rates,
        hosted=frozenset(load.parameter for load in hosted),
        times_s={
            "up": (state + sum(load.weight_bytes for load in hosted)) / rates.up,
            "down": (state + sum(load.grad_bytes for load in hosted)) / rates.down,
            "device": sum(load.numel for load in streamed) / rates.device,
            "host": sum(load.numel for load in hosted) / rates.host,
        },
    )


def choose(given: Sequence[Load], rates: Rates) -> Plan:
    """The division of least time: the host steps the first of them, up to some."""
    plans = (predict(given[count:], given[:count], rates) for count in range(len(given) + 1))
    return min(plans, key=lambda plan: plan.predicted_s)


def measure(optimizer: StepOptimizer, link: Link) -> Rates:
    """Of this machine, now: takes a fraction of a second."""
    return Rates(
        up=_link_rate(link, link.up, is_up=True),
        down=_link_rate(link, link.down, is_up=False),
        device=_step_rate(optimizer, link.device),
        host=_step_rate(optimizer, torch.device("cpu")),
    )


def _link_rate(link: Link, direction: Direction, *, is_up: bool) -> float:
    if math.isfinite(link.rate):
        return link.rate
    there = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=link.device)
    here = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=not link.is_emulated)
    before = direction.num_bytes
    probe = Copy(there, here) if is_up else Copy(here, there)
    seconds = _best(lambda: direction.move([probe]).settle(), link.device)
    direction.num_bytes = before
    return _PROBE_BYTES / seconds


def _step_rate(optimizer: StepOptimizer, device: torch.device) -> float:
    """Of one of the larger tensors, by steps of zeros."""
    pairs = [(p, layout) for p in optimizer._parameters() for layout in optimizer._layouts[p]]
    sizes = [layout.numel for _, layout in pairs]
    numel = max((size for size in sizes if size <= _PROBE_NUMEL), default=min(sizes))
    parameter, layout = pairs[sizes.index(numel)]
    meta = torch.device("meta")
    state = optimizer._new_part(layout, meta)
    state |= of_weights(layout, parameter, optimizer.weight_mode, meta)
    zeros = {name: torch.zeros_like(flat(value), device=device) for name, value in state.items()}
    weights = torch.zeros_like(layout.shard.local(parameter), device=device)
    part = Part(layout, weights, zeros, stochastic=optimizer._is_stochastic(layout))
    part.grad, part.step = torch.zeros_like(part.weights), 1
    batches = optimizer._batches
    options = optimizer._options(optimizer.param_groups[0], 1)
    calls = [
        call.bind(options, None, batches.seed_of)
        for call in batches.calls((part, *row) for row in batches.rows_of(part))
    ]

    def step() -> None:
        for call in calls:
            call()

    return max(numel, 1) / _best(step, device)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls; the first one does not count."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        begin = time.perf_counter()
        call()
        if order.is_queued(device):
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
