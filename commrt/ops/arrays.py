"""Arrays of other libraries as tensors that share their memory."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from commrt.errors import ConfigError

Op = Callable[..., None]
# Looked for first, since to ask others what they are takes longer.
_NO_ARRAYS = frozenset((Tensor, int, float, str, list, tuple, type(None)))


def takes_arrays(*written: str) -> Callable[[Op], Op]:
    """An op whose tensors may be arrays of any library that speaks DLPack, such as numpy or cupy.

    Args:
        *written: The arguments that the op writes to.

    Raises:
        ConfigError: Memory cannot be shared: of a dtype that torch lacks, or not to be written to.
    """

    def decorate(op: Op) -> Op:
        signature = inspect.signature(op)

        @functools.wraps(op)
        def call(*args: Any, **options: Any) -> None:
            values = (*args, *options.values())
            if _NO_ARRAYS.issuperset(map(type, values)) or not any(map(_is_array, values)):
                return op(*args, **options)
            bound = signature.bind(*args, **options)
            for name, value in bound.arguments.items():
                if _is_array(value):
                    bound.arguments[name] = _shared(name, value, name in written)
            return op(*bound.args, **bound.kwargs)

        return call

    return decorate


def _is_array(value: Any) -> bool:
    return not isinstance(value, Tensor) and hasattr(value, "__dlpack__")


def _shared(name: str, array: Any, is_written: bool) -> Tensor:
    flags = getattr(array, "flags", None)
    if is_written and not getattr(flags, "writeable", True):
        raise ConfigError(f"{name} is a read-only {type(array).__name__}: is written to")
    try:
        return torch.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{name} is a {type(array).__name__} whose memory cannot be shared: {error}"
        ) from error
