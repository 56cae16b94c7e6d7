"""The operators on patches, by the native module."""

from collections.abc import Callable

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.native.module import native, where
from commrt.ops.patches import damaged

SCHEMAS = (
    "patch_encode(Tensor new, Tensor old, Tensor(a!) payload) -> ()",
    "patch_apply_(Tensor(a!) weights, Tensor payload) -> ()",
)


def patch_encode(new: Tensor, old: Tensor, payload: Tensor) -> None:
    """See :func:`commrt.ops.patch_encode`."""
    native.patch_encode(
        new.data_ptr(),
        old.data_ptr(),
        new.element_size(),
        new.numel(),
        payload.data_ptr(),
        native.Threads(torch.get_num_threads()),
    )


def patch_apply_(weights: Tensor, payload: Tensor) -> None:
    """See :func:`commrt.ops.patch_apply_`."""
    if payload.data_ptr() % 4:
        raise ConfigError(f"payload is at address {payload.data_ptr()}: must be a multiple of 4")
    is_whole = native.patch_apply(
        weights.data_ptr(),
        weights.element_size(),
        weights.numel(),
        payload.data_ptr(),
        payload.numel(),
        where(weights),
    )
    if not is_whole:
        raise damaged(weights.numel())


KERNELS: tuple[Callable[..., None], ...] = (patch_apply_,)
CPU_KERNELS: tuple[Callable[..., None], ...] = (patch_encode,)
