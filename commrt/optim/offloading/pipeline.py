"""Chunks on their way: what a step needs of one comes, it is stepped, and what has changed leaves.

Where the state streams, it comes up to the device, and goes back down. Where the host steps,
gradients come down, and weights go up. Either way the link is busy in both directions while a chunk
is in work between them::

    in    | 3       | 4       | 5       | ...
    step  | 2       | 3       | 4       |
    out   | 1       | 2       | 3       |
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from commrt.errors import OffloadError
from commrt.optim.offloading.chunks import Row
from commrt.optim.offloading.lanes import Both, Done, Lane, Nothing, until_now
from commrt.optim.offloading.link import Copies, Mover, copy
from commrt.optim.parts import Part
from commrt.optim.shards import Piece

NUM_SLOTS = 3
Step = Callable[[], None]


class Unchanged:
    """Gradients that a step reads while the training goes on.

    Args:
        grads: As they are now.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        # Those of inference mode have no version.
        self._grads = [(grad, grad._version) for grad in grads if not grad.is_inference()]

    def check(self) -> None:
        """Raise OffloadError if one has been changed since."""
        if any(grad._version != version for grad, version in self._grads):
            raise OffloadError(
                "a gradient was changed while a step had still to read it: optimizer.offloaded."
                "wait() must come first; some weights have taken this step and some have not"
            )


