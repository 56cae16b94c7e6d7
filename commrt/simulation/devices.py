"""Where a rank trains, and whether MPI reads the memory there."""

import ctypes
import re
from typing import Any, Literal

import torch

from commrt.errors import ConfigError

CudaAware = bool | Literal["auto"]


def check_device(setting: str) -> None:
    """Refuse a device that is not here.

    Args:
        setting: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        ConfigError: It is none of these, or torch finds no such GPU.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", setting):
        raise ConfigError(f"device is {setting!r}: must be cpu, cuda or cuda:N")
    if setting == "cpu":
        return
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(f"device is {setting!r}: torch {torch.__version__} finds no GPU here")
    index = torch.device(setting).index
    if index is not None and index >= count:
        raise ConfigError(f"device is {setting!r}: must be below cuda:{count}, as many there are")


def device_of(setting: str, local_rank: int) -> torch.device:
    """A rank's device.

    Args:
        setting: As of :func:`check_device`; ``"cuda"`` is the rank's own, shared where a machine
            has more ranks than GPUs.
        local_rank: Among the ranks of its machine.
    """
    if setting == "cuda":
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device(setting)


def why_staged(communicator: Any, cuda_aware: CudaAware) -> str:
    """Why MPI must not be given GPU memory; empty if it can be.

    Args:
        communicator: Of mpi4py.
        cuda_aware: Whether MPI reads GPU memory, from who knows; ``"auto"`` asks it.

    Source: MPI 4.1, section 12.4.3, key ``mpi_memory_alloc_kinds``; where there is no such key,
    ``MPIX_Query_cuda_support``, which Open MPI and MPICH have.
    """
    if cuda_aware != "auto":
        return "" if cuda_aware else "cuda_aware is false"
    info = communicator.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds")
    info.Free()
    if kinds is not None:
        can = not {"cuda", "cuda:device"}.isdisjoint(re.split(r"[\s,]+", kinds.lower()))
        return "" if can else f"MPI's memory kinds are {kinds!r}"
    supports = _query()
    if supports is None:
        return "MPI does not say whether it is CUDA-aware"
    return "" if supports else "MPI is not CUDA-aware"


def _query() -> bool | None:
    """What the loaded MPI says of itself; None if it has no such function."""
    from mpi4py import MPI

    try:  # in this library, or in those that it is linked with
        query = ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support
    except AttributeError:
        return None
    query.argtypes, query.restype = (), ctypes.c_int
    return bool(query())
