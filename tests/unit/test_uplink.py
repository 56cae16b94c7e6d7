"""What every uplink promises: bytes in between, the mean at the end, and nothing lost silently."""

import math
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from commrt.errors import ConfigError, StateError, WireFormatError
from commrt.federated import Layout, Uplink, parse_uplink, wire
from commrt.federated.independent import MOST_CLIENTS
from commrt.federated.wire import Kind, Reader, seal, unseal, varint
from tests.unit.uplinks import CLIENTS, LAYOUT, SPECS, Training, mutations


@pytest.fixture(params=SPECS)
def uplink(request: pytest.FixtureRequest) -> Uplink:
    return parse_uplink(request.param)


def test_the_mean_arrives(uplink: Uplink) -> None:
    training = Training(uplink)
    for _ in range(3):
        true = torch.stack(list(training.updates().values())).mean(dim=0)
        aggregate = training.round()
        assert torch.cosine_similarity(aggregate.mean, true, dim=0) > 0.6
        assert aggregate.clients == CLIENTS
        assert aggregate.mean.isfinite().all()


def test_all_bytes_are_counted(uplink: Uplink) -> None:
    training = Training(uplink)
    payloads = training.payloads(training.updates())
    aggregate = training.end(payloads)
    sizes = sum(map(len, payloads.values()))
    assert aggregate.traffic.uplink_bytes == sizes
    assert aggregate.traffic.answer_bytes == 0
    assert aggregate.traffic.downlink_bytes > 0
    assert aggregate.bits == 8 * sizes / (LAYOUT.numel * len(CLIENTS))


def test_the_same_again(uplink: Uplink) -> None:
    one, two = Training(uplink), Training(uplink)
    for _ in range(3):
        payloads = one.payloads(one.updates())
        assert payloads == two.payloads(two.updates())
        reverse = dict(reversed(payloads.items()))
        assert torch.equal(one.end(payloads).mean, two.end(reverse).mean)


def test_a_run_goes_on_from_its_state(uplink: Uplink) -> None:
    one = Training(uplink)
    for _ in range(2):
        one.round()
    two = Training(uplink)
    two.server.load_state_dict(one.server.state_dict())
    for client in CLIENTS:
        two.clients[client].load_state_dict(one.clients[client].state_dict())
    two.previous, two.index = one.previous, one.index
    for _ in range(2):
        payloads = one.payloads(one.updates())
        assert payloads == two.payloads(two.updates())
        assert torch.equal(one.end(payloads).mean, two.end(payloads).mean)


WITH_MEMORY = ("topk:share=0.1,values=fp32", "loco4", "loco1")


@pytest.mark.parametrize("spec", WITH_MEMORY)
def test_a_round_encoded_again_replaces_what_was_encoded(spec: str) -> None:
    """Also by a client that was restarted between the two."""
    once, again = Training(parse_uplink(spec)), Training(parse_uplink(spec))
    for _ in range(3):
        updates = once.updates()
        payloads = once.payloads(updates)
        again.payloads({client: 3 * update for client, update in updates.items()})
        state = again.clients[7].state_dict()
        again.clients[7] = again.uplink.client(LAYOUT, 7, seed=5)
        again.clients[7].load_state_dict(state)
        assert again.payloads(updates) == payloads
        assert torch.equal(once.end(payloads).mean, again.end(payloads).mean)


def test_an_update_encoded_again_is_the_same_payload(uplink: Uplink) -> None:
    training = Training(uplink)
    for index in range(3):
        updates = training.updates()
        told = training.server.begin(index, CLIENTS)
        payloads = training.encoded(updates, told)
        assert training.encoded(updates, told) == payloads
        training.end(payloads)


