"""The operators of polar codes, by the native module."""

from collections.abc import Callable

SCHEMAS = (
    "polar_transform_(Tensor(a!) bits) -> ()",
    "polar_decode(Tensor llr, Tensor known, Tensor values, Tensor(a!) bits, Tensor(b!) scratch,"
    " int paths) -> ()",
    "coset_llr(Tensor position, Tensor known, int plane, Tensor table, Tensor(a!) llr) -> ()",
    "coset_decode(Tensor position, Tensor residues, int modulus, Tensor(a!) codes) -> ()",
)
KERNELS: tuple[Callable[..., None], ...] = ()
