"""Ranks that simulate clients together: what goes between them, over MPI or nowhere.

Everything is bytes of a known size; a payload travels as it is.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commrt.errors import ConfigError
from commrt.simulation.devices import CudaAware, why_staged

# MPI counts with 32 bits where it is old.
_PIECE = 1 << 30
Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]
_STARTERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class Ranks:
    """All ranks of a run; the first one has the server.

    Args:
        communicator: Of mpi4py; None for one rank.
        local_rank: Among the ranks of this machine.
    """

    def __init__(self, communicator: Any = None, local_rank: int = 0) -> None:
        self._comm = communicator
        self.local_rank = local_rank
        self._is_staged = True
        self.rank: int = 0 if communicator is None else communicator.Get_rank()
        self.size: int = 1 if communicator is None else communicator.Get_size()

    @property
    def is_root(self) -> bool:
        """Whether this one has the server."""
        return self.rank == 0

    def own(self, clients: Iterable[int]) -> list[int]:
        """Those of the clients that this rank simulates, in the same order."""
        return [client for client in clients if self.owner(client) == self.rank]

    def owner(self, client: int) -> int:
        """The rank that simulates a client."""
        return client % self.size

    def broadcast(self, frames: Mapping[int, bytes] | None) -> dict[int, bytes]:
        """What the root has for clients, on every rank; None elsewhere."""
        if self._comm is None:
            return dict(frames or {})
        count = np.array([len(frames or {})])
        self._comm.Bcast(count)
        sizes = np.zeros((int(count[0]), 2), dtype=np.int64)
        if frames:
            sizes[:] = [(client, len(frame)) for client, frame in frames.items()]
        self._comm.Bcast(sizes)
        data = np.zeros(int(sizes[:, 1].sum()), dtype=np.uint8)
        if frames:
            data[:] = np.frombuffer(b"".join(frames.values()), dtype=np.uint8)
        self._broadcast(data)
        return _cut(sizes, data)

    def use_gpus(self, cuda_aware: CudaAware) -> None:
        """Find out whether MPI reads GPU memory; until then it is given none.

        Args:
            cuda_aware: What is known of it; ``"auto"`` asks MPI.

        Warns:
            UserWarning: It does not, so that tensors of a GPU go through host memory; at the root.
        """
        if self._comm is None:
            return
        why = why_staged(self._comm, cuda_aware)
        self._is_staged = bool(why)
        if why and self.is_root:
            warnings.warn(
                f"{why}: models go between GPUs through host memory; run.cuda_aware=true if that "
                "is wrong",
                stacklevel=2,
            )

    def broadcast_(self, flat: Tensor) -> None:
        """Overwrite a contiguous tensor with the root's.

        One of a GPU, which a cupy array becomes by ``torch.as_tensor``, goes to MPI as it is where
        MPI reads GPU memory, see :meth:`use_gpus`.

        Stream: the current one, which the host waits for.
        """
        if self._comm is None:
            return
        data = flat.view(-1).view(torch.uint8)
        if flat.device.type == "cpu":
            self._broadcast(data.numpy())
        elif self._is_staged:
            host = data.cpu()
            self._broadcast(host.numpy())
            data.copy_(host)
        else:
            torch.cuda.current_stream(flat.device).synchronize()  # MPI knows of no streams
            self._broadcast(data)

    def deliver(
        self, frames: Mapping[int, bytes], home: Callable[[int], int]
    ) -> tuple[dict[int, bytes], dict[int, int]]:
        """Send what this rank has from clients to where it is used.

        Args:
            frames: By client.
            home: The rank that a client's goes to.

        Returns:
            What came here, and the size of each client's.
        """
        if self._comm is None:
            return dict(frames), {client: len(frame) for client, frame in frames.items()}
        own = np.array([(c, len(frame)) for c, frame in frames.items()], dtype=np.int64)
        counts = self._counts(len(frames))
        sizes: Integers = np.zeros((int(counts.sum()), 2), dtype=np.int64)
        self._comm.Allgatherv(own, (sizes, 2 * counts))
        homes = np.array([home(int(client)) for client in sizes[:, 0]], dtype=np.int64)
        senders = np.repeat(np.arange(self.size), counts)
        parts = [
            b"".join(frame for client, frame in frames.items() if home(client) == rank)
            for rank in range(self.size)
        ]
        here = homes == self.rank
        totals = [int(sizes[here & (senders == rank), 1].sum()) for rank in range(self.size)]
        found = _cut(sizes[here], self._all_to_all(parts, totals))
        return found, {int(client): int(size) for client, size in sizes}

    def all_gather(self, part: bytes) -> list[bytes]:
        """What every rank gives, by rank."""
        if self._comm is None:
            return [part]
        return self._swapped(self._counts(len(part)), [part] * self.size)

    def all_to_all(self, parts: Sequence[bytes]) -> list[bytes]:
        """Give every rank a part; what every rank has for this one, by rank."""
        if self._comm is None:
            return list(parts)
        totals = np.zeros(self.size, dtype=np.int64)
        self._comm.Alltoall(np.array([len(part) for part in parts]), totals)
        return self._swapped(totals, parts)

    def sum_(self, flat: Tensor) -> None:
        """Replace a contiguous tensor of the CPU by its sum over all ranks."""
        if self._comm is not None:
            from mpi4py import MPI

            for piece in flat.view(-1).split(_PIECE // flat.element_size()):
                self._comm.Allreduce(MPI.IN_PLACE, piece.numpy())

    def abort(self) -> None:
        """End all ranks, since this one cannot go on."""
        if self.size > 1:
            self._comm.Abort(1)

    def _counts(self, own: int) -> Integers:
        counts = np.zeros(self.size, dtype=np.int64)
        self._comm.Allgather(np.array([own]), counts)
        return counts

    def _swapped(self, totals: Integers, parts: Sequence[bytes]) -> list[bytes]:
        """Send a part to each rank; what came, of so many bytes from each."""
        joined = self._all_to_all(parts, totals.tolist())
        ends = np.cumsum(totals)
        return [joined[end - size : end].tobytes() for size, end in zip(totals, ends, strict=True)]

    def _broadcast(self, data: Bytes | Tensor) -> None:
        for begin in range(0, len(data), _PIECE):
            self._comm.Bcast(data[begin : begin + _PIECE])

    def _all_to_all(self, parts: Sequence[bytes], totals: Sequence[int]) -> Bytes:
        """Send a part to each rank; what came, by rank, of so many bytes from each."""
        sizes = [len(part) for part in parts]
        data = np.frombuffer(b"".join(filter(None, parts)), dtype=np.uint8)  # of one, no copy
        found = np.zeros(sum(totals), dtype=np.uint8)
        if self._is_large(sum(sizes) + sum(totals)):
            self._all_to_all_large(np.split(data, np.cumsum(sizes)[:-1]), found, totals)
        else:
            self._comm.Alltoallv((data, sizes), (found, totals))
        return found

    def _is_large(self, num_bytes: int) -> bool:
        """Whether any rank has more than MPI can count."""
        return bool(self._counts(num_bytes).max() >= _PIECE)

    def _all_to_all_large(self, parts: list[Bytes], found: Bytes, totals: Sequence[int]) -> None:
        """Piece by piece, from and to each rank."""
        places = np.split(found, np.cumsum(totals)[:-1])
        waiting = [
            self._comm.Irecv(place[begin : begin + _PIECE], source=rank)
            for rank, place in enumerate(places)
            for begin in range(0, len(place), _PIECE)
        ]
        waiting += [
            self._comm.Isend(part[begin : begin + _PIECE], dest=rank)
            for rank, part in enumerate(parts)
            for begin in range(0, len(part), _PIECE)
        ]
        for each in waiting:
            each.Wait()


def all_ranks() -> Ranks:
    """Those that mpiexec started, or this process alone.

    Raises:
        ConfigError: mpiexec started several, and mpi4py is not installed.
    """
    if not any(name in os.environ for name in _STARTERS):
        return Ranks()
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            "mpiexec started this, and mpi4py is not installed: pip install 'commrt[mpi]'"
        ) from error
    neighbours = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank = neighbours.Get_rank()
    neighbours.Free()
    return Ranks(MPI.COMM_WORLD, local_rank)


def _cut(sizes: Integers, data: Bytes) -> dict[int, bytes]:
    ends = np.cumsum(sizes[:, 1])
    return {
        int(client): data[end - size : end].tobytes()
        for (client, size), end in zip(sizes, ends, strict=True)
    }
