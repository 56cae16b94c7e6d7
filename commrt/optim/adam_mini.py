"""Adam-mini: one second moment for each dense block of the Hessian."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from commrt.errors import ConfigError
from commrt.ops import Second, StepOptions
from commrt.optim.adamw import MOMENTS, adam_options
from commrt.optim.base import Common, Params, StepOptimizer, moment_dtype
from commrt.optim.batches import Rows
from commrt.optim.compat import OfficialPartition
from commrt.optim.partition import Blocks, Place, by_shape, find_blocks, parse, whole
from commrt.optim.parts import Part, State, flat
from commrt.optim.sections import Layout
from commrt.optim.shards import Shard
from commrt.optim.states import Forms, of_weights

Partition = Callable[[str, Tensor], str | None] | Mapping[str, str]


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
        params: A model, or parameters, (name, parameter) pairs or groups of them.
        lr: Learning rate, a number or a scalar tensor.
        betas: Decay of the first and the second moment.
        eps: Added to the root, after bias correction.
        weight_decay: Decoupled.
        partition: Blocks of some parameters: a mapping of regular expressions, which a whole name
            has to match, to texts ("row", "row:64", "column", "column:64", "element", "tensor"), or
            a function of a name and a tensor of the whole shape, on the meta device, that returns
            such a text or None.
        vectors: Blocks of biases and norms: "element", or "tensor" as in the paper.
        compat: "v1.1.1": blocks, and no weight decay of norms and biases, by the words in names for
            which the package of the authors, adam-mini 1.1.1, looks; ``partition`` comes first. It
            reads the heads from the model, or from "v1.1.1:dim=2048,num_heads=32".
        common: See :class:`commrt.optim.base.Common`.

    Raises:
        ConfigError: A value is out of range; names it and what is allowed.

    Ranks: a block that is in several ranks is summed over them, in one all-reduce a step, which
    also carries the norm of the gradient: 8 bytes a block. Heads or rows that no rank shares with
    another cost nothing.

    Cost: 4 bytes of state a parameter, 8 with AdamW; 2 with ``momentum_dtype="bf16"``, 1.02 with
    "int8" (embeddings' moments are then rounded stochastically). 20 bytes a step and parameter from
    and to memory, 28 with AdamW.

    Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", ICLR 2025 (arXiv
    2406.16793), algorithm 1; differs from it in biases and norms, unless ``vectors="tensor"``.
    """

    _FORMS = Forms({"exp_avg": "linear"}, lines=("exp_avg_sq",))
    _HAS_BLOCKS = True
    _KEPT = (*StepOptimizer._KEPT, "_partition", "_vectors", "_compat", "_of_modules")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        partition: Partition | None = None,
        vectors: Literal["element", "tensor"] = "element",
        compat: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        if vectors not in ("element", "tensor"):
            raise ConfigError(f"vectors={vectors!r}: must be element or tensor")
        self._partition = partition
        self._vectors = vectors
        whole_model = params if isinstance(params, nn.Module) else common.get("model")
        self._compat = None if compat is None else OfficialPartition.parse(compat, whole_model)
        self._of_modules: dict[Shard, Blocks] = {}
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            **common,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does; ``compat`` makes two groups of it, one of which is not decayed."""
        groups = [param_group]
        if self._compat is not None:
            names = {p: [shard.name for shard in shards] for p, shards in self._found.items()}
            groups = self._compat.groups(param_group, names)
        for group in groups:
            super().add_param_group(group)

    def _read_modules(self, model: nn.Module, places: Mapping[Place, Shard]) -> None:
        found = find_blocks(model, {place: shard.shape for place, shard in places.items()})
        self._of_modules = {places[place]: blocks for place, blocks in found.items()}

    def _blocks(self, shard: Shard, parameter: nn.Parameter) -> Blocks:
        text = None
        if callable(self._partition):
            # FSDP1's parameters have other shapes than their tensors.
            whole_one = torch.empty(shard.shape, dtype=parameter.dtype, device="meta")
            text = self._partition(shard.name, whole_one)
        elif self._partition is not None:
            found = (
                t for pattern, t in self._partition.items() if re.fullmatch(pattern, shard.name)
            )
            text = next(found, None)
        if text is not None:
            return parse(text, shard.shape)
        if self._compat is not None and parameter.requires_grad:
            return self._compat.blocks(shard.name, shard.shape)
        blocks = self._of_modules.get(shard) or by_shape(shard.shape)
        if blocks.why == "vector" and self._vectors == "tensor":
            return whole(shard.shape, "vector")
        return blocks

    def describe(self) -> str:
        """A table of the tensors: shape, blocks, and bytes of state on this rank."""
        rows = [("parameter", "shape", "taken for", "blocks", "momentum", "bytes of state")]
        for parameter in self._parameters():
            for layout in self._layouts[parameter]:
                state = self._new_part(layout, torch.device("meta"))
                state |= of_weights(layout, parameter, self.weight_mode, torch.device("meta"))
                rows.append(
                    (
                        layout.shard.name,
                        " x ".join(map(str, layout.shard.shape)),
                        layout.blocks.why,
                        f"{layout.blocks.num_blocks:,}",
                        str(state["exp_avg"].dtype).removeprefix("torch."),
                        f"{sum(flat(v).numel() * v.element_size() for v in state.values()):,}",
                    )
                )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def _moments(self, layout: Layout) -> dict[str, torch.dtype]:
        if layout.blocks.axis == "element":
            return {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        return {"exp_avg": moment_dtype(self.momentum_dtype, layout)}

    def _new_part(self, layout: Layout, device: torch.device) -> State:
        state = super()._new_part(layout, device)
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = layout.shard.lines(layout.blocks, device)
        return state

    def _is_stochastic(self, layout: Layout) -> bool:
        is_coded = self._moments(layout)["exp_avg"] == torch.int8
        return layout.blocks.is_embedding and is_coded

    def _prepare(
        self, groups: Sequence[tuple[dict[str, Any], Sequence[Part]]], grad_factor: Tensor | None
    ) -> None:
        """Update the second moments of blocks that the step cannot sum by itself."""
        totals = self._agreed_totals()
        for group, parts in groups:
            for part in parts:
                second = part.state("exp_avg_sq")
                totals.update_second(part.layout, second, group["betas"][1], grad_factor)

    def _tensors(self, part: Part) -> Rows:
        if part.layout.blocks.axis == "element":
            for piece in part.layout.pieces:
                yield "adamw_", piece, part.tensor(piece, MOMENTS)
            return
        second = part.state("exp_avg_sq")
        for section in part.layout.sections:
            piece = section.piece
            is_whole = section.is_whole and not self._sums_apart
            rule = {
                "second": second[piece.line : piece.line + piece.rows],
                "second_from": Second.UPDATED if is_whole else Second.OF_ROW,
                "block_rows": section.block_rows if is_whole else 1,
            }
            yield "adam_mini_", piece, part.tensor(piece, ("exp_avg",), **rule)
        for columns in part.layout.columns:
            piece = columns.piece
            own = second[columns.second : columns.second + piece.cols]
            rule = {"second": own, "second_from": Second.OF_COLUMN}
            yield "adam_mini_", piece, part.tensor(piece, ("exp_avg",), **rule)

    def _options(self, group: dict[str, Any], step: int) -> StepOptions:
        return adam_options(group, step, self.maximize)
