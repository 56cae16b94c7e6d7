"""Host memory for an optimizer: its state, and where the host steps, weights and gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commrt.optim.offloading.gradients import Gradients
from commrt.optim.offloading.slab import Slab
from commrt.optim.parts import Part, State, flat
from commrt.optim.sections import Layout
from commrt.optim.states import of_weights

if TYPE_CHECKING:
    from commrt.optim.base import StepOptimizer

# Of fewer elements it would cost more to move the state than to keep it where it is.
_LEAST_MOVED_NUMEL = 1024


class Memory:
    """Cut for all that will be kept, before there is any of it.

    Args:
        optimizer: Whose state it is for.
        hosted: The parameters that the host steps: their whole state is here. Of the others it is
            the moments with an element for each weight, and their scales.
        gradients: Brings them to the host.
        device: Of the parameters.
        folder: Keep the state in a file there.

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
    ) -> None:
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
        self._mirrors: dict[Layout, tuple[Tensor, Tensor]] = {}
        self._parts: dict[Layout, Part] = {}
        for layout, weights in mirrored:
            mirror = grad = copies.cut(weights.shape, weights.dtype)
            if not gradients.is_coded(layout):  # else it is never here whole
                grad = copies.cut(weights.shape, gradients.dtype(weights.dtype))
            self._mirrors[layout] = mirror, grad.view(-1)

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
            if parameter not in self._optimizer.state:
                continue
            state = self._optimizer.state[parameter]
            for layout, own in zip(
                self._optimizer._layouts[parameter],
                self._optimizer._states_of(parameter, state),
                strict=True,
            ):
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
                self._mirrors[layout][0].copy_(layout.shard.local(parameter))
        return state

    def release(self, parameter: nn.Parameter, state: State, device: torch.device) -> None:
        """Copy a parameter's state to a device."""
        layouts = self._optimizer._layouts[parameter]
        for layout, own in zip(layouts, self._optimizer._states_of(parameter, state), strict=True):
            for name, value in own.items():
                if (layout, name) in self._homes:
                    own[name] = _like(value, flat(value).to(device, copy=True))

    def twin(self, part: Part) -> Part | None:
        """The host's part of the device's, if the host steps it."""
        if part.layout not in self._mirrors:
            return None
        weights, grad = self._mirrors[part.layout]
        twin = self._parts.get(part.layout)
        if twin is None or not twin.is_of(weights, part.given):
            twin = Part(part.layout, weights, part.given, stochastic=part.stochastic)
            self._parts[part.layout] = twin
        twin.grad, twin.step = grad, part.step
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
    if sum(piece.rows * piece.cols for piece in layout.pieces) < _LEAST_MOVED_NUMEL:
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
