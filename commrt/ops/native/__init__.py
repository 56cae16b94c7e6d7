"""Loads the native module and registers its kernels with torch.

Every op is a ``torch.ops.commrt`` operator whose default kernel is :mod:`commrt.ops.reference`; on
CPU tensors the native kernel replaces it, and on CUDA tensors where the module was built with nvcc.
The operators take plain integers and tensors, mutate their output in place, and can be traced; on a
GPU they are queued on torch's current stream of the tensor's device.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from commrt.ops import reference
from commrt.ops.native import blocks, dither, patches, polar, rans, sources, steps, updates
from commrt.ops.native.module import native, status, through_shim, why_no_cuda

__all__ = ["native", "status", "through_shim"]

_ONLY_CPU = (patches, rans, sources, updates)
_FAMILIES = (blocks, dither, patches, polar, rans, sources, steps, updates)


def _on_gpu(kernel: Callable[..., None]) -> Callable[..., None]:
    """With the tensors' device as the current one, or by the reference if it is not served."""
    fallback = getattr(reference, kernel.__name__)

    def call(first: Tensor | list[Tensor], *others: Any) -> None:
        tensor = first[0] if isinstance(first, list) else first
        serve = fallback if why_no_cuda(tensor.get_device()) else kernel
        with torch.cuda.device(tensor.device):
            serve(first, *others)

    return call


def _register() -> torch.library.Library:
    library = torch.library.Library("commrt", "DEF")
    for schema in itertools.chain.from_iterable(family.SCHEMAS for family in _FAMILIES):
        name = library.define(schema)
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"commrt::{name}", lambda *args: None, lib=library)
    if native is not None:
        for kernel in itertools.chain(*(family.CPU_KERNELS for family in _ONLY_CPU)):
            library.impl(kernel.__name__, kernel, "CPU")
        for kernel in itertools.chain.from_iterable(family.KERNELS for family in _FAMILIES):
            library.impl(kernel.__name__, kernel, "CPU")
            if native.cuda == "nvcc":
                library.impl(kernel.__name__, _on_gpu(kernel), "CUDA")
    return library


_library = _register()
