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
from commrt.ops import StepOptions
from commrt.optim.offloading.early import Early, may_come_early
from commrt.optim.offloading.gates import Gates
from commrt.optim.offloading.gradients import Gradients
from commrt.optim.offloading.lanes import Done, Lane, Nothing, first_cause, until_now
from commrt.optim.offloading.link import Copies, Copy, Link, Mover, Reading, Writing, copy
from commrt.optim.offloading.memory import Memory
from commrt.optim.offloading.pipeline import Chunk, Pipeline, Step, catch_up
from commrt.optim.offloading.plan import Plan
from commrt.optim.offloading.report import describe
from commrt.optim.offloading.schedule import Buffers, Due, Group, Schedule
from commrt.optim.parts import State
from commrt.optim.sections import Layout
from commrt.optim.states import OWED

if TYPE_CHECKING:
    from commrt.optim.base import StepOptimizer

_MOST_SCHEDULES = 8

Options = dict[tuple[int, int], StepOptions]
"""By group and number of the step."""


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
        self._early: Early | None = None
        self._num_steps = 0
        self._last_s: float | None = None
        self._missing: dict[Chunk, set[Layout]] = {}
        self._in_backward = False
        self._begun: dict[Chunk, Options] = {}
        self._schedule: Schedule | None = None
        self._parameters = {
            layout: parameter
            for parameter in optimizer._parameters()
            for layout in optimizer._layouts[parameter]
        }
        self.overlaps = False

    def overlap(self, model: nn.Module, *, in_backward: bool) -> None:
        """End steps during the next forward of a model, and begin with gradients during backward.

        Args:
            model: Which.
            in_backward: Step what streams when its gradients are final.
        """
        self._gates = Gates(model, self)
        self._in_backward = in_backward
        early = self._optimizer._parameters() if in_backward else self.plan.hosted
        if self._gradients.codec is None:  # which would owe twice what is encoded twice
            self._early = Early(list(filter(may_come_early, early)), self._take)

    @property
    def is_lossy(self) -> bool:
        """Whether some parameters are stepped by gradients that a codec has changed."""
        return bool(self.plan.hosted) and not self._gradients.is_exact

    def adopt(self, parameter: nn.Parameter, state: State) -> State:
        """A parameter's state, kept in host memory from now on."""
        self.settle()
        self._forget_early(())
        self._schedules.clear()
        self._schedule = None
        return self.memory.adopt(parameter, state)

    def forget_owed(self) -> None:
        """Owe nothing: another state is loaded."""
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
        self._each([chunk for chunk in self._running if chunk not in self._begun], Chunk.wait)
        self._running = list(self._begun)
        try:
            self._streams.check_prefetched()
        except Exception as error:  # noqa: BLE001 - raised below
            self._failure = first_cause(error)
        self._gradients.begin()
        if is_unscaled and self._early is not None:
            self._early.was_wrong = True
        if self._in_backward and is_scaled:
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
        self._forget_early(())
        self._expect()

    def update(self, groups: Sequence[Group], factor: Tensor | None) -> None:
        """Step the parts of these groups, which have taken their gradients."""
        started = time.perf_counter()
        there = [
            (group, [self.memory.twin(part) or part for part in parts]) for group, parts in groups
        ]
        schedule = self._scheduled(groups)
        self._check_begun(schedule, groups)
        self._forget_early(schedule.hosted)
        if self._optimizer._READS_MOMENTA:
            self._hosts.gather(schedule.hosted)
        self._optimizer._prepare(there, factor)
        begin = until_now(self._device)
        if factor is not None:
            self._lanes[0].uses([factor])
        self._running = [*schedule.hosted, *schedule.streamed]
        self._serving = schedule.serving
        bind = functools.partial(self._bind, schedule, self._options(groups))
        if schedule.hosted:
            copies = self.memory.stale([part for _, parts in groups for part in parts])
            if factor is not None:
                copies.append(Copy(self._host_factor, factor))
            known = self.link.down.move(copies, (until_now(self._device),)) if copies else begin
            self._known = copies, known
            host_factor = None if factor is None else self._host_factor
            self._hosts.run(schedule.hosted, functools.partial(bind, host_factor), known)
        self._streams.forget_prefetched(schedule.streamed)
        streamed = [chunk for chunk in schedule.streamed if chunk not in self._begun]
        self._streams.run(streamed, functools.partial(bind, factor), begin)
        self._streams.prefetch(schedule.streamed)
        self._schedule = schedule
        self._expect()
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
        if self._early is not None and self._early.was_wrong:
            note = "gradients come in the step: they were changed after backward"
        return describe(
            self.link, self.plan, host_bytes=self.memory.num_bytes, steps=self._num_steps,
            last_s=self._last_s, note=note,
        )  # fmt: skip

    def wait(self, parameters: Collection[nn.Parameter] | None = None) -> None:
        """Return when these weights, or all, are those after the step."""
        chunks = self._running
        if parameters is not None and chunks:
            layouts = [layout for p in parameters for layout in self._optimizer._layouts.get(p, ())]
            chunks = [chunk for layout in layouts for chunk in self._serving.get(layout, ())]
        self._each(chunks, lambda chunk: chunk.ready.wait())

    def reorder(self, parameters: Sequence[nn.Parameter]) -> None:
        """Step parameters in this order from now on; others come last."""
        if self._in_backward:
            parameters = parameters[::-1]
        layouts = [layout for p in parameters for layout in self._optimizer._layouts.get(p, ())]
        self._places = {layout: place for place, layout in reversed(list(enumerate(layouts)))}
        self.settle()
        self._schedules.clear()

    def settle(self) -> None:
        """Return when all state is back in its place, too."""
        self._each(self._running, Chunk.settle)
        self._running = []

    def release(self) -> None:
        """Give the optimizer its state back, on the device, and end."""
        self.settle()
        if self._begun:
            raise OffloadError("weights were stepped in backward: step() must come first")
        for hooks in (self._gates, self._early):
            if hooks is not None:
                hooks.remove()
        for parameter in self._optimizer._parameters():
            self.memory.release(parameter, self._device)
        self._optimizer.offloaded = None
        self._optimizer._totals = None
        for lane in (*self._disk, *self._lanes):
            lane.close()
        self.link.close()

    def _expect(self) -> None:
        """Other gradients, which may come early."""
        if self._early is not None and self._schedule is not None:
            self._early.end()
            self._begun = {}
            self._missing = {
                chunk: {part.layout for part in chunk.parts}
                for chunk in (*self._schedule.hosted, *self._schedule.streamed)
            }

    def _take(self, parameter: nn.Parameter) -> None:
        """Bring what this gradient completes."""
        if self._schedule is None:
            return
        assert parameter.grad is not None
        batches = self._optimizer._batches
        for layout, own in self._optimizer._kept_of(parameter):
            part = batches.part(layout, layout.shard.local(parameter), own)
            part.take(parameter.grad, int(self._optimizer.state[parameter]["step"]) + 1)
            for chunk in self._schedule.serving.get(layout, ()):
                if part not in self._schedule.parts:
                    continue  # it has moved
                self._missing[chunk].discard(layout)
                if not self._missing[chunk]:
                    self._begin_with(self._schedule, chunk)

    def _begin_with(self, schedule: Schedule, chunk: Chunk) -> None:
        """A chunk's gradients are final."""
        if chunk in schedule.hosted:
            self._hosts.bring(chunk, is_early=True)
        elif all(part.layout.is_apart for part in chunk.parts):
            self._each([chunk], Chunk.wait)
            options = self._options_of(schedule.groups, schedule.due[chunk])
            self._begun[chunk] = options
            self._running.append(chunk)
            self._serving = schedule.serving
            for part in chunk.parts:
                torch.autograd.graph.increment_version(self._parameters[part.layout])
            self._streams.bring(chunk)
            self._streams.step(
                chunk, self._bind(schedule, options, None, chunk), until_now(self._device)
            )
            self._streams.prefetch([c for c in schedule.streamed if c not in self._begun])

    def _check_begun(self, schedule: Schedule, groups: Sequence[Group]) -> None:
        """Raise OffloadError if what was stepped in backward should not have been."""
        if not self._begun:
            return
        assert self._early is not None
        given = [group for group, _ in groups]
        unchanged = self._early.unchanged()
        parameters = {self._parameters[part.layout] for c in self._begun for part in c.parts}
        if (
            schedule is not self._schedule
            or not parameters <= unchanged
            or any(
                options != self._options_of(given, schedule.due[chunk])
                for chunk, options in self._begun.items()
            )
        ):
            raise OffloadError(
                "with in_backward weights were stepped in backward, and then gradients, their "
                "number or options (the learning rate, say) were changed before step(): they must "
                "not be"
            )

    def _forget_early(self, chunks: Sequence[Chunk]) -> None:
        """Bring again what is not as it was, and what these are not among."""
        brought = [
            (chunk, chunk.arrived)
            for chunk in (self._schedule.hosted if self._schedule is not None else ())
            if chunk.arrived is not None
        ]
        if not brought or self._early is None:
            return
        unchanged = self._early.unchanged()
        for chunk, arrived in brought:
            is_right = all(self._parameters[part.layout] in unchanged for part in chunk.parts)
            if chunk not in chunks or not is_right:
                chunk.arrived = None
                continue
            try:
                arrived.wait()  # from now on gradients may be changed again
            except Exception as error:  # noqa: BLE001 - raised by the next step
                self._failure = first_cause(error)
                chunk.arrived = None

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
                lambda layout: self._places.get(layout, last),
            )  # fmt: skip
        return self._schedules[key]

    def _options_of(self, groups: Sequence[dict[str, Any]], dues: Sequence[Due]) -> Options:
        """Those that some ops take."""
        return {
            (due.group, due.part.step): self._optimizer._options(groups[due.group], due.part.step)
            for due in dues
        }

    def _options(self, groups: Sequence[Group]) -> Options:
        """By group and number of the step, as they are now."""
        return {
            (number, step): self._optimizer._options(group, step)
            for number, (group, parts) in enumerate(groups)
            for step in {part.step for part in parts}
        }

    def _bind(
        self,
        schedule: Schedule,
        options: Options,
        factor: Tensor | None,
        chunk: Chunk,
    ) -> Step:
        seed_of = self._optimizer._batches.seed_of
        bound = [
            due.call.bind(options[due.group, due.part.step], factor, seed_of, chunk.grad_of)
            for due in schedule.due[chunk]
        ]

        def step() -> None:
            for call in bound:
                call()

        return step

    def _each(self, chunks: Sequence[Chunk], wait_for: Callable[[Chunk], Any]) -> None:
        try:
            for chunk in chunks:
                wait_for(chunk)
        except Exception as error:  # noqa: BLE001 - raised by the next step
            self._recover(first_cause(error))

    def _recover(self, failure: BaseException) -> None:
        """Take the step to its end in this thread."""
        for chunk in self._running:
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
            catch_up(self._running)
        except OSError:
            if not self.memory.slab.is_file:
                raise
            self.memory.leave_the_file()
            catch_up(self._running)
        self._running = []
