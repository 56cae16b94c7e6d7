"""Which parts are stepped together, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commrt.collectives import order
from commrt.ops import StepOptions
from commrt.optim.batches import Batches, Call
from commrt.optim.offloading.chunks import Row, chunks_of
from commrt.optim.offloading.gradients import Gradients
from commrt.optim.offloading.hosted import HostedChunk, PatchedChunk
from commrt.optim.offloading.memory import Memory
from commrt.optim.offloading.pipeline import NUM_SLOTS, Chunk, Step
from commrt.optim.offloading.streamed import StreamedChunk
from commrt.optim.parts import Part
from commrt.optim.sections import Layout

Group = tuple[dict[str, Any], Sequence[Part]]
Options = dict[tuple[int, int], StepOptions]
"""By number of the group, and of the step."""


class Due(NamedTuple):
    """What a chunk's step calls.

    Attributes:
        group: Number of the group whose options it takes.
        part: One of those with the step number that it takes.
        call: The op.
    """

    group: int
    part: Part
    call: Call


class Schedule:
    """The chunks of some parts.

    Args:
        groups: Of the parameters, with their parts.
        batches: Of the optimizer.
        memory: Of the host.
        gradients: Brings them to it.
        is_patched: Whether weights go back as patches.
        chunk_bytes: Of state that are stepped at a time.
        buffers: For the chunks to work in.
        place_of: Of a tensor in the order of steps.
        options_of: The coefficients of a group in a step.

    Attributes:
        streamed: In the order of their steps.
        hosted: Likewise.
        due: What steps each.
        serving: The chunks of each tensor.
        groups: Options of each group.
        parts: Of the device.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        batches: Batches,
        memory: Memory,
        gradients: Gradients,
        is_patched: bool,
        chunk_bytes: int,
        buffers: Buffers,
        place_of: Callable[[Layout], int],
        options_of: Callable[[dict[str, Any], int], StepOptions],
    ) -> None:
        self._options_of = options_of
        self.groups = [group for group, _ in groups]
        self.parts = {part for _, parts in groups for part in parts}
        self.due: dict[Chunk, list[Due]] = {}
        self.serving: dict[Layout, list[Chunk]] = {}
        self._batches = batches
        self._kinds: dict[Part, tuple[int, int]] = {}
        self._twins: dict[Part, Part] = {}
        stays: list[Part] = []
        numbered = [(part, number) for number, (_, parts) in enumerate(groups) for part in parts]
        for part, number in sorted(numbered, key=lambda pair: place_of(pair[0].layout)):
            twin = memory.twin(part)
            self._kinds[twin or part] = number, part.step
            if twin is None:
                stays.append(part)
            else:
                self._twins[twin] = part
        self.streamed = [
            StreamedChunk(rows, memory.slab)
            for rows in chunks_of(self._rows(stays), memory.slab, chunk_bytes)
        ]
        kind = PatchedChunk if is_patched else HostedChunk
        self.hosted = [
            kind(rows, self._twins, gradients, memory)
            for rows in chunks_of(self._rows(self._twins), memory.slab, chunk_bytes)
        ]
        buffers.give_slots(self.streamed, has_file=memory.slab.is_file)
        buffers.give_scratch(self.hosted)
        for chunk in (*self.streamed, *self.hosted):
            self.due[chunk] = list(self._calls(chunk.rows_there))
        for chunk in (*self.streamed, *self.hosted):
            chunk.forget_grads()
            for part in chunk.parts:
                self.serving.setdefault(part.layout, []).append(chunk)

    def options(self, groups: Sequence[dict[str, Any]], chunk: Chunk) -> Options:
        """The coefficients that a chunk's step takes, as they are now."""
        return {
            (due.group, due.part.step): self._options_of(groups[due.group], due.part.step)
            for due in self.due[chunk]
        }

    def bind(self, groups: Sequence[dict[str, Any]], factor: Tensor | None, chunk: Chunk) -> Step:
        """A chunk's step, with gradients and coefficients as they are now."""
        options = self.options(groups, chunk)
        bound = [
            due.call.bind(
                options[due.group, due.part.step], factor, self._batches.seed_of, chunk.grad_of
            )
            for due in self.due[chunk]
        ]

        def step() -> None:
            for call in bound:
                call()

        return step

    def _rows(self, parts: Mapping[Part, Any] | Sequence[Part]) -> Iterator[Row]:
        for part in parts:
            for row in self._batches.rows_of(part):
                yield Row(part, *row)

    def _calls(self, rows: Sequence[Row]) -> Iterator[Due]:
        of_kind: dict[tuple[int, int], list[Row]] = {}
        for row in rows:
            of_kind.setdefault(self._kinds[row.part], []).append(row)
        for (number, _), some in of_kind.items():
            for call in self._batches.calls(some):
                yield Due(number, some[0].part, call)


class Buffers:
    """Memory that the chunks of all schedules share: what is in work, and on its way.

    Args:
        device: Of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, list[Tensor]] = {}

    def give_slots(self, chunks: Sequence[StreamedChunk], *, has_file: bool) -> None:
        """To the state of chunks that the device steps."""
        sizes = [chunk.slot_bytes for chunk in chunks]
        slots = self._get("slots", sizes, NUM_SLOTS, on_device=True)
        through = self._get("through", sizes, NUM_SLOTS) if has_file else None
        for place, chunk in enumerate(chunks):
            chunk.slot = place % NUM_SLOTS
            chunk.settle_in(slots[chunk.slot], None if through is None else through[chunk.slot])

    def give_scratch(self, chunks: Sequence[HostedChunk]) -> None:
        """To chunks that the host steps, one at a time; patches of several are on their way."""
        [scratch] = self._get("scratch", [4 * chunk.scratch_numel for chunk in chunks], 1)
        for chunk in chunks:
            chunk.work_in(scratch.view(torch.float32))
        patched = [chunk for chunk in chunks if isinstance(chunk, PatchedChunk)]
        [old] = self._get("old", [chunk.old_bytes for chunk in patched], 1)
        sizes = [chunk.slot_bytes for chunk in patched]
        packed = self._get("packed", sizes, NUM_SLOTS)
        received = self._get("received", sizes, NUM_SLOTS, on_device=True)
        for place, chunk in enumerate(patched):
            chunk.slot = place % NUM_SLOTS
            chunk.pack_in(old, packed[chunk.slot], received[chunk.slot])

    def _get(
        self, name: str, sizes: Sequence[int], number: int, *, on_device: bool = False
    ) -> list[Tensor]:
        """Those of a name, as large as the largest of these."""
        most, found = max(sizes, default=0), self._buffers.get(name)
        if found is None or found[0].numel() < most:
            device = self._device if on_device else torch.device("cpu")
            pinned = not on_device and order.is_queued(self._device)
            found = [
                torch.empty(most, dtype=torch.uint8, device=device, pin_memory=pinned)
                for _ in range(number)
            ]
            self._buffers[name] = found
        return found
