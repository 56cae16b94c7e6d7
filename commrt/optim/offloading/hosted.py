"""The host steps: gradients come to it, and weights go back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from commrt import ops
from commrt.optim.offloading.chunks import Row
from commrt.optim.offloading.gradients import Gradients
from commrt.optim.offloading.link import Copies, Copy
from commrt.optim.offloading.memory import Memory
from commrt.optim.offloading.pipeline import Chunk
from commrt.optim.offloading.slab import aligned
from commrt.optim.parts import Part
from commrt.optim.shards import Piece


class HostedChunk(Chunk):
    """Rows that the host steps.

    Args:
        rows: Of the host's parts.
        twins: The device's part of each.
        gradients: Brings them.
        memory: Of the host.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        twins: Mapping[Part, Part],
        gradients: Gradients,
        memory: Memory,
    ) -> None:
        super().__init__(rows)
        self._twins, self._gradients, self._memory = twins, gradients, memory
        self._coded = [row for row in rows if gradients.is_coded(row.part.layout)]

    @property
    def scratch_numel(self) -> int:
        """Elements of the gradients that have to be decoded."""
        return sum(map(self._gradients.scratch_numel, self._coded))

    def work_in(self, scratch: Tensor) -> None:
        """Decode into this memory, fp32."""
        self._places: dict[tuple[Part, Piece], Tensor] = {}
        at = 0
        for row in self._coded:
            numel = self._gradients.scratch_numel(row)
            self._places[row.part, row.piece] = scratch[at : at + numel]
            at += numel

    def grad_of(self, part: Part, piece: Piece) -> Tensor:
        """What a row is stepped by."""
        place = self._places.get((part, piece))
        if place is None:
            return part.grad_of(piece)
        return self._gradients.decoded(piece, place)

    def arriving(self) -> Copies:
        """See :class:`Chunk`."""
        return [
            pair
            for row, device in self._both()
            for pair in self._gradients.arriving(row.part, device, [row.piece])
        ]

    def step(self) -> None:
        """See :class:`Chunk`."""
        for row in self._coded:
            place = self._places[row.part, row.piece]
            self._gradients.decode(row.part.layout, row.piece, place)
        super().step()

    def leaving(self) -> Copies:
        """See :class:`Chunk`."""
        return [
            Copy(
                # .data: so that only what others do counts as a change.
                row.piece.elements_of(device.weights.data),
                row.piece.elements_of(row.part.weights),
            )
            for row, device in self._both()
        ]

    def unpack(self) -> None:
        """See :class:`Chunk`."""
        for row, device in self._both():
            device.write_back()
            self._memory.went(device, row.piece)

    def _both(self) -> Iterator[tuple[Row, Part]]:
        for row in self.rows:
            yield row, self._twins[row.part]


class PatchedChunk(HostedChunk):
    """Rows of which only the bits go back that have changed."""

    _patches: Sequence[tuple[int, int]] = ()

    @property
    def slot_bytes(self) -> int:
        """That patches may have."""
        return sum(
            aligned(ops.patch_capacity(row.piece.rows * row.piece.cols, row.part.weights.dtype))
            for row in self.rows
        )

    @property
    def old_bytes(self) -> int:
        """Of its weights."""
        return sum(
            aligned(row.piece.rows * row.piece.cols * row.part.weights.element_size())
            for row in self.rows
        )

    def pack_in(self, old: Tensor, packed: Tensor, received: Tensor) -> None:
        """Use this memory: of the host for old weights and patches, and of the device."""
        self._old, self._packed, self._received = old, packed, received

    def step(self) -> None:
        """See :class:`Chunk`."""
        old, at = [], 0
        for row in self.rows:
            weights = row.piece.elements_of(row.part.weights)
            old.append(self._old[at : at + weights.nbytes].view(weights.dtype))
            old[-1].copy_(weights)
            at += aligned(weights.nbytes)
        super().step()
        self._patches, at = [], 0
        for row, before in zip(self.rows, old, strict=True):
            patch = self._packed[at:]
            ops.patch_encode(row.piece.elements_of(row.part.weights), before, patch)
            num_bytes = ops.patch_bytes(patch)
            self._patches.append((at, at + num_bytes))
            at += aligned(num_bytes)
        self._num_bytes = at

    def leaving(self) -> Copies:
        """See :class:`Chunk`."""
        return [Copy(self._received[: self._num_bytes], self._packed[: self._num_bytes])]

    def unpack(self) -> None:
        """See :class:`Chunk`."""
        for (row, device), (begin, end) in zip(self._both(), self._patches, strict=True):
            weights = row.piece.elements_of(device.weights.data)
            ops.patch_apply_(weights, self._received[begin:end])
        super().unpack()
