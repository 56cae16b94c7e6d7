"""The operators of rANS, by the native module."""

from collections.abc import Callable

SCHEMAS = (
    "rans_encode(Tensor codes, Tensor rows, Tensor starts, int lanes, Tensor(a!) words, "
    "Tensor(b!) lengths) -> ()",
    "rans_decode(Tensor words, Tensor lengths, Tensor rows, Tensor starts, int lanes, "
    "Tensor(a!) codes, Tensor(b!) used) -> ()",
)


KERNELS: tuple[Callable[..., None], ...] = ()
