"""The tensors of an optimizer step, checked and made into lists once for many steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.format import FLOAT_DTYPES
from commrt.ops.lists import (
    NUM_PLACES,
    SEED_PLACE,
    Second,
    StepOptions,
    StepTensor,
    flatten,
    option_values,
)  # fmt: skip

# Of each step's moments, whether it has a sign.
_SIGNED = {
    "adam_mini_": (True,),
    "adamw_": (True, False),
    "mofo_": (True, False),
    "lion_": (True,),
    "adan_": (True, True, False, True),
}


class StepBatch:
    """What a step takes in place of a list of tensors, if it is to take the same ones again.

    Args:
        name: Of the step: "adam_mini_", say.
        tensors: What it is of.

    Raises:
        ConfigError: A tensor is not what the step expects.
    """

    def __init__(self, name: str, tensors: Sequence[StepTensor]) -> None:
        self._name = name
        for i, t in enumerate(tensors):
            _check(i, t, name)
        self._lists = flatten(tensors)
        self._numel = [t.grad.numel() for t in tensors]
        self._device = tensors[0].weights.device if tensors else torch.device("cpu")

    def renew(self, grads: Sequence[Tensor], seeds: Sequence[int] | None = None) -> None:
        """Take other gradients for the next step, and seeds.

        Args:
            grads: Contiguous, each of as many elements as the one before; fp32, bf16 or fp16.
            seeds: In [0, 2**63).
        """
        for i, (numel, grad) in enumerate(zip(self._numel, grads, strict=True)):
            is_like = grad.numel() == numel and grad.device == self._device
            if not is_like or grad.dtype not in FLOAT_DTYPES or not grad.is_contiguous():
                raise ConfigError(
                    f"grad of tensor {i} is {grad.dtype} of {grad.numel()} elements on "
                    f"{grad.device}: must be contiguous, one of {FLOAT_DTYPES}, of "
                    f"{numel} elements on {self._device}"
                )
        self._lists[2][:] = grads
        if seeds is not None:
            self._lists[6][SEED_PLACE::NUM_PLACES] = seeds

    def forget_grads(self) -> None:
        """Let go of the gradients, so that their memory is free before the next ones are there."""
        self._lists[2].clear()

    def run(self, name: str, options: StepOptions, grad_factor: Tensor | None) -> None:
        """Call the operator of the step that it was made for."""
        if name != self._name:
            raise ConfigError(f"a batch for {self._name} was given to {name}")
        if not self._lists[0]:
            return
        if grad_factor is not None:
            is_scalar = (grad_factor.dtype, grad_factor.numel()) == (torch.float32, 1)
            if not is_scalar or grad_factor.device != self._device:
                raise ConfigError(
                    f"grad_factor is {grad_factor.dtype} on {grad_factor.device}: must be a "
                    f"float32 scalar on {self._device}"
                )
        getattr(torch.ops.commrt, name)(*self._lists, option_values(options), grad_factor)


def _check(i: int, t: StepTensor, name: str) -> None:
    """A kernel given other tensors than it expects would write where nothing is."""
    signed = _SIGNED[name]
    _check_weights(i, t)
    if len(t.moments) != len(signed):
        raise ConfigError(f"tensor {i} has {len(t.moments)} moments: must be {len(signed)}")
    _check_moments(i, t, signed)
    if not (0 <= t.seed < 1 << 63 and 0 <= t.first_index < 1 << 63):
        raise ConfigError(f"seed or first_index of tensor {i}: must be in [0, 2**63)")
    for other in (t.grad, *t.moments, *t.scales, t.extra, t.second):
        if other is not None and other.device != t.weights.device:
            raise ConfigError(
                f"tensor {i} is on {other.device} and {t.weights.device}: must be on one"
            )
    if name == "mofo_":
        _check_second(i, t, 1)
    if name == "adam_mini_":
        _check_second(i, t, t.cols if t.second_from == Second.OF_COLUMN else t.rows)
        if t.block_rows < 1 or t.rows % t.block_rows:
            raise ConfigError(
                f"block_rows={t.block_rows} of tensor {i}: must divide its {t.rows} rows"
            )


def _check_weights(i: int, t: StepTensor) -> None:
    numel = t.rows * t.cols
    if t.rows < 0 or t.cols < 1:
        raise ConfigError(f"tensor {i} is {t.rows} x {t.cols}: must have a column")
    for name, value in (("weights", t.weights), ("grad", t.grad)):
        if value.dtype not in FLOAT_DTYPES:
            raise ConfigError(f"{name} of tensor {i}: {value.dtype} must be one of {FLOAT_DTYPES}")
    tensors = {"weights": t.weights, "grad": t.grad}
    if t.extra is not None:
        tensors["extra"] = t.extra
    for k, moment in enumerate(t.moments):
        tensors[f"moment {k}"] = moment
    for name, value in tensors.items():
        if value.numel() != numel or not value.is_contiguous():
            raise ConfigError(f"{name} of tensor {i}: must be contiguous, {t.rows} x {t.cols}")
    kinds = {torch.float32: (None,), torch.bfloat16: (None, torch.float32, torch.int8)}
    allowed = kinds.get(t.weights.dtype, (torch.float32,))
    found = None if t.extra is None else t.extra.dtype
    if found not in allowed:
        raise ConfigError(
            f"extra of tensor {i} is {found}: must be one of {allowed} for {t.weights.dtype}"
        )


def _check_second(i: int, t: StepTensor, expected: int) -> None:
    if t.second is None or t.second.dtype != torch.float32 or t.second.numel() != expected:
        raise ConfigError(f"second of tensor {i}: must be fp32 of {expected} elements")


def _check_moments(i: int, t: StepTensor, signed: Sequence[bool]) -> None:
    first = t.moments[0].dtype
    if first not in (torch.float32, torch.bfloat16, torch.int8):
        raise ConfigError(f"moments of tensor {i} are {first}: must be float32, bfloat16 or int8")
    for moment, has_sign in zip(t.moments, signed, strict=True):
        expected = torch.float32 if first == torch.bfloat16 and not has_sign else first
        if moment.dtype != expected:
            raise ConfigError(f"a moment of tensor {i} is {moment.dtype}: must be {expected}")
    if first != torch.int8:
        return
    segments = t.rows * t.segments_per_row
    if len(t.scales) != len(t.moments) or any(
        scale.dtype != torch.float32 or scale.numel() != segments or not scale.is_contiguous()
        for scale in t.scales
    ):
        raise ConfigError(f"scales of tensor {i}: must be fp32 of {segments} elements a moment")
