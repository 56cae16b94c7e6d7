"""The blocks and weight decay of the package of Adam-mini's authors, to go on or compare with it.

It goes by words in the names of parameters, and takes all heads to be as wide as the model's width
over the number of heads. Where that fails it stops in the first step, or gives blocks across heads.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from commrt.errors import ConfigError
from commrt.optim.partition import Blocks, Shape, by_element, by_row, find_sizes, whole

# In this order: a name that has words of two lists belongs to the first.
_ELEMENTS = ("bias",)
_HEADS = ("k_proj", "q_proj", "wq", "wk", "query", "key")
_TOKENS = ("embed", "embd", "wte")
_ROWS = (
    *("lm_head", "output", "final_layer", "v_proj", "wv", "value", "feed_forward", "linear", "mlp"),
    *("o_proj", "wo", "attn.proj"),
)
_NOT_DECAYED = ("norm", "ln", "bias")
_OTHERWISE = "leave compat out, or give its blocks by partition"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfficialPartition:
    """That of adam-mini 1.1.1.

    Attributes:
        dim: Width of the model, None if not known.
        num_heads: Of the model, None if not known.
    """

    dim: int | None
    num_heads: int | None

    @classmethod
    def parse(cls, text: str, model: nn.Module | None = None) -> Self:
        """From a text.

        Args:
            text: ``v1.1.1``, where the model tells width and heads, or
                ``v1.1.1:dim=2048,num_heads=32``.
            model: That is trained, if it is known; the first of its modules that tells both.

        Raises:
            ConfigError: It is neither.
        """
        size = "([1-9][0-9]*)"
        match = re.fullmatch(rf"v1\.1\.1(?::dim={size},num_heads={size})?", text)
        if match is None:
            raise ConfigError(f"compat={text!r}: must be 'v1.1.1' or 'v1.1.1:dim=N,num_heads=N'")
        if match[1]:
            return cls(dim=int(match[1]), num_heads=int(match[2]))
        dim, num_heads = find_sizes(model) if model is not None else (None, None)
        return cls(dim=dim, num_heads=num_heads)

    def blocks(self, name: str, shape: Shape) -> Blocks:
        """Of a parameter.

        Raises:
            ConfigError: The official package would stop at this parameter, or has blocks in it that
                are not whole rows; or the sizes of heads are not known.
        """
        lowered = name.lower()
        if _has(lowered, _ELEMENTS):
            return by_element(shape, "v1.1.1: an element")
        if _has(lowered, _HEADS):
            rows = self._head_rows(name, shape)
            why = "v1.1.1: a head"
            return Blocks(shape=shape, axis="row", runs=((rows, rows),), why=why)
        is_embedding = _has(lowered, _TOKENS)
        if not is_embedding and not _has(lowered, _ROWS):
            return whole(shape, "v1.1.1: a tensor")
        if len(shape) != 2:
            raise ConfigError(
                f"compat='v1.1.1': {name} of shape {shape} has a block a row by its name, for "
                f"which adam-mini 1.1.1 needs two dimensions: {_OTHERWISE}"
            )
        return dataclasses.replace(by_row(shape, "v1.1.1: a row"), is_embedding=is_embedding)

    def _head_rows(self, name: str, shape: Shape) -> int:
        """Rows of ``shape`` that are a head's."""
        if self.dim is None or self.num_heads is None:
            sizes = {"dim": self.dim, "num_heads": self.num_heads}
            missing = [size for size, value in sizes.items() if value is None]
            raise ConfigError(
                f"compat='v1.1.1': {name} has a block a head by its name, and nothing says "
                f"{' and '.join(missing)}: must be in an attribute or the config of the model that "
                "is given, or in compat='v1.1.1:dim=N,num_heads=N'"
            )
        head, rest = divmod(self.dim**2, self.num_heads)
        cols = math.prod(shape[1:])
        if rest or not shape or head % max(1, cols) or math.prod(shape) % head:
            raise ConfigError(
                f"compat='v1.1.1': {name} of shape {shape} has a block a head by its name, which "
                f"adam-mini 1.1.1 takes to be dim * dim / num_heads = {self.dim**2} / "
                f"{self.num_heads} elements; these must be rows that divide it: {_OTHERWISE}"
            )
        return head // max(1, cols)

    def groups(
        self, group: Mapping[str, Any], names: Mapping[nn.Parameter, Sequence[str]]
    ) -> list[dict[str, Any]]:
        """A group of parameters, as one with and one without weight decay.

        Args:
            group: As torch takes it.
            names: Of the tensors in each parameter of a model; others need their own.

        Raises:
            ConfigError: A parameter has no name, or tensors of both kinds.
        """
        given = group["params"]
        decayed: list[Any] = []
        plain: list[Any] = []
        for entry in [given] if isinstance(given, Tensor) else given:
            name, parameter = entry if isinstance(entry, tuple) else ("", entry)
            is_plain = _is_plain(names.get(parameter) or [name])
            (plain if is_plain else decayed).append(entry)
        parts = [{**group, "params": decayed}, {**group, "params": plain, "weight_decay": 0.0}]
        return [part for part in parts if part["params"]] or parts[:1]


def _is_plain(names: Sequence[str]) -> bool:
    """Whether tensors of these names, all in one parameter, are not decayed."""
    if not all(names):
        raise ConfigError(
            "compat='v1.1.1' needs names: params must be a model, (name, parameter) pairs or "
            "groups of such pairs"
        )
    plain = [name for name in names if _has(name.lower(), _NOT_DECAYED)]
    if plain and len(plain) < len(names):
        raise ConfigError(
            f"compat='v1.1.1' does not decay {plain[0]}, which FSDP has flattened together with "
            "others that are decayed: it must wrap the model with use_orig_params=True"
        )
    return bool(plain)


def _has(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name for word in words)
