"""What torch's wrappers make of a model: its names, and FSDP1's flat parameters.

What FSDP1 has in a flat parameter is read from private attributes, in this file only.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Of torch.compile, FSDP1 and activation checkpointing."""


def plain_name(name: str) -> str:
    """Without what wrappers add, so that a state fits the model wrapped or not."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
        name = name.removesuffix(wrapper.removesuffix("."))
    return name.removesuffix(".")


def inner_of(model: nn.Module) -> nn.Module | None:
    """What DDP or torch.compile has wrapped, if this is one of theirs."""
    name = "module" if isinstance(model, DistributedDataParallel) else "_orig_mod"
    inner: nn.Module | None = getattr(model, name, None)
    return inner


class FlatPart(NamedTuple):
    """An original parameter in a flat one.

    Attributes:
        name: In the module that FSDP wraps.
        shape: Whole.
        begin: First element in the flat parameter.
        place: The module that has it, and its name there.
        parameter: The original one, or None without ``use_orig_params``.
        is_trained: Whether it has a gradient.
        is_contiguous: Whether its elements lie in their usual order.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    place: tuple[nn.Module, str]
    parameter: nn.Parameter | None
    is_trained: bool
    is_contiguous: bool


def flat_parts(flat: Any) -> Iterator[FlatPart]:
    """The original parameters of a ``FlatParameter``, in order."""
    offsets = [0, *itertools.accumulate(flat._numels_with_padding)]
    begins = itertools.compress(offsets, (not pad for pad in flat._is_padding_mask))
    originals = flat._params if flat._params is not None else [None] * len(flat._fqns)
    for name, shape, begin, info, original, is_contiguous in zip(
        flat._fqns, flat._shapes, begins, flat._param_infos, originals, flat._contiguities,
        strict=True,
    ):  # fmt: skip
        is_trained = bool((flat if original is None else original).requires_grad)
        place = info.module, info.param_name
        yield FlatPart(
            plain_name(name), tuple(shape), begin, place, original, is_trained, is_contiguous
        )


def flat_chunk(flat: Any, world_size: int) -> int:
    """Elements that each rank has of a flat parameter, with padding."""
    return int(-(-sum(flat._numels_with_padding) // world_size))
