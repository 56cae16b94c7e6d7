"""Servers that are shared by peers, against one that is alone."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor

from commrt.errors import ConfigError, StateError
from commrt.federated import Aggregate, Layout, Server, parse_uplink
from commrt.federated.mbtc.sharing import divided
from commrt.federated.mean import ExactMean
from commrt.federated.peers import ALONE, Peers

LAYOUT = Layout({"0.weight": (40, 50), "0.bias": (40,), "1.weight": (10, 60)})
SPECS = (
    "mbtc:nmse=0.3,block=256",
    "mbtc:bits=1.0,memory=False,joint=off",
    "topk:share=0.1",
    "fp32",
)
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

    def all_to_all(self, parts: Sequence[bytes]) -> list[bytes]:
        assert len(parts) == self.size
        return [each[self.rank] for each in self._together.swap(self.rank, list(parts))]

    def sum_(self, flat: Tensor) -> None:
        flat.copy_(torch.stack(self._together.swap(self.rank, flat.clone())).sum(0))


def at_all(size: int, act: Callable[[Peers], T]) -> list[T]:
    if size == 1:
        return [act(ALONE)]
    together = Together(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(act, (Thread(together, rank) for rank in range(size))))


def rounds(spec: str, count: int, peers: Peers) -> tuple[list[Aggregate], Server]:
    """What each round came to: 4 rounds of ``count`` clients, of which the second never arrives."""
    uplink = parse_uplink(spec)
    server = uplink.server(LAYOUT, peers=peers)
    numbers = [*range(count - 1), 2**63 - 1]
    clients = [uplink.client(LAYOUT, number) for number in numbers]
    assert server.is_shared == (peers.size > 1)
    found, mean = list[Aggregate](), None
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        weights = {number: place + 1.0 for place, number in enumerate(numbers)}
        told = server.begin(index, numbers, weights=weights)
        assert set(told) == set(numbers)
        for place, number in enumerate(numbers):
            if place == 1:
                continue
            update = torch.randn(LAYOUT.numel, generator=generator)
            payload = clients[place].encode(index, update, told[number], mean)
            if server.home(number) == peers.rank:
                server.receive(number, payload)
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


@pytest.mark.parametrize(
    ("spec", "module"), [(SPECS[0], "mbtc.server"), ("correlated:levels=4", "independent")]
)
def test_payloads_that_are_not_kept_are_decoded_again(
    spec: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept, _) = rounds(spec, 9, ALONE)
    monkeypatch.setattr(f"commrt.federated.{module}.MOST_KEPT_BYTES", 3 * 4 * LAYOUT.numel)
    (again, _) = rounds(spec, 9, ALONE)
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one.mean, other.mean)
        assert dict(one.report) == dict(other.report)


# -- joint decoding -------------------------------------------------------------------------------

BLOCK = 256
# Three groups of 5, 4 and 2 blocks, and what does not fill one.
JOINT = Layout({"0": (5 * BLOCK + 77,), "1": (300,), "2": (3 * BLOCK,), "3": (2 * BLOCK + 40,)})
JOINTLY = f"mbtc:nmse=0.02,block={BLOCK},least_gain=0"
ROUNDS = 3
# The number of the first client. It has less in common with the others than it had, so that its
# blocks fail.
ODD = 2**63 - 100


class Seen(NamedTuple):
    """What a peer saw of all rounds: payloads and answers of its clients, requests to all."""

    payloads: list[bytes]
    requests: list[dict[int, bytes]]
    aggregates: list[Aggregate]
    server: Server


class Cohort:
    """Clients that have much in common, of which a peer simulates those that it is home to."""

    def __init__(self, spec: str, count: int, peers: Peers) -> None:
        uplink = parse_uplink(spec)
        self.count, self.server = count, uplink.server(JOINT, peers=peers)
        self.clients = {
            client: uplink.client(JOINT, client)
            for client in range(ODD, ODD + count)
            if self.server.home(client) == peers.rank
        }
        self.seen = Seen([], [], [], self.server)
        self.mean: Tensor | None = None

    def send(self, index: int, told: Mapping[int, bytes], who: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(index)
        draws = torch.randn(self.count + 1, JOINT.numel, generator=generator)
        for client in who:
            if client in self.clients:
                own = 0.1 if client != ODD or index == 0 else 0.3
                update = math.sqrt(1 - own**2) * draws[-1] + own * draws[client - ODD]
                payload = self.clients[client].encode(index, update, told[client], self.mean)
                self.take(client, payload)

    def ask(self, silent: Sequence[int] = ()) -> bool:
        requests = self.server.requests()
        self.seen.requests.append(requests)
        for client in requests.keys() & self.clients.keys() - set(silent):
            self.take(client, self.clients[client].answer(requests[client]))
        return bool(requests)

    def take(self, client: int, payload: bytes) -> None:
        self.seen.payloads.append(payload)
        self.server.receive(client, payload)

    def round(self, index: int, asks: int) -> None:
        """The last one sends behind the first request, the odd one never answers in round 2."""
        cohort = range(ODD, ODD + self.count)
        told = self.server.begin(index, cohort)
        self.send(index, told, cohort[:-1])
        silent = (ODD,) if index == 2 else ()
        if asks:
            self.ask(silent)
        self.send(index, told, cohort[-1:])
        for _ in range(asks):
            if not self.ask(silent):
                break
        self.seen.aggregates.append(self.server.finish())
        self.mean = self.seen.aggregates[-1].mean


def joint_rounds(spec: str, count: int, asks: int, peers: Peers) -> Seen:
    cohort = Cohort(spec, count, peers)
    for index in range(ROUNDS):
        cohort.round(index, asks)
    return cohort.seen


def plain(state: Any) -> Any:
    """To compare."""
    if isinstance(state, Mapping):
        return {key: plain(each) for key, each in state.items()}
    if isinstance(state, list | tuple):
        return [plain(each) for each in state]
    return state.tolist() if isinstance(state, Tensor) else state


def assert_same(alone: Seen, shared: Sequence[Seen]) -> None:
    """To the bit: what goes to clients and comes from them, means, figures, and states."""
    assert sorted(alone.payloads) == sorted(each for seen in shared for each in seen.payloads)
    histories = dict[int, Any]()
    for rank, seen in enumerate(shared):
        assert seen.requests == alone.requests
        for one, other in zip(alone.aggregates, seen.aggregates, strict=True):
            assert torch.equal(one.mean, other.mean)
            assert (one.traffic, one.clients) == (other.traffic, other.clients)
            assert rank or dict(one.report) == dict(other.report)
        histories |= seen.server.histories
    assert plain(histories) == plain(dict(alone.server.histories))
    one, other = (
        each.state_dict(with_histories=False) for each in (alone.server, shared[0].server)
    )
    assert plain(one) == plain(other)


@pytest.mark.parametrize(
    ("more", "asks"),
    [("", 8), ("", 0), (",joint=modulo", 2), (",joint=modulo,combine=lmmse", 2)],
)
def test_blocks_are_decoded_jointly_by_any_number_of_peers(more: str, asks: int) -> None:
    """Also where they fail, with and without requests."""
    [alone] = at_all(1, lambda peers: joint_rounds(JOINTLY + more, 7, asks, peers))
    reports = [each.report for each in alone.aggregates]
    assert [each["joint_groups"] for each in reports] == [0.0, 3.0, 3.0]
    assert sum(each["missing_blocks"] for each in reports) > 0
    assert any(alone.requests) == (asks > 0)
    assert any(each.get("alignment", 1.0) < 1.0 for each in reports) == ("lmmse" in more)
    records = alone.server.state_dict()["cosets"]["records"]
    assert any(each["margin"] > 0 for each in records)  # since blocks failed
    for size in (2, 3, 4):
        shared = at_all(size, lambda peers: joint_rounds(JOINTLY + more, 7, asks, peers))
        assert_same(alone, shared)


@pytest.mark.parametrize(("count", "size"), [(3, 4), (5, 13)])
def test_peers_without_clients_or_blocks(count: int, size: int) -> None:
    """There are 11 blocks."""
    [alone] = at_all(1, lambda peers: joint_rounds(JOINTLY, count, 3, peers))
    assert alone.aggregates[-1].report["joint_groups"] > 0
    assert_same(alone, at_all(size, lambda peers: joint_rounds(JOINTLY, count, 3, peers)))


def test_each_peer_has_some_of_the_blocks() -> None:
    assert divided({0: 5, 3: 4, 4: 2}, 3) == [
        {0: range(3)},
        {0: range(3, 5), 3: range(2)},
        {3: range(2, 4), 4: range(2)},
    ]
    for size in range(1, 15):
        parts = divided({0: 5, 3: 4, 4: 2}, size)
        assert len(parts) == size
        assert [part for each in parts for part in each.values() if not part] == []
        for group, count in ((0, 5), (3, 4), (4, 2)):
            assert [b for part in parts for b in part.get(group, ())] == list(range(count))
        sizes = [sum(map(len, part.values())) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_a_cohort_too_large_to_estimate_is_refused_at_all() -> None:
    def begin(peers: Peers) -> None:
        server = parse_uplink("mbtc:nmse=0.3,combine=lmmse").server(LAYOUT, peers=peers)
        with pytest.raises(ConfigError, match="must be 64 at most"):
            server.begin(0, range(65))

    at_all(2, begin)


# -- faults and means -----------------------------------------------------------------------------


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
