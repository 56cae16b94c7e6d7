"""Ranks find each other, also when a launcher starts them again and again."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_POLL_S = 0.01


def join(backend: str, timeout_s: int) -> None:
    """Makes the default process group of the ranks that a launcher started, or of this one alone.

    ``torchrun`` keeps one store over all its restarts, in which torch (2.13) finds the addresses of
    ranks that died, and waits for them. So the ranks of each start name it by themselves and keep
    to keys under that name. (A number of restarts would not do: each node counts its own.)

    Args:
        backend: Of the group.
        timeout_s: Seconds after which a rank gives up waiting for another.

    Ranks: all must call.
    """
    timeout = timedelta(seconds=timeout_s)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    shared, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    name = agree_on_name(shared, rank, world_size, timeout_s)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(name, shared),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def agree_on_name(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Returns a name that these ranks have in common and none that used the store before.

    What is in the store may be of ranks that are dead, but nothing in it can answer a nonce: each
    rank shows one, and rank 0 answers all it sees with the name until every rank has taken it.

    Raises:
        TimeoutError: On rank 0, if others have not come in time. They give up by the store's own.

    Ranks: all must call, when those that used the store before have ended.
    """
    nonce = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    if rank != 0:
        store.set(f"nonce_{rank}", nonce)
        name = store.get(f"name_for_{nonce}").decode()
        store.add(f"{name}_taken", 1)
        return name
    answered: set[str] = set()
    while store.add(f"{nonce}_taken", 0) < world_size - 1:
        for peer in range(1, world_size):
            if store.check([f"nonce_{peer}"]):
                seen = store.get(f"nonce_{peer}").decode()
                if seen not in answered:
                    store.set(f"name_for_{seen}", nonce)
                    answered.add(seen)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {world_size} ranks have come within {timeout_s} s")
        time.sleep(_POLL_S)
    return nonce
