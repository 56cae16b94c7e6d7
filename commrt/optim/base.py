"""What the optimizers share: a step over the parts of all parameters, and torch's contract."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from commrt.collectives.wrappers import plain_name
from commrt.errors import ConfigError
from commrt.ops import StepOptions
from commrt.optim.batches import Batches, Rows
from commrt.optim.offloading.engine import Engine
from commrt.optim.partition import Blocks, Place, by_shape
from commrt.optim.parts import Part
from commrt.optim.sections import Layout
from commrt.optim.shards import Shard, Span, find_shards, is_flat, shard_of
from commrt.optim.stateful import StatefulOptimizer
from commrt.optim.totals import Totals

MomentumDtype = Literal["fp32", "bf16", "int8"]
WeightMode = Literal["auto", "master", "residual", "stochastic"]
Params = nn.Module | Iterable[Any]

MOMENTUM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_WEIGHT_MODES = ("auto", "master", "residual", "stochastic")
# Smaller parameters keep fp32 moments: 8 bits would save nothing worth the rounding.
_LEAST_CODED_NUMEL = 4096
_LEAST_CODED_COLS = 64


class Common(TypedDict, total=False):
    """What every optimizer takes by name.

    Attributes:
        model: That the parameters are of, if ``params`` is not it. FSDP1's need it; and only from a
            model does AdamMini know heads, experts and transposed weights.
        momentum_dtype: Of the moments that have a sign; "fp32" if not said otherwise, "bf16", or
            "int8": blocks of 256 elements of a row, with an fp32 scale each.
        weight_mode: Of bf16 and fp16 weights. "auto", "master": an fp32 copy (4 bytes). For bf16
            also "residual": the eight bits that follow (1 byte), or "stochastic": rounded
            stochastically, without memory.
        maximize: Go up.
        max_grad_norm: Clip gradients to this global norm in the step, without changing them;
            ``grad_norm`` is then the norm before clipping. None for no clipping.
        seed: Of stochastic rounding, in [0, 2**31); the same on all ranks that train one model.
    """

    model: nn.Module | None
    momentum_dtype: MomentumDtype
    weight_mode: WeightMode
    maximize: bool
    max_grad_norm: float | None
    seed: int


class StepOptimizer(StatefulOptimizer):
    """An optimizer whose step is one op over all parameters of a group.

    State of a parameter, beside its moments: ``step``, an fp32 scalar on the CPU; ``master`` or
    ``weight_residual``, where ``weight_mode`` asks for it. The state of a DTensor are DTensors, cut
    as it is. Of FSDP1's parameters ``state_dict()`` has what AdamW would have, which FSDP can take
    apart: a second moment an element, and all in fp32.

    Args:
        params: A model, or what every optimizer of torch takes: parameters, (name, parameter)
            pairs, or groups of either. Parameters can be DTensors (``fully_shard``, tensor
            parallelism), or FSDP1's.
        defaults: Of the groups' options.
        common: See :class:`Common`.

    Raises:
        ConfigError: A value is out of range; names it and what is allowed.
    """

    _step_supports_amp_scaling = True
    _NUM_BETAS = 2
    _HAS_BLOCKS = False
    """Whether there are second moments that several ranks may have to sum."""
    _READS_MOMENTA = False
    """Whether a step cannot begin before all moments and gradients have been read once."""
    _KEPT: tuple[str, ...] = (
        *("momentum_dtype", "weight_mode", "maximize", "max_grad_norm", "seed", "grad_norm"),
        *("_layouts", "_found", "_numbers"),
    )

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        **common: Unpack[Common],
    ) -> None:
        model = common.get("model")
        momentum_dtype = common.get("momentum_dtype", "fp32")
        weight_mode = common.get("weight_mode", "auto")
        max_grad_norm = common.get("max_grad_norm")
        seed = common.get("seed", 0)
        unknown = common.keys() - Common.__annotations__.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {min(unknown)!r}")
        _require("momentum_dtype", momentum_dtype, MOMENTUM_DTYPES)
        _require("weight_mode", weight_mode, _WEIGHT_MODES)
        if not 0 <= seed < 1 << 31:
            raise ConfigError(f"seed={seed}: must be in [0, 2**31)")
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ConfigError(f"max_grad_norm={max_grad_norm}: must be above 0 and finite, or None")
        self.momentum_dtype: MomentumDtype = momentum_dtype
        self.weight_mode: WeightMode = weight_mode
        self.maximize = common.get("maximize", False)
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.grad_norm: Tensor | None = None
        self._totals: Totals | None = None
        self.offloaded: Engine | None = None
        self._batches = self._new_batches()
        self._layouts: dict[nn.Parameter, tuple[Layout, ...]] = {}
        self._numbers: dict[Layout, int] = {}
        self._found: dict[nn.Parameter, list[Shard]] = {}
        given: Any = params
        if isinstance(params, nn.Module):
            model, given = params, params.named_parameters()
        if model is not None:
            self._read(model)
        super().__init__(given, defaults)

    def _read(self, model: nn.Module) -> None:
        """Find what the rank has of a model's tensors."""
        places: dict[Place, Shard] = {}
        for place, parameter, shard in find_shards(model):
            found = self._found.setdefault(parameter, [])
            if not found or isinstance(shard, Span):
                found.append(shard)
            places.setdefault(place, shard)
        self._read_modules(model, places)

    def _read_modules(self, model: nn.Module, places: Mapping[Place, Shard]) -> None:
        """Find out what else the modules say."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does.

        Raises:
            ConfigError: An option is out of range, or the step cannot serve a parameter.
        """
        check_options({**self.defaults, **param_group}, self._NUM_BETAS)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = group.get("param_names") or [""] * len(group["params"])
        try:
            for name, parameter in zip(names, group["params"], strict=True):
                self._add(plain_name(name), parameter)
        except ConfigError:
            self.param_groups.pop()
            raise
        self._totals = None

    def _add(self, name: str, parameter: nn.Parameter) -> None:
        self._check(name, parameter)
        shards = self._found.get(parameter) or [shard_of(name, parameter)]
        layouts = tuple(Layout(shard, self._blocks(shard, parameter)) for shard in shards)
        self._layouts[parameter] = layouts
        for layout in layouts:
            # The same however the model is wrapped, if names are known.
            name_sum = zlib.crc32(layout.shard.name.encode())
            self._numbers[layout] = name_sum if layout.shard.name else len(self._numbers)

    def _blocks(self, shard: Shard, parameter: nn.Parameter) -> Blocks:
        """Of a tensor; here it only says what its rows are."""
        return by_shape(shard.shape)

    def __getstate__(self) -> dict[str, Any]:
        if self.offloaded is not None:
            self.offloaded.settle()
        kept = {name: getattr(self, name) for name in self._KEPT}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._totals, self._batches = None, self._new_batches()
        if "momentum_dtype" in state:  # a copy; torch calls this to load a state dict, too
            self.offloaded = None

    def _new_batches(self) -> Batches:
        is_drawn = self.weight_mode == "stochastic"
        return Batches(self._tensors, self._seed, self._is_stochastic, is_drawn=is_drawn)

    def _check(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"parameter {name!r} is {parameter.dtype}: must be float32, bfloat16 or float16"
            )
        if is_flat(parameter) and parameter not in self._found:
            raise ConfigError(
                f"parameter {name!r} is FSDP's: give the model that FSDP has wrapped, as params or "
                "as model="
            )
        if parameter.dtype == torch.float16 and self.weight_mode not in ("auto", "master"):
            raise ConfigError(
                f"weight_mode={self.weight_mode!r} with float16 parameters: must be 'master'"
            )

    # -- a step -----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Called first, with gradients enabled; its value is returned.

        Ranks: all that share parameters must call, also one whose gradients are all None.

        Raises:
            PeerMismatchError: In the first step, if ranks that share parameters have made
                different optimizers.
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
        if self.offloaded is not None:
            self.offloaded.begin(
                is_unscaled=found_inf is not None and scale is None,
                is_scaled=found_inf is not None,
            )
        groups = [(group, list(self._parts_of(group))) for group in self.param_groups]
        totals = self._agreed_totals()
        totals.sum({part.layout: part.grad for _, some in groups for part in some}, found_inf)
        if totals.found_inf or (found_inf is not None and bool(found_inf)):
            if self.offloaded is not None:
                self.offloaded.skip()
            return
        factor = None if scale is None else scale.float().reciprocal()
        if self.max_grad_norm is not None:
            factor = self._clip(totals, factor, self.max_grad_norm)
        if self.offloaded is not None:
            self.offloaded.update(groups, factor)
        else:
            self._update(groups, factor)
        steps = [self.state[p]["step"] for p in self._parameters() if p.grad is not None]
        if steps:
            torch._foreach_add_(steps, 1)

    def _update(
        self, groups: Sequence[tuple[dict[str, Any], Sequence[Part]]], factor: Tensor | None
    ) -> None:
        self._prepare(groups, factor)
        for group, parts in groups:
            by_step: dict[int, list[Part]] = {}
            for part in parts:
                by_step.setdefault(part.step, []).append(part)
            for step, alike in by_step.items():
                self._batches.run(alike, self._options(group, step), factor)

    def _parts_of(self, group: dict[str, Any]) -> Iterator[Part]:
        """All that this rank has of a group, and has a gradient."""
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter not in self._layouts:
                raise ConfigError(
                    f"a parameter of shape {tuple(parameter.shape)} is there in the place of "
                    "another: the optimizer must be made after the model is wrapped"
                )
            state = self.state[parameter]
            if not state:
                state.update(self._kept(parameter, self._new_state(parameter, parameter.device)))
            step = int(state["step"]) + 1
            for layout, own in zip(
                self._layouts[parameter], self._states_of(parameter, state), strict=True
            ):
                part = self._batches.part(layout, layout.shard.local(parameter), own)
                part.take(parameter.grad, step)
                yield part

    def _is_stochastic(self, layout: Layout) -> bool:
        """Whether the first moment of a tensor is rounded stochastically."""
        return False

    def _prepare(
        self, groups: Sequence[tuple[dict[str, Any], Sequence[Part]]], grad_factor: Tensor | None
    ) -> None:
        """What else is to be done before a step; all ranks call, with or without parts."""

    def _tensors(self, part: Part) -> Rows:
        """The rows of a part, with the name of the op that updates them."""
        raise NotImplementedError

    def _options(self, group: dict[str, Any], step: int) -> StepOptions:
        """The coefficients of a step, from 1."""
        raise NotImplementedError

    @property
    def _sums_apart(self) -> bool:
        """Whether the step's kernel has not the gradients as they were, whose squares to sum."""
        return self._HAS_BLOCKS and self.offloaded is not None and self.offloaded.is_lossy

    def _agreed_totals(self) -> Totals:
        if self._totals is None:
            pairs = [(own, p.device) for p in self._parameters() for own in self._layouts[p]]
            self._totals = Totals(
                [layout for layout, _ in pairs],
                [device for _, device in pairs],
                {
                    "optimizer": type(self).__name__,
                    "max_grad_norm": str(self.max_grad_norm),
                    "weight_mode": self.weight_mode,
                    "seed": self.seed,
                    "sums_apart": self._sums_apart,
                },
                wants_norm=self.max_grad_norm is not None,
                wants_blocks=self._HAS_BLOCKS,
                wants_all_blocks=self._sums_apart,
            )
        return self._totals

    def _clip(self, totals: Totals, factor: Tensor | None, largest: float) -> Tensor:
        """What gradients are multiplied by, so that their norm is at most ``largest``.

        As ``torch.nn.utils.clip_grad_norm_``, without changing them.
        """
        norm = totals.square_norm.sqrt()
        if factor is not None:
            norm *= factor.double()
        self.grad_norm = norm.float()
        clip = (largest / (norm + 1e-6)).clamp(max=1.0).float()
        return clip if factor is None else clip * factor

    def _seed(self, layout: Layout, step: int) -> int:
        """Of a tensor's random numbers in a step."""
        number = self._numbers[layout]
        return (self.seed << 32 ^ step * 0x9E3779B97F4A7C15 ^ number * 0xBF58476D1CE4E5B9) % (
            1 << 63
        )


def check_options(options: Mapping[str, Any], num_betas: int) -> None:
    """Raise ConfigError for a rate, beta, eps or decay that is out of range."""
    if len(options["betas"]) != num_betas:
        raise ConfigError(f"betas={options['betas']}: must be {num_betas}")
    if not 0 <= float(options["lr"]) < math.inf:
        raise ConfigError(f"lr={options['lr']}: must be at least 0 and finite")
    if not all(0 <= beta < 1 for beta in options["betas"]):
        raise ConfigError(f"betas={options['betas']}: must be in [0, 1)")
    for name in ("eps", "weight_decay"):
        if name in options and not 0 <= options[name] < math.inf:
            raise ConfigError(f"{name}={options[name]}: must be at least 0 and finite")


def moment_dtype(chosen: MomentumDtype, layout: Layout) -> torch.dtype:
    """Of a tensor's moments that have a sign."""
    blocks = layout.blocks
    if chosen != "int8":
        return MOMENTUM_DTYPES[chosen]
    if math.prod(blocks.shape) < _LEAST_CODED_NUMEL or blocks.cols < _LEAST_CODED_COLS:
        return torch.float32
    return torch.int8 if layout.shard.can_be_coded(blocks) else torch.bfloat16


def _require(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
