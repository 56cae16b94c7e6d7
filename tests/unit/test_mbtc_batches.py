"""MBTC of several clients at once: the same bytes and means as one after the other."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commrt.codecs.code_tables import NUM_PHASES
from commrt.errors import ConfigError, WireFormatError
from commrt.federated import Aggregate, Layout, parse_uplink
from commrt.federated.mbtc import coding, side
from commrt.federated.mbtc.coding import Codings
from commrt.federated.mbtc.parameters import NUM_CLASSES
from commrt.federated.mbtc.side import Coefficients, Sources
from commrt.federated.wire import Reader

LAYOUT = Layout({"weight": (40, 60), "bias": (13,), "last": (700,)})
COUNT = 7


class Ends:
    """A server and its clients, all at once or one after the other."""

    def __init__(self, spec: str, *, at_once: bool) -> None:
        self.uplink, self.at_once = parse_uplink(spec), at_once
        self.server = self.uplink.server(LAYOUT)
        self.clients = [self.uplink.client(LAYOUT, client) for client in range(COUNT)]

    def round(self, index: int, updates: Tensor, previous: Tensor | None) -> list[bytes]:
        told = self.server.begin(index, range(COUNT), previous=previous)
        frames = [told[client] for client in range(COUNT)]
        if self.at_once:
            payloads = self.uplink.encode(self.clients, index, updates, frames, previous)
            self.server.receive_all(dict(enumerate(payloads)))
            return payloads
        payloads = []
        for client, update in enumerate(updates):
            payloads.append(self.clients[client].encode(index, update, frames[client], previous))
            self.server.receive(client, payloads[client])
        return payloads

    def finish(self) -> Aggregate:
        while requests := self.server.requests():
            for client, request in requests.items():
                self.server.receive(client, self.clients[client].answer(request))
        return self.server.finish()


def updates_of(index: int, *, is_wild: bool = True) -> Tensor:
    """Correlated; of wild ones one changes its scale from round to round, one has a far element."""
    generator = torch.Generator().manual_seed(index)
    common = torch.randn(LAYOUT.numel, generator=generator)
    updates = 0.95 * common + 0.3 * torch.randn(COUNT, LAYOUT.numel, generator=generator)
    if is_wild:
        updates[3] *= 1e6 ** (index % 2)
        updates[5, 17] = 1e7
    return updates


SPECS = (
    "mbtc:nmse=0.1",
    "mbtc:bits=0.5,memory=False",
    "mbtc:bits=3.0,lattice=e8,joint=off",
    "mbtc:nmse=0.01,block=256,least_gain=0.0",
)


@pytest.mark.parametrize("batch", [1, 2, 1 << 18])
@pytest.mark.parametrize("spec", SPECS)
def test_the_same_at_once(spec: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [Ends(spec, at_once=at_once) for at_once in (False, True)]
    previous, joint = None, 0.0
    monkeypatch.setattr(coding, "BATCH_ELEMENTS", batch * LAYOUT.numel)
    is_joint = "block" in spec
    for index in range(5):
        updates = updates_of(index, is_wild=not is_joint)
        one, several = (each.round(index, updates, previous) for each in ends)
        assert one == several
        first, second = (each.finish() for each in ends)
        assert torch.equal(first.mean, second.mean)
        assert first.report == second.report
        joint += first.report["joint_groups"]
        previous = first.mean
    assert (joint > 0) == is_joint
    for alone, together in zip(ends[0].clients, ends[1].clients, strict=True):
        state, other = alone.state_dict(), together.state_dict()
        assert state.keys() == other.keys()
        assert not state or torch.equal(state["decoded"], other["decoded"])


def test_clients_of_which_some_know_less() -> None:
    """One has lost its history, another never had one."""
    ends = [Ends("mbtc:nmse=0.1", at_once=at_once) for at_once in (False, True)]
    previous: Tensor | None = None
    for index in range(4):
        if index == 2:
            for each in ends:
                each.clients[1] = each.uplink.client(LAYOUT, 1)
        one, several = (each.round(index, updates_of(0), previous) for each in ends)
        assert one == several
        [previous, other] = (each.finish().mean for each in ends)
        assert torch.equal(previous, other)


def test_what_is_in_front_of_a_damaged_payload_is_taken() -> None:
    ends = Ends("mbtc:nmse=0.1", at_once=True)
    frames = ends.server.begin(0, range(COUNT))
    updates = updates_of(0)
    payloads = dict(enumerate(ends.uplink.encode(ends.clients, 0, updates, list(frames.values()))))
    whole = payloads[4]
    payloads[4] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(WireFormatError):
        ends.server.receive_all(payloads)
    with pytest.raises(WireFormatError, match="client 3 has sent its update"):
        ends.server.receive(3, payloads[3])
    ends.server.receive_all({4: whole, 5: payloads[5]})
    assert ends.server.finish().clients == (0, 1, 2, 3, 4, 5)


def test_clients_that_do_not_belong_together() -> None:
    uplink = parse_uplink("mbtc:nmse=0.1")
    other, smaller = parse_uplink("mbtc:nmse=0.2"), Layout({"a": (5,)})
    frames = uplink.server(LAYOUT).begin(0, [0, 1])
    for wrong in (
        other.client(LAYOUT, 1),
        uplink.client(smaller, 1),
        parse_uplink("fp16").client(LAYOUT, 1),
    ):
        with pytest.raises(ConfigError, match=r"must be of mbtc:nmse=0\.1"):
            uplink.encode(
                [uplink.client(LAYOUT, 0), wrong], 0, updates_of(0)[:2], list(frames.values())
            )
    with pytest.raises(ConfigError, match="1 of update: must be 2"):
        uplink.encode(
            [uplink.client(LAYOUT, k) for k in (0, 1)], 0, updates_of(0)[:1], list(frames.values())
        )
    assert uplink.encode([], 0, updates_of(0)[:0], []) == []


# -- what both ends work out ----------------------------------------------------------------------


def codings(
    layout: Layout,
    sources: Sources,
    coefficients: Coefficients,
) -> Codings:
    """Of one update."""
    tables = torch.zeros(len(layout.groups), NUM_CLASSES, dtype=torch.int16)
    return Codings(
        "z", layout, sources.previous, [sources.own],
        coefficients=coefficients, tables=[tables], steps=[1.0], seeds=[0],
    )  # fmt: skip


def test_predictions() -> None:
    layout = Layout({"first": (400,), "second": (600,)})
    generator = torch.Generator().manual_seed(0)
    previous, own = (torch.randn(1000, generator=generator) for _ in range(2))
    sources = Sources(previous, own.bfloat16())
    update = 0.5 * previous - 0.25 * own
    zeros, others = torch.zeros(1000), torch.stack([update, previous, -own, own])

    def fitted(*of: Tensor | None) -> list[Any]:
        found: list[Any] = side.fit(layout, others, of[0], of[1:]).coefficients[:, 0].tolist()
        return found

    [energy, *_] = side.fit(layout, others, *[previous, 4 * [None]]).energies
    assert energy == pytest.approx(float(update.square().mean()))
    assert fitted(previous, sources.own, None, sources.own, sources.own) == [
        [32, -16], [64, 0], [0, -64], [0, 64],
    ]  # fmt: skip
    assert fitted(previous, None, None, zeros, None)[0] == [32, 0]
    assert fitted(None, None, zeros, sources.own, None)[:3] == [[0, 0], [0, 0], [0, -64]]
    found = np.array([[[32, -16]]], np.int8)
    predicted = codings(layout, sources, found).predicted[0]
    assert float((predicted - update).square().mean()) < 1e-5


def test_coefficients_arrive() -> None:
    """Of the sources that are there."""
    previous, own = torch.ones(2, 4)
    coefficients = np.array([[32, -16], [1, -127]], np.int8)
    both, alone = Sources(previous, own), Sources(None, own)
    packed = side.pack(coefficients, both)
    assert len(packed) == 4
    assert side.unpack(Reader(packed), both, 2).tolist() == coefficients.tolist()
    assert side.pack(coefficients, alone) == bytes([256 - 16, 256 - 127])
    assert side.unpack(Reader(b"\x05"), alone, 1).tolist() == [[0, 5]]
    with pytest.raises(WireFormatError):
        side.unpack(Reader(packed[:3]), both, 2)


def test_energies_know_of_rows_and_columns() -> None:
    """A weight that was never large, in a row and a column of large ones."""
    layout = Layout({"weight": (32, 32), "bias": (32,)})
    own = torch.zeros(32, 32)
    own[3], own[:, 5], own[3, 5] = 1.0, 1.0, 0.0
    sources = Sources(None, torch.cat([own.view(-1), torch.ones(32)]))
    none = np.zeros((1, len(layout.groups), 2), np.int8)
    classes = codings(layout, sources, none).contexts[0] // NUM_PHASES
    matrix = classes[: 32 * 32].view(32, 32)
    assert matrix[3, 5] > matrix[4, 6] + 10  # of half octaves
    assert len(set(classes[-32:].tolist())) == 1
    assert int(codings(layout, Sources(None, None), none).contexts.max()) < NUM_PHASES
