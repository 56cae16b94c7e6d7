"""The native module: whether there is one, and where it works on which tensor."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from commrt.errors import ConfigError

MIN_CAPABILITY = (8, 0)
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load() -> tuple[Any, str]:
    """The native module, or None and the reason."""
    if os.environ.get("COMMRT_NATIVE", "1") == "0":
        return None, "COMMRT_NATIVE=0"
    try:
        from commrt import _C
    except ImportError as error:
        return None, f"commrt._C could not be imported ({error})"
    isa = os.environ.get("COMMRT_ISA")
    if isa and not _C.select_isa(isa):
        allowed = ", ".join(_C.available_isas())
        raise ConfigError(f"COMMRT_ISA={isa!r}: this machine and build have {allowed}")
    return _C, ""


native, missing_reason = _load()
if native is None:
    warnings.warn(
        f"commrt runs on its slow torch reference ops: {missing_reason}. "
        "Install a C++ compiler and reinstall commrt to get the native ones.",
        stacklevel=2,
    )


def status(device: torch.device | str = "cpu") -> str:
    """Which kernels serve tensors there, for reports: ``"native avx512"``, or why none do."""
    device = torch.device(device)
    if native is None:
        return f"reference ({missing_reason})"
    if device.type != "cuda":
        return f"native {native.active_isa()}"
    reason = why_no_cuda(device.index or 0)
    return f"reference ({reason})" if reason else "native cuda"


@functools.cache
def why_no_cuda(index: int) -> str:
    """Why the CUDA kernels cannot serve this GPU; empty if they can.

    Asked at the first use of a GPU, not before: the driver does not survive a fork.
    """
    if native is None or native.cuda != "nvcc":
        return "built without CUDA: install with COMMRT_CUDA=ON"
    if native.cuda_device_count() <= index:
        return "the driver is older than the CUDA that the kernels were built with"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability}: must be at least {MIN_CAPABILITY}"
    return ""


_is_through_shim = False


@contextlib.contextmanager
def through_shim() -> Iterator[None]:
    """Serve CPU tensors by the CUDA kernels, in a module built with ``COMMRT_CUDA=SHIM``.

    Raises:
        ConfigError: The module is another one.
    """
    global _is_through_shim
    if native is None or native.cuda != "shim":
        built = missing_reason if native is None else f"COMMRT_CUDA={native.cuda}"
        raise ConfigError(f"the native module has {built}: must be built with COMMRT_CUDA=SHIM")
    _is_through_shim = True
    try:
        yield
    finally:
        _is_through_shim = False


def threads() -> object:
    """Where an op runs that has kernels for the CPU only."""
    return native.Threads(torch.get_num_threads())


def where(tensor: Tensor) -> object:
    """The first of a kernel's tensors says where it runs."""
    if tensor.is_cuda:
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        return native.Queue(stream)
    return native.Queue(0) if _is_through_shim else threads()