def test_who_comes_before_one_that_is_refused_is_taken(uplink: Uplink) -> None:
    training = Training(uplink)
    payloads = training.payloads(training.updates())
    training.server.receive(3, payloads[3])
    again = {client: payloads[client] for client in (7, 3, 11)}
    with pytest.raises(WireFormatError, match="has sent its update of this round before"):
        training.server.receive_all(again)
    with pytest.raises(ConfigError, match="client 5 is not in the cohort"):
        training.server.receive_all({11: payloads[11], 5: payloads[7]})
    assert training.server.finish().clients == (3, 7, 11)


def test_a_retry_loses_nothing_and_sends_nothing_twice() -> None:
    """What arrived and what the residual holds are the update, whichever payload it was."""
    training = Training(parse_uplink("topk:share=0.1,values=fp32"), clients=[3])
    update = training.updates()
    first, second = training.payloads(update), training.payloads(update)
    assert first == second
    mean = training.end(second).mean
    assert torch.equal(mean + training.clients[3].state_dict()["residual"], update[3])


@pytest.mark.parametrize("spec", WITH_MEMORY)
def test_a_state_stays_what_it_was(spec: str) -> None:
    training = Training(parse_uplink(spec))
    training.round()
    client = training.clients[3]
    state = client.state_dict()
    kept = {name: torch.as_tensor(value).clone() for name, value in state.items()}
    client.load_state_dict(state)
    training.round()
    training.round()
    assert all(torch.equal(torch.as_tensor(state[name]), kept[name]) for name in kept)


@pytest.mark.parametrize("spec", WITH_MEMORY)
def test_a_state_that_does_not_fit_changes_nothing(spec: str) -> None:
    training = Training(parse_uplink(spec))
    training.round()
    client = training.clients[3]
    state = client.state_dict()
    residual = state["residual"]
    broken = residual.clone()
    broken[-2:] = 255 if residual.dtype == torch.uint8 else math.nan
    for wrong in (
        {**state, "residual": residual[:1]},
        {**state, "residual": torch.cat([residual, residual[:1]])},
        {**state, "before": residual.double()},
        {**state, "residual": broken},
        {**state, "before": None},
        {**state, "round": "3"},
        {"residual": residual},
        {},
    ):
        with pytest.raises(StateError):
            client.load_state_dict(wrong)
    left = client.state_dict()
    assert torch.equal(left.pop("residual"), residual)
    assert torch.equal(left["before"], state["before"])


def test_who_does_not_come_is_left_out(uplink: Uplink) -> None:
    training = Training(uplink)
    training.round()
    for absent in (7, CLIENTS[-1]):
        updates = training.updates()
        payloads = training.payloads(updates)
        del payloads[absent], updates[absent]
        aggregate = training.end(payloads)
        true = torch.stack(list(updates.values())).mean(dim=0)
        assert absent not in aggregate.clients
        assert torch.cosine_similarity(aggregate.mean, true, dim=0) > 0.6


def test_weights_are_of_those_that_came() -> None:
    training = Training(parse_uplink("fp32"))
    updates = training.updates()
    weights = {3: 1.0, 7: 2.0, 11: 5.0, CLIENTS[-1]: 4.0}
    told = training.server.begin(0, CLIENTS, weights=weights)
    for client in (3, 7, 11):
        payload = training.clients[client].encode(0, updates[client], told[client])
        training.server.receive(client, payload)
    expected = (updates[3] + 2 * updates[7] + 5 * updates[11]) / 8
    torch.testing.assert_close(training.server.finish().mean, expected)


def test_nobody_comes(uplink: Uplink) -> None:
    server = uplink.server(LAYOUT)
    with pytest.raises(StateError, match="no round is running"):
        server.finish()
    server.begin(0, CLIENTS)
    with pytest.raises(StateError, match="round 0 ends with no update of 4 asked"):
        server.finish()
    with pytest.raises(StateError, match="no round is running"):
        server.finish()
    assert isinstance(server.state_dict(), dict)


