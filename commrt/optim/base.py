"""What the optimizers share: parameters as lists of matrices, their state, and torch's contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from commrt import ops
from commrt.errors import ConfigError, StateError
from commrt.ops import SEGMENT

MomentumDtype = Literal["fp32", "bf16", "int8"]
WeightMode = Literal["auto", "master", "residual", "stochastic"]
Params = nn.Module | Iterable[Any]

MOMENTUM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_WEIGHT_MODES = ("auto", "master", "residual", "stochastic")
# Smaller parameters keep fp32 moments: 8 bits would save nothing worth the rounding.
_LEAST_CODED_NUMEL = 4096
_LEAST_CODED_COLS = 64


class StepOptimizer(Optimizer):
    """An optimizer whose step is one op over all parameters of a group.

    State of a parameter, beside its moments: ``step``, an fp32 scalar on the CPU; ``master`` or
    ``weight_residual``, where ``weight_mode`` asks for it.

    Args:
        params: A model, or what every optimizer of torch takes: parameters, (name, parameter)
            pairs, or groups of either.
        defaults: Of the groups' options.
        momentum_dtype: Of moments that have a sign.
        weight_mode: How half-precision weights keep what they cannot show; see the subclasses.
        maximize: Go up.
        max_grad_norm: Clip gradients to this global norm in the step; None for no clipping.
        seed: Of all stochastic rounding.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        momentum_dtype: MomentumDtype,
        weight_mode: WeightMode,
        maximize: bool,
        max_grad_norm: float | None,
        seed: int,
    ) -> None:
        _require("momentum_dtype", momentum_dtype, MOMENTUM_DTYPES)
        _require("weight_mode", weight_mode, _WEIGHT_MODES)
        if not 0 <= seed < 1 << 31:
            raise ConfigError(f"seed={seed}: must be in [0, 2**31)")
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ConfigError(f"max_grad_norm={max_grad_norm}: must be above 0 and finite, or None")
        self.momentum_dtype: MomentumDtype = momentum_dtype
        self.weight_mode: WeightMode = weight_mode
        self.maximize = maximize
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.grad_norm: Tensor | None = None
        self._places: dict[nn.Parameter, int] = {}
        given: Any = params
        if isinstance(params, nn.Module):
            if any(isinstance(module, FullyShardedDataParallel) for module in params.modules()):
                raise ConfigError(
                    "params is a model of FSDP: sharded parameters cannot be used yet"
                )
            given = params.named_parameters()
        super().__init__(given, defaults)
        for parameter in self._parameters():
            self._check(parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does, after checking the group's options."""
        options = {**self.defaults, **param_group}
        check_options(options)
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._places[parameter] = len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        own = (
            *("momentum_dtype", "weight_mode", "maximize", "max_grad_norm", "seed"),
            *("grad_norm", "_places"),
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def _check(self, parameter: nn.Parameter) -> None:
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"a parameter is {parameter.dtype}: must be float32, bfloat16 or float16"
            )
        if isinstance(parameter, DTensor):
            raise ConfigError("a parameter is a DTensor: sharded parameters cannot be used yet")
        if parameter.dtype == torch.float16 and self.weight_mode not in ("auto", "master"):
            raise ConfigError(
                f"weight_mode={self.weight_mode!r} with float16 parameters: must be 'master'"
            )

    # -- a step -----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Called first, with gradients enabled; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        found_inf, scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        if found_inf is not None and bool(found_inf):
            return
        factor = None if scale is None else scale.float().reciprocal()
        if self.max_grad_norm is not None:
            factor = self._clip(factor, self.max_grad_norm)
        for group in self.param_groups:
            by_step: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    self._init(parameter, state, parameter.device)
                state["step"] += 1
                by_step.setdefault(float(state["step"]), []).append(parameter)
            for step, parameters in by_step.items():
                self._update(group, int(step), parameters, factor)

    def _init(self, parameter: nn.Parameter, state: dict[str, Any], device: torch.device) -> None:
        """State of a parameter before its first step."""
        state["step"] = torch.tensor(0.0)
        if parameter.dtype == torch.float32:
            return
        if self.weight_mode in ("auto", "master"):
            state["master"] = parameter.detach().to(device, torch.float32).contiguous()
        elif self.weight_mode == "residual":
            state["weight_residual"] = torch.zeros(parameter.shape, dtype=torch.int8, device=device)

    def _update(
        self,
        group: dict[str, Any],
        step: int,
        parameters: list[nn.Parameter],
        grad_factor: Tensor | None,
    ) -> None:
        """Take step number ``step`` (from 1) with parameters of a group."""
        raise NotImplementedError

    def _clip(self, factor: Tensor | None, largest: float) -> Tensor:
        """What gradients are multiplied by, so that their norm is at most ``largest``.

        As ``torch.nn.utils.clip_grad_norm_``, without changing them.
        """
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        if not grads:
            return torch.tensor(1.0)
        flat = [grad.detach().contiguous().view(-1) for grad in grads]
        sums = [torch.empty(1, dtype=torch.float64, device=grad.device) for grad in flat]
        some = [i for i, grad in enumerate(flat) if grad.numel()]
        ops.square_sums(
            [flat[i] for i in some], [sums[i] for i in some], [(1, flat[i].numel()) for i in some]
        )
        total = torch.stack([sums[i].to(flat[0].device) for i in some]).sum()
        norm = total.sqrt() * (1.0 if factor is None else factor.double())
        self.grad_norm = norm.float()
        clip = (largest / (norm + 1e-6)).clamp(max=1.0).float()
        return clip if factor is None else clip * factor

    def _seed(self, parameter: nn.Parameter, step: int) -> int:
        """Of a parameter's random numbers in a step."""
        place = self._places[parameter]
        return (self.seed << 32 ^ step * 0x9E3779B97F4A7C15 ^ place * 0xBF58476D1CE4E5B9) % (
            1 << 63
        )

    # -- state ------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but every tensor keeps its dtype.

        Raises:
            StateError: A tensor has another shape or dtype than this optimizer's would have.
        """
        given: dict[str, Any] = {}

        def capture(_: Optimizer, final: dict[str, Any]) -> None:
            given.update(final)

        hook = self.register_load_state_dict_pre_hook(capture)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        ids = [id_ for group in given["param_groups"] for id_ in group["params"]]
        for id_, parameter in zip(ids, self._parameters(), strict=True):
            state = given["state"].get(id_)
            if state:
                self.state[parameter] = self._loaded(parameter, state)

    def _loaded(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
        expected: dict[str, Any] = {}
        self._init(parameter, expected, torch.device("meta"))
        if state.keys() != expected.keys():
            raise StateError(
                f"state of a parameter of shape {tuple(parameter.shape)} has {sorted(state)}: must "
                f"have {sorted(expected)}"
            )
        loaded = {}
        for name, wanted in expected.items():
            value = state[name]
            if name != "step" and (value.dtype, value.shape) != (wanted.dtype, wanted.shape):
                raise StateError(
                    f"{name} of a parameter of shape {tuple(parameter.shape)} is {value.dtype} "
                    f"{tuple(value.shape)}: must be {wanted.dtype} {tuple(wanted.shape)}"
                )
            device = "cpu" if name == "step" else parameter.device
            loaded[name] = value.to(device, wanted.dtype, copy=True)
        return loaded

    def state_bytes_of(self, parameter: nn.Parameter) -> int:
        """Bytes of the state that a parameter has, or will have after its first step."""
        state: dict[str, Tensor] = {}
        self._init(parameter, state, torch.device("meta"))
        return sum(value.numel() * value.element_size() for value in state.values())


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a rate, beta, eps or decay that is out of range."""
    if not 0 <= float(options["lr"]) < math.inf:
        raise ConfigError(f"lr={options['lr']}: must be at least 0 and finite")
    if not all(0 <= beta < 1 for beta in options["betas"]):
        raise ConfigError(f"betas={options['betas']}: must be in [0, 1)")
    for name in ("eps", "weight_decay"):
        if name in options and not 0 <= options[name] < math.inf:
            raise ConfigError(f"{name}={options[name]}: must be at least 0 and finite")


def moment_dtype(chosen: MomentumDtype, numel: int, cols: int) -> torch.dtype:
    """Of a parameter's moments that have a sign."""
    is_small = numel < _LEAST_CODED_NUMEL or cols < _LEAST_CODED_COLS
    return torch.float32 if chosen == "int8" and is_small else MOMENTUM_DTYPES[chosen]


def scale_shape(rows: int, cols: int) -> tuple[int, int]:
    """Of the scales of an 8-bit moment."""
    return rows, -(-cols // SEGMENT)


def _require(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
