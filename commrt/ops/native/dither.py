"""The operators of the dither, by the native module."""

from collections.abc import Callable

SCHEMAS = (
    "dither_quantise(Tensor values, Tensor? predicted, Tensor(a!) codes, float step, int seed, "
    "int first_index, str lattice) -> ()",
    "dither_dequantise(Tensor codes, Tensor? predicted, Tensor(a!) values, float step, int seed, "
    "int first_index, str lattice) -> ()",
    "scale_rows(Tensor(a!) rows, Tensor? own, Tensor? shared, float shared_weight, "
    "Tensor rows_of_class, int base, int seed, int first_index, str lattice) -> ()",
    "lmmse_combine(Tensor stack, Tensor weights, Tensor(a!) out) -> ()",
)

KERNELS: tuple[Callable[..., None], ...] = ()