def test_damage_is_refused_and_another_may_come(uplink: Uplink) -> None:
    training = Training(uplink)
    payloads = training.payloads(training.updates())
    for damaged in mutations(payloads[7]):
        with pytest.raises(WireFormatError):
            training.server.receive(7, damaged)
    with pytest.raises(WireFormatError):
        training.server.receive(11, payloads[7])
    with pytest.raises(ConfigError, match="client 4 is not in the cohort"):
        training.server.receive(4, payloads[7])
    training.server.receive(7, payloads[7])
    with pytest.raises(WireFormatError, match="has sent its update of this round before"):
        training.server.receive(7, payloads.pop(7))
    assert training.end(payloads).clients == CLIENTS


def test_what_was_never_sent(uplink: Uplink, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames whose check is right, made by somebody who knows how."""
    monkeypatch.setattr(wire, "zlib", SimpleNamespace(crc32=lambda *_: 0))
    training = Training(uplink)
    training.round()
    payload = training.payloads(training.updates())[3]
    random = Random(0)
    refused = 0
    for _ in range(200):
        body = bytearray(payload[2:-4])
        for _ in range(random.randrange(1, 4)):
            body[random.randrange(len(body))] ^= 1 << random.randrange(8)
        if random.random() < 0.3:
            del body[random.randrange(len(body)) :]
        frame = seal(Kind.UPDATE, training.index, bytes(body), b"")
        try:
            training.server.receive(3, frame)
        except WireFormatError:
            refused += 1
            continue
        assert training.server.finish().mean.isfinite().all()
        training.server.begin(training.index, CLIENTS)
    assert uplink.spec.startswith("fp") or refused


def test_clients_refuse_what_the_server_did_not_say(uplink: Uplink) -> None:
    training = Training(uplink)
    told = training.server.begin(0, CLIENTS)
    update, client = training.updates()[3], training.clients[3]
    for damaged in (*mutations(told[3]), told[7]):
        with pytest.raises(WireFormatError):
            client.encode(0, update, damaged)
    with pytest.raises(WireFormatError, match="a frame of round 0, mod 256: is round 1"):
        client.encode(1, update, told[3])


def test_cohorts_of_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of a cohort that a server would not begin a round with, and that one."""
    monkeypatch.setattr(wire, "zlib", SimpleNamespace(crc32=lambda *_: 0))
    uplink = parse_uplink("correlated:levels=2")
    client, update = uplink.client(LAYOUT, 3), torch.ones(LAYOUT.numel)
    for count in (MOST_CLIENTS + 1, 1 << 32):
        frame = seal(Kind.PARAMETERS, 0, varint(0) + varint(count), b"")
        with pytest.raises(WireFormatError, match=f"where {MOST_CLIENTS} is the most"):
            client.encode(0, update, frame)
    with pytest.raises(ConfigError, match=f"must be of {MOST_CLIENTS} at most"):
        uplink.server(LAYOUT).begin(0, range(MOST_CLIENTS + 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_updates_must_be_finite(uplink: Uplink, value: float) -> None:
    training = Training(uplink)
    told = training.server.begin(0, CLIENTS)
    update = training.updates()[3]
    update[17] = value
    with pytest.raises(ConfigError, match="update has 1 elements that are not finite"):
        training.clients[3].encode(0, update, told[3])
    with pytest.raises(ConfigError, match=r"update has shape \(5,\)"):
        training.clients[3].encode(0, torch.ones(5), told[3])


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "fp16"])
def test_any_scale(spec: str, scale: float) -> None:
    training = Training(parse_uplink(spec))
    for _ in range(2):
        updates = {client: scale * each for client, each in training.updates().items()}
        mean = training.end(training.payloads(updates)).mean
        if scale == 0:
            assert mean.abs().max() < 1e-15
        else:
            true = torch.stack(list(updates.values())).mean(dim=0)
            assert torch.cosine_similarity(mean / scale, true / scale, dim=0) > 0.5


def test_clients_numbered_by_numpy(uplink: Uplink) -> None:
    one, two = np.int64(3), np.int64(5)
    server = uplink.server(Layout({"weight": (np.int64(40),)}))
    client = uplink.client(Layout({"weight": (40,)}), one)
    told = server.begin(np.int64(0), np.array([one, two]))
    server.receive(one, client.encode(0, torch.ones(40), told[3]))
    assert server.finish().clients == (3,)


def test_cohorts() -> None:
    server = parse_uplink("fp32").server(LAYOUT)
    with pytest.raises(ConfigError, match="their sum must be finite"):
        server.begin(0, [3, 4], weights={3: 1e308, 4: 1e308})
    with pytest.raises(ConfigError, match="must be clients, each once"):
        server.begin(0, [3, 3])
    with pytest.raises(ConfigError, match="must be clients, each once"):
        server.begin(0, [])
    for number in (-1, 2**63):
        with pytest.raises(ConfigError, match=rf"numbers of clients are \[{number}\]: must be"):
            server.begin(0, [3, number])
    with pytest.raises(ConfigError, match=r"weights of clients are \{3: -1.0\}: must be positive"):
        server.begin(0, [3], weights={3: -1.0})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mbtc", "nmse=None, bits=None: one of them must be given"),
        ("mbtc:bits=0", r"bits=0.0: must be in \(0, 12\]"),
        ("mbtc:bits=1,joint=maybe", "joint='maybe': must be one of"),
        ("mbtc:bits=1,memory=no", "memory='no' is not True or False"),
        ("mbtc:bits=1,block=100", "block=100: must be a power of two"),
        ("zip", "codec='zip': must start with one of"),
    ],
)
def test_specs_that_name_nothing(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_uplink(spec)


def test_a_spec_makes_the_same_uplink(uplink: Uplink) -> None:
    assert parse_uplink(uplink.spec) == uplink


def test_layouts() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0)}
    layout = Layout.of(tensors)
    flat = layout.flatten(tensors)
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 7]
    back = layout.split(flat)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ConfigError, match=r"tensors \['b'\] are not those"):
        layout.flatten({"a": tensors["a"]})
    with pytest.raises(ConfigError, match="must have one element at least"):
        Layout({"a": (0, 3)})
    covered = [index for group in LAYOUT.groups for index in range(group.begin, group.end)]
    assert covered == list(range(LAYOUT.numel))
    assert LAYOUT.ends.tolist() == [group.end for group in LAYOUT.groups]
    assert LAYOUT.matrices == ((40, 30), (1, 40), (10, 40), (1, 1))
    assert Layout({"a": (5,), "b": (2, 3, 4), "c": (0, 3)}).matrices == ((1, 5), (2, 12), (0, 3))