class Chunk(abc.ABC):
    """Rows of parameters that are updated together.

    Args:
        rows: Which.

    Attributes:
        rows: Which.
        brought: The gradients that have been copied, or are being.
        slot: Number of the buffers that it uses, if it does.
        ready: When its weights are on the device, after the last step.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.slot: int | None = None
        self.ready: Done = Nothing()
        self.brought: Copies = ()
        self.arrived: Done | None = None
        self.left: Done = Nothing()
        self.due: Step | None = None
        self.grads = Unchanged(())
        self.is_stepped = False

    @abc.abstractmethod
    def arriving(self) -> Copies:
        """What has to be copied before the step."""

    @abc.abstractmethod
    def leaving(self) -> Copies:
        """What has to be copied after it."""

    @property
    def parts(self) -> set[Part]:
        """That it has rows of."""
        return {row.part for row in self.rows}

    @property
    def rows_there(self) -> Sequence[Row]:
        """The rows, with their state where they are stepped."""
        return self.rows

    def grad_of(self, part: Part, piece: Piece) -> Tensor:
        """What a row is stepped by."""
        return part.grad_of(piece)

    def forget_grads(self) -> None:
        """Let go of the gradients that the rows were made with."""
        self.rows = [
            row._replace(tensor=dataclasses.replace(row.tensor, grad=row.tensor.grad[:0].clone()))
            for row in self.rows
        ]

    def unpack(self) -> None:  # noqa: B027 - most have nothing to do
        """What the device has to do with what left."""

    def wait(self) -> None:
        """What this thread gives its device from now on comes after all of its step."""
        self.ready.wait()
        self.left.wait()

    def settle(self) -> None:
        """Return when it has left."""
        self.ready.settle()
        self.left.settle()

    def step(self) -> None:
        """Take the step that is due."""
        assert self.due is not None
        self.grads.check()
        self.due()
        for part in self.parts:
            part.write_back()
        self.is_stepped = True

    def finish(self) -> None:
        """It has left."""
        self.unpack()
        self.due, self.is_stepped, self.grads = None, False, Unchanged(())
        self.brought = ()


class Pipeline:
    """Moves chunks.

    Args:
        inbound: Brings what a step needs.
        lane: Of the steps.
        outbound: Takes what has changed.
        device: Of the parameters.
        is_hosted: The step is the host's, and a slot is for a patch that leaves; else it is the
            device's, and a slot is for what arrives, too.
    """

    def __init__(
        self, inbound: Mover, lane: Lane, outbound: Mover, device: torch.device, *,
        is_hosted: bool,
    ) -> None:  # fmt: skip
        self._inbound, self._lane, self._outbound = inbound, lane, outbound
        self._device = device
        self._is_hosted = is_hosted
        self._last: list[Chunk | None] = [None] * NUM_SLOTS
        self._arrived: Done = Nothing()

    def bring(self, chunk: Chunk, *, is_early: bool = False) -> None:
        """Copy what a chunk's step needs, if that has not been done.

        Args:
            chunk: Which.
            is_early: Before its step, until which gradients may be changed, and be brought again.
        """
        if chunk.arrived is not None:
            return
        copies = chunk.arriving()
        now = until_now(self._device)
        if not self._is_hosted:
            chunk.arrived = self._inbound.move(copies, (now, *self._take_slot(chunk)))
            return
        chunk.brought = copies
        sources = Unchanged([copy.source for copy in copies if isinstance(copy.source, Tensor)])
        if is_early:
            chunk.arrived = self._inbound.move(copies, (now,))
        else:
            # A coded tensor comes whole with the first of its chunks: if it fails, so do others.
            after = (now, self._arrived)
            chunk.arrived = self._arrived = self._inbound.move(copies, after, sources.check)

    def gather(self, chunks: Sequence[Chunk]) -> None:
        """Return when all is there that the steps of these need."""
        for chunk in chunks:
            self.bring(chunk)
        for chunk in chunks:
            assert chunk.arrived is not None
            chunk.arrived.settle()

    def run(self, chunks: Sequence[Chunk], step: Callable[[Chunk], Step], begin: Done) -> None:
        """Update chunks.

        Args:
            chunks: In this order.
            step: Of each.
            begin: When gradients are final.
        """
        if self._is_hosted:
            self._arrived = Nothing()
            for chunk in chunks:
                self.bring(chunk)
        else:
            self.prefetch(chunks)
        for place, chunk in enumerate(chunks):
            self.bring(chunk)
            self.step(chunk, step(chunk), begin)
            if not self._is_hosted:
                self.prefetch(chunks[place + 1 : place + 1 + NUM_SLOTS])

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """Bring what the steps of these begin with, as far as there are slots."""
        for chunk in chunks[:NUM_SLOTS]:
            before = self._last[chunk.slot] if chunk.slot is not None else None
            if before is not None and before.arrived is not None:
                break
            self.bring(chunk)

    def forget_prefetched(self, chunks: Sequence[Chunk]) -> None:
        """What was fetched for others than these will be old when they are stepped."""
        for chunk in self._last:
            if chunk is not None and chunk.arrived is not None and chunk not in chunks:
                chunk.left, chunk.arrived = Both(chunk.left, chunk.arrived), None

    def check_prefetched(self) -> None:
        """Wait for what was prefetched; raise if it cannot be had."""
        for chunk in self._last:
            if chunk is not None and chunk.arrived is not None:
                arrived, chunk.arrived = chunk.arrived, None
                arrived.wait()
                chunk.arrived = arrived

    def _take_slot(self, chunk: Chunk) -> tuple[Done, ...]:
        """When the chunk's slot is free for it."""
        if chunk.slot is None:
            return ()
        before, self._last[chunk.slot] = self._last[chunk.slot], chunk
        if before is None:
            return ()
        if self._is_hosted or before.arrived is None:
            return (before.left,)
        # It was fetched for a step that has not come.
        arrived, before.arrived = before.arrived, None
        return before.left, arrived

    def step(self, chunk: Chunk, due: Step, begin: Done) -> None:
        """Update a chunk that has been brought.

        Args:
            chunk: Which.
            due: Its step.
            begin: When its gradients are final.
        """
        assert chunk.arrived is not None
        chunk.due = due
        if not self._is_hosted:
            grads = [part.grad for part in chunk.parts]
            chunk.grads = Unchanged(grads)
            self._lane.uses(grads)
        after, chunk.arrived = (chunk.arrived, begin), None
        if not self._is_hosted:
            chunk.ready = self._lane.run(chunk.step, after)
            chunk.left = self._leave(chunk, chunk.ready)
            return

        def step() -> Done:
            chunk.step()
            return self._leave(chunk, self._lane.now())

        chunk.ready = chunk.left = self._lane.run(step, (*after, *self._take_slot(chunk)))

    def _leave(self, chunk: Chunk, stepped: Done) -> Done:
        return self._outbound.move(chunk.leaving(), (stepped,), chunk.finish)


def catch_up(chunks: Sequence[Chunk]) -> None:
    """Do in the calling thread what lanes have left undone."""
    for chunk in sorted(chunks, key=lambda chunk: not chunk.is_stepped):  # these free their slots
        chunk.arrived = None
        if chunk.due is None:
            continue
        if not chunk.is_stepped:
            copy(chunk.brought or chunk.arriving())
            chunk.step()
        copy(chunk.leaving())
        chunk.finish()
