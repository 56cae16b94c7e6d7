"""Adam-mini: one second moment for each dense block of the Hessian."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import Second, StepOptions, StepTensor
from commrt.optim.base import (
    MomentumDtype,
    Params,
    StepOptimizer,
    WeightMode,
    moment_dtype,
    scale_shape,
)
from commrt.optim.partition import Blocks, by_shape, find_blocks, parse, whole

Partition = Callable[[str, nn.Parameter], str | None] | Mapping[str, str]


class AdamMini(StepOptimizer):
    """AdamW with one learning rate a block instead of one a weight: half the state, or an eighth.

    With S the sum of the squares of the gradient g over a block of n elements, in step t::

        v <- beta2 v + (1 - beta2) S / n;   m <- beta1 m + (1 - beta1) g
        w <- (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    A drop-in for ``torch.optim.AdamW`` with the same hyperparameters. State of a parameter:
    ``exp_avg``, shaped like it, and with 8 bits ``exp_avg_scale``; ``exp_avg_sq`` in fp32, an
    element for each row (or column) that can be broadcast to it, so that a head's value is there
    once for each of its rows.

    Args:
        params: A model, or parameters, (name, parameter) pairs or groups of them. Only from a model
            can heads, experts and transposed weights be recognised; else matrices have a block a
            row.
        lr: Learning rate, a number or a scalar tensor.
        betas: Decay of the first and the second moment.
        eps: Added to the root, after bias correction.
        weight_decay: Decoupled.
        momentum_dtype: Of ``exp_avg``: "fp32" (4 bytes a parameter), "bf16" (2), "int8" (1.02:
            blocks of 256 elements of a row, with an fp32 scale each).
        weight_mode: Of bf16 and fp16 weights. "auto", "master": an fp32 copy (4 bytes). For bf16
            also "residual": the eight bits that follow (1 byte), or "stochastic": rounded
            stochastically, without memory.
        partition: Blocks of some parameters: a mapping of regular expressions, which a whole name
            has to match, to texts ("row", "row:64", "column", "column:64", "element", "tensor"), or
            a function of name and parameter that returns such a text or None.
        vectors: Blocks of biases and norms: "element", or "tensor" as in the paper.
        maximize: Go up.
        max_grad_norm: Clip gradients to this global norm in the step, without changing them;
            ``grad_norm`` is then the norm before clipping.
        seed: Of stochastic rounding; the same on all ranks of data-parallel training.

    Raises:
        ConfigError: A value is out of range; names it and what is allowed.

    Cost: 4 bytes of state a parameter, 8 with AdamW; 20 bytes a step and parameter from and to
    memory, 28 with AdamW.

    Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", ICLR 2025 (arXiv
    2406.16793), algorithm 1; differs from it in biases and norms, unless ``vectors="tensor"``.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        momentum_dtype: MomentumDtype = "fp32",
        weight_mode: WeightMode = "auto",
        partition: Partition | None = None,
        vectors: Literal["element", "tensor"] = "element",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        if vectors not in ("element", "tensor"):
            raise ConfigError(f"vectors={vectors!r}: must be element or tensor")
        self._partition = partition
        self._vectors = vectors
        self._blocks: dict[nn.Parameter, Blocks] = {}
        if isinstance(params, nn.Module):
            places = {
                (module, name): parameter
                for module in params.modules()
                for name, parameter in module.named_parameters(recurse=False)
            }
            found = find_blocks(params, {place: tuple(p.shape) for place, p in places.items()})
            for place, blocks in found.items():
                self._blocks.setdefault(places[place], blocks)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            momentum_dtype=momentum_dtype,
            weight_mode=weight_mode,
            maximize=maximize,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = group.get("param_names") or [""] * len(group["params"])
        for name, parameter in zip(names, group["params"], strict=True):
            self._blocks[parameter] = self._choose(name, parameter)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_partition", "_vectors", "_blocks")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _choose(self, name: str, parameter: nn.Parameter) -> Blocks:
        shape = tuple(parameter.shape)
        text = None
        if callable(self._partition):
            text = self._partition(name, parameter)
        elif self._partition is not None:
            found = (t for pattern, t in self._partition.items() if re.fullmatch(pattern, name))
            text = next(found, None)
        if text is not None:
            return parse(text, shape)
        blocks = self._blocks.get(parameter) or by_shape(shape)
        if blocks.why == "vector" and self._vectors == "tensor":
            return whole(shape, "vector")
        return blocks

    def describe(self) -> str:
        """A table of the parameters: shape, blocks, and bytes of state."""
        rows = [("parameter", "shape", "taken for", "blocks", "momentum", "bytes of state")]
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            for name, parameter in zip(names, group["params"], strict=True):
                blocks = self._blocks[parameter]
                dtype = self._moment_dtype(blocks)
                rows.append(
                    (
                        name,
                        " x ".join(map(str, parameter.shape)),
                        blocks.why,
                        f"{blocks.num_blocks:,}",
                        str(dtype).removeprefix("torch."),
                        f"{self.state_bytes_of(parameter):,}",
                    )
                )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def _moment_dtype(self, blocks: Blocks) -> torch.dtype:
        if blocks.axis == "element":
            return torch.float32
        return moment_dtype(self.momentum_dtype, math.prod(blocks.shape), blocks.cols)

    def _init(self, parameter: nn.Parameter, state: dict[str, Any], device: torch.device) -> None:
        super()._init(parameter, state, device)
        blocks = self._blocks[parameter]
        dtype = self._moment_dtype(blocks)
        state["exp_avg"] = torch.zeros(blocks.shape, dtype=dtype, device=device)
        if dtype == torch.int8:
            shape = scale_shape(blocks.rows, blocks.cols)
            state["exp_avg_scale"] = torch.zeros(shape, device=device)
        state["exp_avg_sq"] = torch.zeros(blocks.second_shape, device=device)

    def _update(
        self,
        group: dict[str, Any],
        step: int,
        parameters: list[nn.Parameter],
        grad_factor: Tensor | None,
    ) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        parts: list[_Part] = []
        options = StepOptions(
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            decay=1 - lr * group["weight_decay"],
            step_size=lr / (1 - beta1**step),
            root_correction=math.sqrt(1 - beta2**step),
            grad_scale=-1.0 if self.maximize else 1.0,
        )
        in_blocks: list[StepTensor] = []
        by_element: list[StepTensor] = []
        for parameter in parameters:
            blocks = self._blocks[parameter]
            part = self._part(parameter, step)
            if blocks.axis == "element":
                by_element.append(part.elements())
            elif blocks.axis == "row":
                in_blocks.extend(part.rows(blocks))
            else:
                in_blocks.extend(part.columns(blocks, options, grad_factor))
            parts.append(part)
        ops.adam_mini_(in_blocks, options, grad_factor=grad_factor)
        ops.adamw_(by_element, options, grad_factor=grad_factor)
        for part in parts:
            part.write_back()

    def _part(self, parameter: nn.Parameter, step: int) -> _Part:
        blocks, state = self._blocks[parameter], self.state[parameter]
        stochastic = blocks.is_embedding and state["exp_avg"].dtype == torch.int8
        is_drawn = stochastic or self.weight_mode == "stochastic"
        return _Part(parameter, state, stochastic, self._seed(parameter, step) if is_drawn else 0)


