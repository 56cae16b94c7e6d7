"""Ranks that find each other in a store full of what their dead predecessors left."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from commrt.training.rendezvous import agree_on_name


def names(store, ranks, world_size, timeout_s=20.0):
    """What each rank calls the start, None for one that gave up."""

    def agree(rank):
        try:
            return agree_on_name(store, rank, world_size, timeout_s)
        except (TimeoutError, dist.DistStoreError):
            return None

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(agree, ranks))


@pytest.fixture
def store():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    return store


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_each_start_has_a_name_of_its_own(store, world_size):
    seen = set()
    for _ in range(5):
        [name] = set(names(store, range(world_size), world_size))
        seen.add(name)
    assert len(seen) == 5


def test_ranks_that_died_waiting_do_not_count(store):
    store.set_timeout(timedelta(seconds=0.2))
    assert names(store, [1, 2], 3) == [None, None]
    assert names(store, [0, 2], 3, timeout_s=0.2)[0] is None
    store.set_timeout(timedelta(seconds=20))
    [name] = set(names(store, [2, 1, 0], 3))
    assert name


def test_the_number_of_ranks_may_change(store):
    for world_size in (3, 1, 4, 2):
        [name] = set(names(store, range(world_size), world_size))
        assert name


def test_a_missing_rank_is_an_error(store):
    with pytest.raises(TimeoutError, match="not all of 2 ranks have come within"):
        agree_on_name(store, 0, 2, 0.1)
