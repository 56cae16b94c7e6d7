"""Host memory for an optimizer: its state, and where the host steps, weights and gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commrt.optim.offloading.checksums import checksum, differ
from commrt.optim.offloading.gradients import Gradients
from commrt.optim.offloading.link import Copy
from commrt.optim.offloading.slab import Slab
from commrt.optim.parts import Part, State, flat
from commrt.optim.sections import Layout
from commrt.optim.shards import Piece
from commrt.optim.states import of_weights

if TYPE_CHECKING:
    from commrt.optim.base import StepOptimizer

# Of fewer elements it would cost more to move the state than to keep it where it is.
_LEAST_MOVED_NUMEL = 1024


class Mirror(NamedTuple):
    """The host's copies of a tensor that it steps.

    Attributes:
        weights: Shaped like the device's.
        grad: Flat.
        checksum: Of the device's weights after the last step, on the device.
        version: How often others have changed them.
    """

    weights: Tensor
    grad: Tensor
    checksum: Tensor
    version: list[int]


class Memory:
    """Cut for all that will be kept, before there is any of it.

    Args:
        optimizer: Whose state it is for.
        hosted: The parameters that the host steps: their whole state is here. Of the others it is
            the moments with an element for each weight, and their scales.
        gradients: Brings them to the host.
        device: Of the parameters.
        folder: Keep the state in a file there.
        sends_patches: Whether weights go to the device as differences from what is there.

    Attributes:
        slab: Has the state.
        num_bytes: Of the host, in all.

    Raises:
        OffloadError: There is not as much memory.
    """

    def __init__(
        self,
        optimizer: StepOptimizer,
        hosted: Collection[nn.Parameter],
        gradients: Gradients,
        device: torch.device,
        folder: Path | None,
        *,
        sends_patches: bool,
    ) -> None:
        self._sends_patches = sends_patches
        self._optimizer, self._hosted = optimizer, hosted
        self._kept = list(self._wanted())
        self.slab = Slab(Slab.bytes_for([like for _, _, like in self._kept]), device, folder)
        self._homes = self._cut()
        mirrored = [
            (layout, layout.shard.local(parameter))
            for parameter in optimizer._parameters()
            if parameter in hosted
            for layout in optimizer._layouts[parameter]
        ]
        grads = [
            torch.empty(weights.shape, dtype=gradients.dtype(weights.dtype), device="meta")
            for layout, weights in mirrored
            if not gradients.is_coded(layout)
        ]
        copies = Slab(Slab.bytes_for([*grads, *(weights for _, weights in mirrored)]), device)
        self._mirrors: dict[Layout, Mirror] = {}
        self._parts: dict[Layout, Part] = {}
        for layout, weights in mirrored:
            mirror = grad = copies.cut(weights.shape, weights.dtype)
            if gradients.is_coded(layout):  # it is never here whole
                gradients.reserve(layout, weights)
            else:
                grad = copies.cut(weights.shape, gradients.dtype(weights.dtype))
            known = torch.zeros((), dtype=torch.int64, device=device)
            self._mirrors[layout] = Mirror(mirror, grad.view(-1), known, [-1])
        self.num_bytes = copies.memory.numel() + (0 if folder else self.slab.memory.numel())

    def _cut(self) -> dict[tuple[Layout, str], Tensor]:
        return {
            (layout, name): self.slab.cut(like.shape, like.dtype)
            for layout, name, like in self._kept
        }

    def leave_the_file(self) -> None:
        """Keep the state in memory from now on: the file has failed."""
        self.slab.leave_the_file()
        self._homes = self._cut()
        for parameter in self._optimizer._parameters():
            for layout, own in self._optimizer._kept_of(parameter):
                for name, value in own.items():
                    if (layout, name) in self._homes:
                        own[name] = _like(value, self._homes[layout, name])

    def adopt(self, parameter: nn.Parameter, state: State) -> State:
        """A parameter's state, kept here from now on as far as it has to be."""
        optimizer = self._optimizer
        layouts = optimizer._layouts[parameter]
        for layout, own in zip(layouts, optimizer._states_of(parameter, state), strict=True):
            for name, value in own.items():
                home = self._homes.get((layout, name))
                if home is not None:
                    home.copy_(flat(value))
                    own[name] = _like(value, home)
            if layout in self._mirrors:
                weights, mirror = layout.shard.local(parameter), self._mirrors[layout]
                mirror.weights.copy_(weights)
                mirror.checksum.copy_(checksum(weights))
                mirror.version[0] = weights._version
        return state

    def stale(self, parts: Sequence[Part]) -> list[Copy]:
        """Weights that others have changed on the device since the last step: to be copied again.

        Not those that are rounded from a master copy, as in a step without the engine.
        """
        hosted = [part for part in parts if part.layout in self._mirrors]
        if not self._sends_patches:
            hosted = [part for part in hosted if "master" not in part.given]
        mirrors = [self._mirrors[part.layout] for part in hosted]
        pairs = [
            (mirror.checksum, checksum(part.weights))
            for part, mirror in zip(hosted, mirrors, strict=True)
        ]
        copies = [
            Copy(mirror.weights.view(-1), part.weights)
            for part, mirror, is_other in zip(hosted, mirrors, differ(pairs), strict=True)
            if is_other or part.version != mirror.version[0]
        ]
        for part, mirror in zip(hosted, mirrors, strict=True):
            mirror.checksum.zero_()
            mirror.version[0] = part.version
        return copies

    def went(self, part: Part, piece: Piece) -> None:
        """Some of a part's weights have come to the device."""
        if self._sends_patches or "master" not in part.given:
            weights = piece.elements_of(part.weights)
            self._mirrors[part.layout].checksum.add_(checksum(weights, piece.start))

    def release(self, parameter: nn.Parameter, device: torch.device) -> None:
        """Copy a parameter's state to a device."""
        for layout, own in self._optimizer._kept_of(parameter):
            for name, value in own.items():
                if (layout, name) in self._homes:
                    own[name] = _like(value, flat(value).to(device, copy=True))

    def twin(self, part: Part) -> Part | None:
        """The host's part of the device's, if the host steps it."""
        if part.layout not in self._mirrors:
            return None
        mirror = self._mirrors[part.layout]
        twin = self._parts.get(part.layout)
        if twin is None or not twin.is_of(mirror.weights, part.given):
            twin = Part(part.layout, mirror.weights, part.given, stochastic=part.stochastic)
            self._parts[part.layout] = twin
        twin.grad, twin.step = mirror.grad, part.step
        return twin

    def _wanted(self) -> Iterator[tuple[Layout, str, Tensor]]:
        """What is kept of each tensor: its name, and a flat one like it."""
        meta = torch.device("meta")
        for parameter in self._optimizer._parameters():
            for layout in self._optimizer._layouts[parameter]:
                state = self._optimizer._new_part(layout, meta)
                if parameter in self._hosted:
                    state |= of_weights(layout, parameter, self._optimizer.weight_mode, meta)
                    names = set(state)
                else:
                    names = streaming(self._optimizer, layout, state)
                for name, value in state.items():
                    if name in names:
                        yield layout, name, flat(value)


def streaming(optimizer: StepOptimizer, layout: Layout, state: State) -> set[str]:
    """Names of the state that is kept in host memory while the device steps a tensor."""
    if layout.numel < _LEAST_MOVED_NUMEL:
        return set()
    moments = optimizer._moments(layout)
    return {name for name in state if name.removesuffix("_scale") in moments}


def _like(value: Tensor, home: Tensor) -> Tensor:
    """A flat tensor in the shape, and with the placements, of another."""
    if not isinstance(value, DTensor):
        return home.view(value.shape)
    local = home.view(value.to_local().shape)
    # DTensor.from_local would move it to the device of the mesh.
    return DTensor(local, value._spec, requires_grad=False)
