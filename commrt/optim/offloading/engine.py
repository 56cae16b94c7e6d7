"""What stands between an optimizer and its state where that is in host memory."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from commrt.errors import ConfigError, OffloadError
from commrt.optim.offloading.backward import Backward
from commrt.optim.offloading.gates import Gates
from commrt.optim.offloading.gradients import Gradients
from commrt.optim.offloading.lanes import Done, Lane, Nothing, first_cause, until_now
from commrt.optim.offloading.link import Copies, Copy, Link, Mover, Reading, Writing, copy
from commrt.optim.offloading.memory import Memory
from commrt.optim.offloading.pipeline import Chunk, Pipeline, catch_up
from commrt.optim.offloading.plan import Plan
from commrt.optim.offloading.report import describe
from commrt.optim.offloading.schedule import Buffers, Group, Schedule
from commrt.optim.parts import State
from commrt.optim.sections import Layout
from commrt.optim.states import OWED

if TYPE_CHECKING:
    from commrt.optim.base import StepOptimizer

_MOST_SCHEDULES = 8


class Engine:
    """Keeps the state of an optimizer in host memory, and updates its parameters.

    Args:
        optimizer: Whose.
        plan: Which parameters the host steps; the state of the others streams.
        link: To their device.
        lanes: Of the device's steps, and of the host's.
        gradients: Brings them to the host.
        is_patched: Whether only the bits of weights go back that have changed.
        folder: Keep the state in a file there.
        chunk_bytes: Of state that are stepped at a time.

    Attributes:
        plan: See above.
        link: See above; counts bytes.
        memory: Of the host.
        overlaps: Whether a step may end during the next forward.

    Raises:
        OffloadError: There is not as much host memory.
    """

    def __init__(
        self,
        optimizer: StepOptimizer,
        plan: Plan,
        link: Link,
        lanes: tuple[Lane, Lane],
        gradients: Gradients,
        *,
        is_patched: bool,
        folder: Path | None,
        chunk_bytes: int,
    ) -> None:
        self.plan, self.link = plan, link
        self._optimizer, self._lanes = optimizer, lanes
        self._device, self._gradients = link.device, gradients
        self._is_patched, self._chunk_bytes = is_patched, chunk_bytes
        on_device, on_host = lanes
        self._disk: list[Reading | Writing] = []
        inbound: Mover = link.up
        outbound: Mover = link.down
        if folder is not None:
            self._disk = [Reading(link.up), Writing(link.down)]
            inbound, outbound = self._disk
        self._streams = Pipeline(inbound, on_device, outbound, link.device, is_hosted=False)
        self._hosts = Pipeline(link.down, on_host, link.up, link.device, is_hosted=True)
        self.memory = Memory(
            optimizer, plan.hosted, gradients, link.device, folder, sends_patches=is_patched
        )
        self._host_factor = torch.empty(
            (), dtype=torch.float32, device="cpu", pin_memory=not link.is_emulated
        )
        self._known: tuple[Copies, Done] = (), Nothing()
        self._buffers = Buffers(link.device)
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._running: list[Chunk] = []
        self._serving: dict[Layout, list[Chunk]] = {}
        self._places: dict[Layout, int] = {}
        self._failure: BaseException | None = None
        self._gates: Gates | None = None
        self._backward: Backward | None = None
        self._num_steps = 0
        self._last_s: float | None = None
        self.overlaps = False

    def overlap(self, model: nn.Module, *, in_backward: bool) -> None:
        """End steps during the next forward of a model, and begin with gradients during backward.

        Args:
            model: Which.
            in_backward: Step what streams when its gradients are final.
        """
        if self._gradients.codec is None:  # which would owe twice what is encoded twice
            self._backward = Backward(
                self._optimizer, self.plan.hosted, self._streams, self._hosts, self._device,
                steps_streams=in_backward,
            )  # fmt: skip
        self._gates = Gates(model, self)

    @property
    def is_lossy(self) -> bool:
        """Whether some parameters are stepped by gradients that a codec has changed."""
        return bool(self.plan.hosted) and not self._gradients.is_exact

    def adopt(self, parameter: nn.Parameter, state: State) -> State:
        """A parameter's state, kept in host memory from now on."""
        self.settle()
        self._check_none_begun()
        if self._backward is not None:
            self._backward.forget(())
            self._backward.expect(None)
        self._schedules.clear()
        return self.memory.adopt(parameter, state)

    def make_way(self) -> None:
        """Another state is loaded."""
        self.settle()
        self._check_none_begun()
        self._gradients.forget_owed()

    def owed(self, parameter: nn.Parameter) -> State:
        """What the gradients' codec owes of a parameter, fp32 and shaped like it, if it owes."""
        layouts = self._optimizer._layouts[parameter]
        parts = [(layout, self._gradients.residual(layout)) for layout in layouts]
        if all(value is None for _, value in parts):
            return {}
        owed = torch.zeros_like(parameter, dtype=torch.float32)
        for layout, value in parts:
            if value is not None:
                local = layout.shard.local(owed)
                local.copy_(value.view(local.shape))
        return {OWED: owed}

    def owe(self, parameter: nn.Parameter, value: Tensor) -> bool:
        """Load what is owed; returns whether the codec has a memory for it."""
        if parameter not in self.plan.hosted:
            return False
        return all(
            [
                self._gradients.owe(layout, layout.shard.local(value).reshape(-1))
                for layout in self._optimizer._layouts[parameter]
            ]
        )

    def begin(self, *, is_unscaled: bool = False, is_scaled: bool = False) -> None:
        """End the step before.

        Args:
            is_unscaled: Gradients have been changed since backward without a trace.
            is_scaled: By a loss scale.

        Raises:
            OffloadError: It has failed; weights and state are those after it.
        """
        begun: Collection[Chunk] = self._backward.begun if self._backward is not None else ()
        self._each([chunk for chunk in self._running if chunk not in begun], Chunk.wait)
        self._running = []
        try:
            self._streams.check_prefetched()
        except Exception as error:  # noqa: BLE001 - raised below
            self._failure = first_cause(error)
        self._gradients.begin()
        if is_unscaled and self._backward is not None:
            self._backward.distrust()
        if is_scaled and self._backward is not None and self._backward.steps_streams:
            raise ConfigError("in_backward=True with GradScaler, which may leave a step out")
        if isinstance(self._failure, OffloadError):
            raise OffloadError(str(self._failure)) from self._failure
        if self._failure is not None:
            raise OffloadError(
                f"the step before could not be taken as planned: {self._failure}; it was taken "
                "without the engine, and weights and state are those after it"
            ) from self._failure

    def skip(self) -> None:
        """There is no step this time."""
        if self._backward is not None:
            self._backward.forget(())
            self._backward.expect(self._backward.schedule)

    def update(self, groups: Sequence[Group], factor: Tensor | None) -> None:
        """Step the parts of these groups, which have taken their gradients."""
        started = time.perf_counter()
        there = [
            (group, [self.memory.twin(part) or part for part in parts]) for group, parts in groups
        ]
        schedule = self._scheduled(groups)
        begun: Collection[Chunk] = ()
        if self._backward is not None:
            self._backward.check(schedule, groups)
            self._failure = self._backward.forget(schedule.hosted)
            begun = self._backward.begun
        if self._optimizer._READS_MOMENTA:
            self._hosts.gather(schedule.hosted)
        self._optimizer._prepare(there, factor)
        begin = until_now(self._device)
        if factor is not None:
            self._lanes[0].uses([factor])
        self._running = [*schedule.hosted, *schedule.streamed]
        self._serving = schedule.serving
        bind = functools.partial(schedule.bind, [group for group, _ in groups])
        if schedule.hosted:
            copies = self.memory.stale([part for _, parts in groups for part in parts])
            if factor is not None:
                copies.append(Copy(self._host_factor, factor))
            known = self.link.down.move(copies, (until_now(self._device),)) if copies else begin
            self._known = copies, known
            host_factor = None if factor is None else self._host_factor
            self._hosts.run(schedule.hosted, functools.partial(bind, host_factor), known)
        self._streams.forget_prefetched(schedule.streamed)
        streamed = [chunk for chunk in schedule.streamed if chunk not in begun]
        self._streams.run(streamed, functools.partial(bind, factor), begin)
        self._streams.prefetch(schedule.streamed)
        if self._backward is not None:
            self._backward.expect(schedule)
        for _, parts in groups:
            for part in parts:
                part.let_go()
        self._num_steps += 1
        self._last_s = None
        if not self.overlaps:
            self.wait()
            self._last_s = time.perf_counter() - started

    def report(self) -> str:
        """What is where, what crosses the link, and how long a step should take, as a text."""
        self.settle()
        note = None
        if self._backward is not None and self._backward.was_wrong:
            note = "gradients come in the step: they were changed after backward"
        return describe(
            self.link, self.plan, host_bytes=self.memory.num_bytes, steps=self._num_steps,
            last_s=self._last_s, note=note,
        )  # fmt: skip

    def wait(self, parameters: Collection[nn.Parameter] | None = None) -> None:
        """Return when these weights, or all, are those after the step."""
        chunks: Sequence[Chunk] = self._in_flight
        if parameters is not None and chunks:
            layouts = [layout for p in parameters for layout in self._optimizer._layouts.get(p, ())]
            chunks = [chunk for layout in layouts for chunk in self._serving.get(layout, ())]
        self._each(chunks, lambda chunk: chunk.ready.wait())

    def reorder(self, parameters: Sequence[nn.Parameter]) -> None:
        """Step parameters in this order from now on; others come last."""
        if self._backward is not None and self._backward.steps_streams:
            parameters = parameters[::-1]
        layouts = [layout for p in parameters for layout in self._optimizer._layouts.get(p, ())]
        self._places = {layout: place for place, layout in reversed(list(enumerate(layouts)))}
        self.settle()
        self._schedules.clear()

    def settle(self) -> None:
        """Return when all state is back in its place, too."""
        self._each(self._in_flight, Chunk.settle)
        self._running = []

    @property
    def _in_flight(self) -> list[Chunk]:
        """Of the last step, and of the backward that goes on."""
        return [*self._running, *(self._backward.begun if self._backward is not None else ())]

    def release(self) -> None:
        """Give the optimizer its state back, on the device, and end."""
        self.settle()
        self._check_none_begun()
        for hooks in (self._gates, self._backward):
            if hooks is not None:
                hooks.remove()
        for parameter in self._optimizer._parameters():
            self.memory.release(parameter, self._device)
        self._optimizer.offloaded = None
        self._optimizer._totals = None
        for lane in (*self._disk, *self._lanes):
            lane.close()
        self.link.close()

    def _check_none_begun(self) -> None:
        if self._backward is not None and self._backward.begun:
            raise OffloadError(
                "weights were stepped in backward: step() must come before another state, or none"
            )

    def _scheduled(self, groups: Sequence[Group]) -> Schedule:
        key = tuple(
            (id(part), number, part.step - parts[0].step)
            for number, (_, parts) in enumerate(groups)
            for part in parts
        )
        if key not in self._schedules:
            if len(self._schedules) >= _MOST_SCHEDULES:
                self._schedules.clear()
            last = len(self._places)
            self._schedules[key] = Schedule(
                groups, self._optimizer._batches, self.memory, self._gradients, self._is_patched,
                self._chunk_bytes, self._buffers,
                lambda layout: self._places.get(layout, last), self._optimizer._options,
            )  # fmt: skip
        return self._schedules[key]

    def _each(self, chunks: Sequence[Chunk], wait_for: Callable[[Chunk], Any]) -> None:
        try:
            for chunk in chunks:
                wait_for(chunk)
        except Exception as error:  # noqa: BLE001 - raised by the next step
            self._recover(first_cause(error))

    def _recover(self, failure: BaseException) -> None:
        """Take the step to its end in this thread."""
        for chunk in self._in_flight:
            for done in (chunk.ready, chunk.left):
                with contextlib.suppress(Exception):
                    done.settle()
        copies, known = self._known
        try:
            known.settle()
        except Exception:  # noqa: BLE001 - what failed first, or by it
            copy(copies)
        self._failure = failure
        self._schedules.clear()
        if isinstance(failure, OffloadError):  # a step that is not whole
            self._running = []
            raise failure
        try:
            catch_up(self._in_flight)
        except OSError:
            if not self.memory.slab.is_file:
                raise
            self.memory.leave_the_file()
            catch_up(self._in_flight)
        self._running = []
