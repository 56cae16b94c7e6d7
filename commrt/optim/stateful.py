"""The state of an optimizer: made, kept, saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from commrt.optim.parts import State, flat, zeros
from commrt.optim.sections import Layout
from commrt.optim.shards import is_flat
from commrt.optim.states import OWED, Forms, of_weights

if TYPE_CHECKING:
    from commrt.optim.offloading.engine import Engine
    from commrt.optim.totals import Totals


class StatefulOptimizer(Optimizer):
    """An optimizer whose state keeps its dtypes, and is cut as its parameters are.

    Attributes:
        offloaded: What keeps the state in host memory, after :func:`commrt.optim.offload`.
    """

    _FORMS: Forms
    _layouts: dict[nn.Parameter, tuple[Layout, ...]]
    weight_mode: str
    offloaded: Engine | None

    def _agreed_totals(self) -> Totals:
        raise NotImplementedError

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def _moments(self, layout: Layout) -> dict[str, torch.dtype]:
        """Names and dtypes of a tensor's moments that have an element for each of its own."""
        raise NotImplementedError

    def _new_part(self, layout: Layout, device: torch.device) -> State:
        """A tensor's state before its first step, but for what weights need."""
        state: State = {}
        for name, dtype in self._moments(layout).items():
            state |= zeros(layout, dtype, name, device)
        return state

    def _new_state(self, parameter: nn.Parameter, device: torch.device) -> State:
        """A parameter's, before its first step."""
        parts = []
        for layout in self._layouts[parameter]:
            part = self._new_part(layout, device)
            part |= of_weights(layout, parameter, self.weight_mode, device)
            parts.append(part)
        step = {"step": torch.tensor(0.0)}
        return {**step, "tensors": parts} if is_flat(parameter) else {**step, **parts[0]}

    def _kept(self, parameter: nn.Parameter, state: State) -> State:
        """A state, where it is to be kept."""
        return state if self.offloaded is None else self.offloaded.adopt(parameter, state)

    def _kept_of(self, parameter: nn.Parameter) -> Iterator[tuple[Layout, State]]:
        """The state that there is of each of a parameter's tensors."""
        if parameter in self.state:
            states = self._states_of(parameter, self.state[parameter])
            yield from zip(self._layouts[parameter], states, strict=True)

    def _states_of(self, parameter: nn.Parameter, state: State) -> list[State]:
        """Of the tensors that a parameter is, or has in it."""
        tensors: list[State] = state["tensors"] if is_flat(parameter) else [state]
        return tensors

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch does."""
        if self.offloaded is not None and not set_to_none:
            self.offloaded.wait()  # a step may still read them
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As torch does; of flat parameters in the form of AdamW's."""
        if self.offloaded is not None:
            self.offloaded.settle()
        result = super().state_dict()
        ids = [id_ for group in result["param_groups"] for id_ in group["params"]]
        for id_, parameter in zip(ids, self._parameters(), strict=True):
            if is_flat(parameter) and id_ in result["state"]:
                own = result["state"][id_]
                parts = zip(self._layouts[parameter], own["tensors"], strict=True)
                result["state"][id_] = {
                    "step": own["step"], **self._FORMS.expanded(parameter, list(parts))
                }  # fmt: skip
        if self.offloaded is not None:
            self._add_owed(result, ids)
        return result

    def _add_owed(self, result: dict[str, Any], ids: Sequence[int]) -> None:
        """What the codec of gradients that come to the host owes, where it has a memory."""
        assert self.offloaded is not None
        for id_, parameter in zip(ids, self._parameters(), strict=True):
            if id_ in result["state"]:
                owed = self.offloaded.owed(parameter)
                result["state"][id_] = {**result["state"][id_], **owed}

    def as_adamw(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a whole parameter in AdamW's form: fp32, a second moment an element.

        That is what FSDP1 can load, and torch's AdamW.
        """
        return self._FORMS.as_adamw(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but every tensor keeps its dtype.

        AdamW's state, too: it becomes what this optimizer would have, with the mean of a block's
        second moments.

        Ranks: all that share parameters must call.

        Raises:
            StateError: A tensor has another shape or dtype than this optimizer's would have.
        """
        if self.offloaded is not None:
            self.offloaded.make_way()
        loaded: dict[nn.Parameter, State] = {}
        seconds: dict[Layout, Tensor] = {}

        def take_state(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            """Torch would cast it."""
            ids = [id_ for group in final["param_groups"] for id_ in group["params"]]
            for id_, parameter in zip(ids, self._parameters(), strict=False):
                state = final["state"].get(id_)
                if state:
                    loaded[parameter] = self._loaded(parameter, state, seconds)
            return {**final, "state": {}}

        hook = self.register_load_state_dict_pre_hook(take_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for parameter, state in loaded.items():
            self.state[parameter] = self._kept(parameter, state)
        self._finish_loading(seconds)

    def _loaded(
        self,
        parameter: nn.Parameter,
        given: Mapping[str, Any],
        seconds: dict[Layout, Tensor],
    ) -> State:
        new = self._new_state(parameter, parameter.device)
        if OWED in given:
            given = dict(given)
            self._take_owed(parameter, given.pop(OWED))
        for layout, own in zip(
            self._layouts[parameter], self._states_of(parameter, new), strict=True
        ):
            own, state = (
                {name: value for name, value in some.items() if name != "step"}
                for some in (own, given)
            )
            second = self._FORMS.load(layout, own, state)
            if second is not None:
                seconds[layout] = second
        new["step"] = torch.as_tensor(given["step"]).to("cpu", torch.float32, copy=True)
        return new

    def _take_owed(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.offloaded is None or not self.offloaded.owe(parameter, value):
            warnings.warn(
                f"{OWED} of a parameter of shape {tuple(parameter.shape)} is not loaded: this "
                "optimizer's gradients do not go through a codec with a memory",
                stacklevel=4,
            )

    def _finish_loading(self, seconds: Mapping[Layout, Tensor]) -> None:
        """Find the second moments of blocks that are in several ranks, of AdamW's."""
        if not seconds and not any(map(is_flat, self._parameters())):
            return
        with torch.no_grad():
            totals = self._agreed_totals()
            totals.average(seconds)
            for parameter in self._parameters():
                for layout, own in self._kept_of(parameter):
                    if layout in seconds:
                        totals.update_second(layout, flat(own["exp_avg_sq"]), 0.0, None)

    def state_bytes_of(self, parameter: nn.Parameter) -> int:
        """Bytes of the state that this rank has of a parameter, or will have after a step."""
        state = self._new_state(parameter, torch.device("meta"))
        tensors = [v for own in self._states_of(parameter, state) for v in own.values()]
        if is_flat(parameter):
            tensors.append(state["step"])
        local = [v.to_local() if isinstance(v, DTensor) else v for v in tensors]
        return sum(value.numel() * value.element_size() for value in local)