def test_frames() -> None:
    frame = seal(Kind.UPDATE, 300, b"body", b"context")
    assert unseal(Kind.UPDATE, 300, frame, b"context") == b"body"
    assert len(frame) == len(b"body") + 6
    for wrong in (
        lambda: unseal(Kind.ANSWER, 300, frame, b"context"),
        lambda: unseal(Kind.UPDATE, 301, frame, b"context"),
        lambda: unseal(Kind.UPDATE, 300, frame, b"another"),
        lambda: unseal(Kind.UPDATE, 300, bytes((frame[0] ^ 0x30, *frame[1:])), b"context"),
    ):
        with pytest.raises(WireFormatError):
            wrong()


def test_readers() -> None:
    for number in (0, 1, 127, 128, 300, 1 << 40):
        assert Reader(varint(number)).varint(1 << 41) == number
    with pytest.raises(WireFormatError, match="is the most"):
        Reader(varint(300)).varint(299)
    with pytest.raises(WireFormatError, match="is the most"):
        Reader(b"\xff" * 20).varint(1 << 60)
    with pytest.raises(WireFormatError, match="5 bytes expected where 2 are left"):
        Reader(b"ab").take(5)
    with pytest.raises(WireFormatError, match="2 bytes too many"):
        Reader(b"ab").end()
