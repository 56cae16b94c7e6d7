"""Optimizer state in other forms: what weights need, and AdamW's, from and to ours."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from commrt.errors import StateError
from commrt.ops import MomentMap, decode_moment, encode_moment
from commrt.optim.parts import State, flat
from commrt.optim.sections import Layout
from commrt.optim.shards import Span

OWED = "grad_residual"
"""What the codec of gradients that come to the host owes."""
_OF_WEIGHTS = ("master", "weight_residual")


def of_weights(
    layout: Layout, parameter: nn.Parameter, mode: str, device: torch.device
) -> dict[str, Tensor]:
    """What half-precision weights need beside themselves."""
    if parameter.dtype == torch.float32 or mode == "stochastic":
        return {}
    if mode == "residual":
        return {"weight_residual": layout.shard.elements(torch.int8, device)}
    master = layout.shard.elements(torch.float32, device)
    if device.type != "meta":
        flat(master).copy_(layout.shard.local(parameter).reshape(-1))
    return {"master": master}


def moment_names(state: Mapping[str, Any]) -> list[str]:
    """Of a tensor's state, without their scales."""
    others = {"step", OWED, *_OF_WEIGHTS}
    return [name for name in state if name not in others and not name.endswith("_scale")]


class Forms:
    """How a kind of optimizer's state is to be read.

    Args:
        maps: How moments are coded in 8 bits.
        lines: Names of what has an element a row or column, where blocks are rows or columns.
    """

    def __init__(self, maps: Mapping[str, MomentMap], lines: Collection[str] = ()) -> None:
        self._maps, self.lines = maps, lines

    def expanded(
        self, parameter: nn.Parameter, parts: Sequence[tuple[Layout, State]]
    ) -> dict[str, Tensor]:
        """The state of the tensors in a flat parameter, fp32 and an element for each of its own."""
        names = sorted(
            {name for _, state in parts for name in state if not name.endswith("_scale")}
        )
        result = {name: torch.zeros(parameter.shape, device=parameter.device) for name in names}
        for layout, state in parts:
            for name in names:
                if name in state:
                    layout.shard.local(result[name]).copy_(self._by_element(layout, state, name))
        return result

    def _by_element(self, layout: Layout, state: State, name: str) -> Tensor:
        value = flat(state[name])
        if self._is_lines(layout, name):
            return _spread(layout, value)
        if f"{name}_scale" not in state:
            return value.float()
        scale = flat(state[f"{name}_scale"])
        decoded = [
            decode_moment(codes, scales, piece.rows, piece.cols, self._maps[name])
            for piece, codes, scales in _coded(layout, value, scale)
        ]
        return torch.cat(decoded) if decoded else value.float()

    def as_adamw(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a whole parameter, fp32 and an element for each of its own."""
        names, shape = moment_names(state), state["exp_avg"].shape
        result = {name: state[name] for name in ("step", *_OF_WEIGHTS) if name in state}
        for name in names:
            value, scale = state[name], state.get(f"{name}_scale")
            if scale is not None:
                rows = scale.shape[:-1].numel()
                value = decode_moment(value, scale, rows, value.numel() // rows, self._maps[name])
                value = value.view(shape)
            result[name] = value.float().expand(shape).contiguous()
        return result

    def load(self, layout: Layout, own: State, given: Mapping[str, Any]) -> Tensor | None:
        """Load a tensor's state into ``own``, a new one.

        Args:
            layout: Of the tensor.
            own: What is to be overwritten.
            given: Like ``own``, or AdamW's; of a flat parameter always the latter.

        Returns:
            AdamW's second moments, flat, if ``own`` has fewer, else None. Those of blocks that the
            rank has not whole are then still to be found.

        Raises:
            StateError: It is neither.
        """
        is_flat = isinstance(layout.shard, Span) and given.keys() >= set(moment_names(own))
        if is_flat or self._is_adamws(layout, own, given):
            local = {name: layout.shard.local(value).reshape(-1) for name, value in given.items()}
            for name in moment_names(own):
                self._convert(layout, own, name, local[name])
            for name in _OF_WEIGHTS:
                if name in own and name in local:
                    flat(own[name]).copy_(local[name])
            return local["exp_avg_sq"] if self._is_lines(layout, "exp_avg_sq") else None
        if own.keys() != given.keys():
            raise StateError(
                f"state of {_title(layout)} has {sorted(given)}: must have {sorted(own)} and step"
            )
        for name, wanted in own.items():
            value = given[name]
            if (value.dtype, value.shape) != (wanted.dtype, wanted.shape):
                raise StateError(
                    f"{name} of {_title(layout)} is {value.dtype} {tuple(value.shape)}: must be "
                    f"{wanted.dtype} {tuple(wanted.shape)}"
                )
            flat(wanted).copy_(flat(value.contiguous()))
        return None

    def _is_adamws(self, layout: Layout, own: State, given: Mapping[str, Any]) -> bool:
        """Whether all moments have an element for each of the tensor's, and ours are other ones."""
        names = moment_names(own)
        if set(moment_names(given)) != set(names):
            return False
        shape, dtype = own["exp_avg"].shape, given["exp_avg"].dtype
        formats = {(given[name].shape, given[name].dtype) for name in names}
        if formats != {(shape, dtype)} or not dtype.is_floating_point:
            return False
        # Scales may be given all the same: torch fills in what a state has now.
        is_other = own["exp_avg"].dtype == torch.int8 or own.keys() != given.keys()
        has_lines = any(self._is_lines(layout, name) for name in names)
        return is_other or (has_lines and dtype == torch.float32)

    def _convert(self, layout: Layout, own: State, name: str, value: Tensor) -> None:
        if self._is_lines(layout, name):
            _average(layout, flat(own[name]), value)
        elif own[name].dtype != torch.int8:
            flat(own[name]).copy_(value)
        else:
            scale = flat(own[f"{name}_scale"])
            codes = flat(own[name])
            for piece, some, scales in _coded(layout, codes, scale):
                part = piece.elements_of(value)
                new = encode_moment(part.float(), piece.rows, piece.cols, self._maps[name])
                some.copy_(new[0])
                scales.copy_(new[1])

    def _is_lines(self, layout: Layout, name: str) -> bool:
        return name in self.lines and layout.blocks.axis != "element"


def _coded(layout: Layout, codes: Tensor, scales: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """The pieces of an 8-bit moment."""
    for piece in layout.pieces:
        yield piece, piece.elements_of(codes), piece.segments_of(scales)


def _spread(layout: Layout, lines: Tensor) -> Tensor:
    """Each line's value for all of its elements."""
    parts = [lines[:0]]
    if layout.blocks.axis == "row":
        for piece in layout.pieces:
            parts.append(lines[piece.line : piece.line + piece.rows].repeat_interleave(piece.cols))
    for columns in layout.columns:
        cols = columns.piece.cols
        parts.append(lines[columns.second : columns.second + cols].repeat(columns.piece.rows))
    return torch.cat(parts)


def _average(layout: Layout, lines: Tensor, value: Tensor) -> None:
    """Each line's value from the elements of its block, where the rank has all of it."""
    for section in layout.sections:
        if section.is_whole:
            piece = section.piece
            part = piece.elements_of(value).double()
            mean_B = part.view(section.num_blocks, -1).mean(dim=1)
            lines[piece.line : piece.line + piece.rows] = mean_B.repeat_interleave(
                section.block_rows
            ).float()


def _title(layout: Layout) -> str:
    name = f"{layout.shard.name!r} " if layout.shard.name else ""
    return f"parameter {name}of shape {layout.shard.shape}"