class _Part:
    """A parameter with its gradient and state, as matrices."""

    def __init__(
        self, parameter: nn.Parameter, state: dict[str, Any], stochastic: bool, seed: int
    ) -> None:
        assert parameter.grad is not None
        self._parameter, self._stochastic, self._seed = parameter, stochastic, seed
        self._weights = parameter.detach().contiguous()
        self._grad = parameter.grad.detach().contiguous()
        self._moment: Tensor = state["exp_avg"]
        self._scale: Tensor | None = state.get("exp_avg_scale")
        self._second: Tensor = state["exp_avg_sq"]
        self._extra: Tensor | None = state.get("master", state.get("weight_residual"))

    def write_back(self) -> None:
        """What is not contiguous was stepped as a copy."""
        if self._weights.data_ptr() != self._parameter.data_ptr():
            self._parameter.copy_(self._weights)

    def elements(self) -> StepTensor:
        """One row, each element with a second moment."""
        return StepTensor(
            weights=self._weights.view(-1),
            grad=self._grad.view(-1),
            moments=(self._moment.view(-1), self._second.view(-1)),
            rows=min(1, self._weights.numel()),
            cols=max(1, self._weights.numel()),
            extra=None if self._extra is None else self._extra.view(-1),
            seed=self._seed,
        )

    def rows(self, blocks: Blocks) -> Iterator[StepTensor]:
        """Runs of rows with blocks of one size."""
        row = 0
        for lines, size in blocks.block_sizes():
            second = self._second.view(-1)[row : row + lines]
            yield self._matrix(row, lines, blocks.cols, second, Second.UPDATED, size)
            row += lines

    def columns(
        self, blocks: Blocks, options: StepOptions, grad_factor: Tensor | None
    ) -> Iterator[StepTensor]:
        """The matrices of a stack, whose columns have second moments, updated here."""
        matrices = math.prod(blocks.shape[: blocks.stack_dims])
        rows, cols = blocks.rows // matrices, blocks.cols
        grads = self._grad.view(matrices, -1)
        sums_SC = grads.new_empty(matrices, cols, dtype=torch.float64)
        ops.square_sums(
            list(grads.unbind()), list(sums_SC.unbind()), [(rows, cols)] * matrices,
            by_column=[True] * matrices,
        )  # fmt: skip
        if grad_factor is not None:
            sums_SC *= grad_factor.double() ** 2
        means = []
        for sums, (_, size) in zip(
            sums_SC.split([lines for lines, _ in blocks.block_sizes()], dim=1),
            blocks.block_sizes(),
            strict=True,
        ):
            total = sums.unflatten(1, (-1, size)).sum(dim=2)
            means.append((total / (size * rows)).repeat_interleave(size, dim=1))
        second_SC = self._second.view(matrices, cols)
        mean_SC = torch.cat(means, dim=1).float()
        second_SC.mul_(options.beta2).add_(mean_SC, alpha=1 - options.beta2)
        for matrix, second in enumerate(second_SC.unbind()):
            yield self._matrix(matrix * rows, rows, cols, second, Second.OF_COLUMN)

    def _matrix(
        self, row: int, rows: int, cols: int, second: Tensor, kind: Second, size: int = 1
    ) -> StepTensor:
        def part(value: Tensor) -> Tensor:
            return value.view(-1)[row * cols : (row + rows) * cols]

        scale = () if self._scale is None else (self._scale[row : row + rows].view(-1),)
        return StepTensor(
            weights=part(self._weights),
            grad=part(self._grad),
            moments=(part(self._moment),),
            rows=rows,
            cols=cols,
            scales=scale,
            extra=None if self._extra is None else part(self._extra),
            stochastic=self._stochastic,
            seed=self._seed,
            first_index=row * cols,
            index_stride=cols,
            second=second,
            second_from=kind,
            block_rows=size,
        )
