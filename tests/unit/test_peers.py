"""Servers that are shared by peers, against one that is alone."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from commrt.errors import ConfigError, StateError
from commrt.federated import Aggregate, Layout, Server, parse_uplink
from commrt.federated.mean import ExactMean
from commrt.federated.peers import ALONE, Peers

LAYOUT = Layout({"0.weight": (40, 50), "0.bias": (40,), "1.weight": (10, 60)})
SPECS = ("mbtc:nmse=0.3", "mbtc:bits=1.0,memory=False,joint=off", "topk:share=0.1", "fp32")
T = TypeVar("T")


class Together:
    """What peers that are threads have in common."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.given: list[Any] = [None] * size

    def swap(self, rank: int, mine: Any) -> list[Any]:
        self.given[rank] = mine
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class Thread:
    """One of them."""

    def __init__(self, together: Together, rank: int) -> None:
        self._together, self.rank, self.size = together, rank, together.size

    def broadcast(self, frames: Mapping[int, bytes] | None) -> dict[int, bytes]:
        assert (frames is None) == (self.rank > 0)
        return dict(self._together.swap(self.rank, frames)[0])

    def all_gather(self, part: bytes) -> list[bytes]:
        return self._together.swap(self.rank, part)

    def sum_(self, flat: Tensor) -> None:
        flat.copy_(torch.stack(self._together.swap(self.rank, flat.clone())).sum(0))


def at_all(size: int, act: Callable[[Peers], T]) -> list[T]:
    if size == 1:
        return [act(ALONE)]
    together = Together(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(act, (Thread(together, rank) for rank in range(size))))


def rounds(spec: str, count: int, peers: Peers) -> tuple[list[Aggregate], Server]:
    """What each round came to: 4 rounds of ``count`` clients, of which the last never arrives."""
    uplink = parse_uplink(spec)
    server = uplink.server(LAYOUT, peers=peers)
    clients = [uplink.client(LAYOUT, client) for client in range(count)]
    assert server.is_shared == (peers.size > 1)
    found, mean = list[Aggregate](), None
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        told = server.begin(index, range(count), weights={k: k + 1.0 for k in range(count)})
        assert set(told) == set(range(count))
        for client in range(count - 1):
            update = torch.randn(LAYOUT.numel, generator=generator)
            payload = clients[client].encode(index, update, told[client], mean)
            if server.home(client) == peers.rank:
                server.receive(client, payload)
        found.append(server.finish())
        mean = found[-1].mean
    return found, server


@pytest.mark.parametrize("count", [9, 80])
@pytest.mark.parametrize("spec", SPECS)
def test_any_number_of_peers(spec: str, count: int) -> None:
    """Means, bytes and figures are the same to the bit."""
    [(alone, server)] = at_all(1, lambda peers: rounds(spec, count, peers))
    for size in (2, 3):
        by_peer = at_all(size, lambda peers: rounds(spec, count, peers))
        for rank, (found, _) in enumerate(by_peer):
            for one, other in zip(alone, found, strict=True):
                assert torch.equal(one.mean, other.mean)
                assert (one.traffic, one.clients) == (other.traffic, other.clients)
                assert rank or dict(one.report) == dict(other.report)
        histories = [set(each.histories) for _, each in by_peer]
        assert sum(map(len, histories)) == len(server.histories)
        assert set.union(*histories) == set(server.histories)


def test_payloads_that_are_not_kept_are_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (kept, _) = rounds(SPECS[0], 9, ALONE)
    monkeypatch.setattr("commrt.federated.mbtc.server.MOST_KEPT_BYTES", 0)
    (again, _) = rounds(SPECS[0], 9, ALONE)
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one.mean, other.mean)
        assert dict(one.report) == dict(other.report)


def test_joint_decoding_is_not_shared() -> None:
    layout = Layout({"weight": (20000,)})
    together = Together(2)
    for spec, is_shared in (
        ("mbtc:nmse=0.3", False),
        ("mbtc:nmse=0.3,joint=off", True),
        ("mbtc:nmse=0.3,joint=off,combine=lmmse", False),
    ):
        server = parse_uplink(spec).server(layout, peers=Thread(together, 1))
        assert server.is_shared == is_shared
        assert server.home(4) == is_shared


@pytest.mark.parametrize("spec", ["mbtc:nmse=0.3", "fp32"])
def test_a_payload_for_another_peer_is_refused(spec: str) -> None:
    def send(peers: Peers) -> None:
        server = parse_uplink(spec).server(LAYOUT, peers=peers)
        server.begin(0, [1, 2, 3])
        wrong = next(client for client in (1, 2, 3) if server.home(client) != peers.rank)
        with pytest.raises(ConfigError, match=f"client {wrong} sends to peer {peers.rank}"):
            server.receive(wrong, b"")

    at_all(2, send)


def test_a_round_without_updates_fails_at_all() -> None:
    def fail(peers: Peers) -> None:
        server = parse_uplink("mbtc:nmse=0.3").server(LAYOUT, peers=peers)
        server.begin(0, [1, 2, 3])
        with pytest.raises(StateError, match="no update of 3 asked"):
            server.finish()

    at_all(2, fail)


def test_no_order_changes_a_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-12, 12, (50, 1), generator=generator)
    updates = torch.randn(50, 70000, generator=generator) * scales
    shares = torch.rand(50, generator=generator).double().numpy()
    shares /= shares.sum()
    largest = max(
        share * float(update.abs().max()) for share, update in zip(shares, updates, strict=True)
    )
    means = []
    for order in (range(50), reversed(range(50)), torch.randperm(50, generator=generator)):
        total = ExactMean(70000, largest, 50)
        for place in order:
            total.add(updates[place][None], [float(shares[place])])
        means.append(total.mean())
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])
    wanted = (updates.double() * torch.from_numpy(shares)[:, None]).sum(0)
    assert float((means[0] - wanted).abs().max()) < 2**-23 * float(wanted.abs().max())
