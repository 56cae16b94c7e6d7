"""Secure sums: what the server can read, what it cannot, and what it costs."""

import contextlib
import itertools
import math
from collections.abc import Iterable
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from commrt.codecs import derive_seed
from commrt.codecs.hadamard import rotate
from commrt.codecs.uniforms import uniforms
from commrt.errors import ConfigError, StateError, WireFormatError
from commrt.federated import Layout, parse_uplink, wire
from commrt.federated.baselines.wire import PayloadReader
from commrt.federated.secure import SecureClient, SecureUplink
from tests.unit.uplinks import CLIENTS, LAYOUT, Training, mutations

SECURE = SecureUplink(bits=20, norm=60.0)
SEED = 5


class Rounds(Training):
    """Rounds in which somebody drops out."""

    def recover(self) -> None:
        for client, request in self.server.requests().items():
            self.server.receive(client, self.clients[client].answer(request))

    def receive(self, payloads: dict[int, bytes], clients: Iterable[int]) -> None:
        for client in clients:
            self.server.receive(client, payloads[client])


def codes_of(payload: bytes, numel: int, bits: int) -> Tensor:
    return torch.from_numpy(PayloadReader(payload[2:-4]).codes(numel, bits).astype(np.int64))


def plain_codes(
    uplink: SecureUplink, client: int, update: Tensor, num_clients: int, round_index: int = 0
) -> Tensor:
    """Before the masks, as documented."""
    rotated = rotate(update[None], derive_seed("secure rotation", SEED, round_index))[0]
    level = rotated.double() / uplink.step(num_clients, len(update))
    return (level + dither(client, len(update), round_index)).round().long()


def dither(client: int, numel: int, round_index: int = 0) -> Tensor:
    seed = derive_seed("secure dither", SEED, round_index, client)
    return uniforms(seed, numel).double() - 0.5


def test_the_mean_arrives_with_the_error_of_the_step() -> None:
    training = Rounds(SECURE)
    for _ in range(2):
        true = torch.stack(list(training.updates().values())).mean(dim=0)
        aggregate = training.round()
        error = (aggregate.mean - true).square().mean().sqrt()
        expected = SECURE.step(4, LAYOUT.numel) / math.sqrt(12 * 4)
        assert error == pytest.approx(expected, rel=0.05)
        assert aggregate.clients == CLIENTS
        assert aggregate.report["load"] < 1
        assert aggregate.bits == 8 * (-(-20 * LAYOUT.numel // 8) + 6) / LAYOUT.numel


@pytest.mark.parametrize("bits", [7, 8, 20])
def test_masks_cancel_exactly(bits: int) -> None:
    uplink = SecureUplink(bits=bits, norm=60.0)
    training = Rounds(uplink)
    updates = training.updates()
    payloads = training.payloads(updates)
    masked = sum(codes_of(each, LAYOUT.numel, bits) for each in payloads.values())
    plain = sum(plain_codes(uplink, client, each, 4) for client, each in updates.items())
    assert torch.equal(masked % 2**bits, plain % 2**bits)
    assert not torch.equal(codes_of(payloads[3], LAYOUT.numel, bits), plain % 2**bits)


def test_a_payload_says_nothing() -> None:
    """Of a constant update, which has few codes: masked ones are uniform, alone and in pairs."""
    uplink, layout = SecureUplink(bits=4, norm=1.0), Layout({"weight": (1 << 15,)})
    training = Rounds(uplink, layout=layout, seed=SEED)
    updates = dict.fromkeys(CLIENTS, torch.full((layout.numel,), 1e-3))
    first, second, *_ = training.payloads(updates).values()
    one, two = (codes_of(each, layout.numel, 4) for each in (first, second))
    plain = plain_codes(uplink, CLIENTS[0], updates[CLIENTS[0]], 4) % 16
    assert chi_square(plain, 16) > 1000
    for codes, count in ((one, 16), (two, 16), (one * 16 + two, 256)):
        assert abs(chi_square(codes, count) - count) < 5 * math.sqrt(2 * count)
    # Independent of what is masked: uniform for each of the codes.
    for code in plain.unique():
        assert abs(chi_square(one[plain == code], 16) - 15) < 5 * math.sqrt(30)


def chi_square(values: Tensor, count: int) -> float:
    counts = torch.bincount(values, minlength=count).double()
    expected = len(values) / count
    return float((counts - expected).square().sum() / expected)


@pytest.mark.parametrize("absent", [(3,), CLIENTS[-1:], (7, 11)])
def test_who_drops_out_before_it_sends(absent: tuple[int, ...]) -> None:
    training = Rounds(SECURE)
    for index in range(2):
        updates = training.updates()
        payloads = training.payloads(updates)
        there = [client for client in CLIENTS if client not in absent]
        training.receive(payloads, reversed(there))
        training.recover()
        assert training.server.requests() == {}
        with pytest.raises(WireFormatError, match=f"client {absent[0]} is too late"):
            training.server.receive(absent[0], payloads[absent[0]])
        aggregate = training.server.finish()
        training.index += 1
        codes = sum(plain_codes(SECURE, c, updates[c], 4, index) for c in there)
        dithers = sum(dither(client, LAYOUT.numel, index) for client in there)
        seed = derive_seed("secure rotation", SEED, index)
        found = rotate(aggregate.mean[None], seed)[0].double() * len(there)
        torch.testing.assert_close(
            found / SECURE.step(4, LAYOUT.numel), codes - dithers, atol=0.3, rtol=0
        )
        assert aggregate.clients == tuple(there)
        answers = len(there) * (8 * len(absent) + 6)
        assert aggregate.traffic.answer_bytes >= answers


def test_who_drops_out_before_it_answers() -> None:
    """Nothing can be read, and nothing wrong is."""
    training = Rounds(SECURE)
    payloads = training.payloads(training.updates())
    training.receive(payloads, (3, 7, 11))
    for client, request in training.server.requests().items():
        if client != 7:
            training.server.receive(client, training.clients[client].answer(request))
    assert training.server.requests().keys() == {7}
    with pytest.raises(StateError, match=r"\[7\] have not said the seeds"):
        training.server.finish()
    training.index += 1
    assert training.round().clients == CLIENTS


def test_nobody_was_asked() -> None:
    training = Rounds(SECURE)
    training.receive(training.payloads(training.updates()), (3, 7, 11))
    with pytest.raises(StateError, match="have not said the seeds"):
        training.server.finish()


def test_a_sum_of_fewer_than_least_is_not_read() -> None:
    training = Rounds(SecureUplink(bits=20, norm=60.0, least=3))
    payloads = training.payloads(training.updates())
    training.receive(payloads, (3, CLIENTS[-1]))
    assert training.server.requests() == {}
    with pytest.raises(StateError, match="ends with 2 updates of 3"):
        training.server.finish()
    server = Rounds(SECURE).server
    server.begin(0, CLIENTS)
    with pytest.raises(StateError, match="ends with no update of 4 asked"):
        server.finish()


def test_a_cohort_of_fewer_than_least_is_masked_for_good() -> None:
    uplink = SecureUplink(bits=8, norm=1.0)
    training = Rounds(uplink, clients=[3])
    payload = training.payloads({3: torch.zeros(LAYOUT.numel)})[3]
    assert len(codes_of(payload, LAYOUT.numel, 8).unique()) > 200
    with pytest.raises(StateError, match="ends with 1 updates of 2"):
        training.end({3: payload})


def test_clients_answer_once_and_for_enough_others() -> None:
    """Whatever a server that does not keep to the protocol asks."""
    least = SecureUplink(bits=20, norm=60.0, least=3)
    for uplink, asked, says in (
        (least, (7, 11), "leaves 2 clients: must leave 3"),
        (SECURE, (3,), "must be others of"),
        (SECURE, (), "must be others of"),
    ):
        training = Rounds(uplink)
        payloads = training.payloads(training.updates())
        server = training.server
        for client in set(CLIENTS) - set(asked):
            server.receive(client, payloads[client])
        server._dropped = asked  # type: ignore[attr-defined]
        server._arrived -= set(asked)  # type: ignore[attr-defined]
        with pytest.raises(WireFormatError, match=says):
            training.clients[3].answer(request_for(training, asked))
    training = Rounds(SECURE)
    with pytest.raises(WireFormatError, match="before anything was encoded"):
        training.clients[3].answer(b"")
    training.payloads(training.updates())
    again = training.clients[3].answer(request_for(training, (7,)))
    assert training.clients[3].answer(request_for(training, (7,))) == again
    with pytest.raises(WireFormatError, match=r"a request for \(11,\) after one for \(7,\)"):
        training.clients[3].answer(request_for(training, (11,)))


def request_for(training: Rounds, dropped: tuple[int, ...]) -> bytes:
    """What the server would ask client 3, if it said that these have dropped out."""
    from commrt.federated.secure.ends import write_clients
    from commrt.federated.wire import Kind, seal

    context = training.server._context(3)  # type: ignore[attr-defined]
    return seal(Kind.REQUEST, training.index, write_clients(dropped), context)


def test_masks_serve_once() -> None:
    training = Rounds(SECURE)
    update = training.updates()[3]
    client, server = training.clients[3], training.server
    client.encode(4, update, server.begin(4, CLIENTS)[3])
    state = client.state_dict()
    restarted = SECURE.client(LAYOUT, 3, seed=SEED)
    restarted.load_state_dict(state)
    for each in (client, restarted):
        assert each.encode(4, update, server.begin(4, CLIENTS)[3])
        for index, cohort in ((4, (3, 7)), (2, CLIENTS)):
            with pytest.raises(WireFormatError, match=rf"after 4 of \(3, 7, 11, {CLIENTS[-1]}\)"):
                each.encode(index, update, server.begin(index, cohort)[3])


@pytest.mark.parametrize("correlation", [0.0, 1.0])
def test_elements_that_leave_the_range_are_as_rare_as_stated(correlation: float) -> None:
    layout = Layout({"weight": (1 << 14,)})
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(8, layout.numel, generator=generator)
    updates = own[:1].expand(8, -1) if correlation else own
    norm = float(updates.square().sum(dim=1).mean().sqrt())
    uplink = SecureUplink(bits=6, norm=norm, correlation=correlation, failure=0.05)
    for scale, least, most in ((1.0, 0.0, 0.05), (3.0, 0.1, 1.0)):
        training = Rounds(uplink, layout=layout, clients=range(8))
        aggregate = training.end(training.payloads(dict(enumerate(scale * updates))))
        error = rotate(
            (aggregate.mean - scale * updates.mean(dim=0))[None],
            derive_seed("secure rotation", SEED, 0),
        )[0]
        wrong = float((error.abs() * 8 > 32 * uplink.step(8, layout.numel)).float().mean())
        assert least <= wrong <= most
        assert (aggregate.report["load"] > 1.05) == (scale > 1)


@pytest.mark.parametrize(("bits", "independent", "price"), [(4, 0.8, 3.3), (5, 1.75, 3.3)])
def test_the_price_in_bits(bits: int, independent: float, price: float) -> None:
    """Against entropy coded codes, at the same error: 16 clients with nothing in common."""
    layout = Layout({"weight": (1 << 13,)})
    generator = torch.Generator().manual_seed(0)
    updates = dict(enumerate(torch.randn(16, layout.numel, generator=generator)))
    uplink = SecureUplink(bits=bits, norm=math.sqrt(layout.numel), correlation=0.0)
    true = torch.stack(list(updates.values())).mean(dim=0)
    secure = Rounds(uplink, layout=layout, clients=range(16))
    found = secure.end(secure.payloads(updates))
    error = float((found.mean - true).square().mean()) * 16
    assert error == pytest.approx(uplink.step(16, layout.numel) ** 2 / 12, rel=0.1)
    plain = parse_uplink(f"mbtc:nmse={error},memory=False,joint=off")
    training = Rounds(plain, layout=layout, clients=range(16))
    bits_of_plain = training.end(training.payloads(updates)).bits
    assert bits_of_plain == pytest.approx(independent, abs=0.1)
    assert found.bits - bits_of_plain == pytest.approx(price, abs=0.15)


def test_predictions_are_from_the_global_update_only() -> None:
    """To the bit: whoever knows another one is refused."""
    uplink = SecureUplink(bits=12, norm=60.0, predict=0.5)
    training = Rounds(uplink)
    for _ in range(3):
        true = torch.stack(list(training.updates().values())).mean(dim=0)
        mean = training.round().mean
        assert (mean - true).square().mean().sqrt() < uplink.step(4, LAYOUT.numel)
    told = training.server.begin(3, CLIENTS)
    for previous in (None, 2 * mean):
        with pytest.raises(WireFormatError, match="the check fails"):
            training.clients[3].encode(3, true, told[3], previous)
    assert training.clients[3].encode(3, true, told[3], mean)


def test_a_run_goes_on_from_its_state() -> None:
    uplink = SecureUplink(bits=12, norm=60.0, predict=0.5)
    one, two = Rounds(uplink), Rounds(uplink)
    one.round()
    two.server.load_state_dict(one.server.state_dict())
    for client in CLIENTS:
        two.clients[client].load_state_dict(one.clients[client].state_dict())
    two.previous, two.index = one.previous, one.index
    assert torch.equal(one.round().mean, two.round().mean)
    for state in ({"mean": torch.ones(3)}, {"mean": 3}, {"other": 1}):
        with pytest.raises(StateError):
            two.server.load_state_dict(state)
    with pytest.raises(StateError, match="must have"):
        two.clients[3].load_state_dict({"cohort": CLIENTS})


def test_secrets_of_ones_own() -> None:
    """Whoever has others reads nothing: every element is as likely as any."""
    training = Rounds(SECURE)

    def pairs_of(client: int, deal: int) -> SecureClient:
        def pairs(other: int) -> int:
            return derive_seed(deal, *sorted((client, other)))

        return SECURE.client(LAYOUT, client, seed=SEED, pairs=pairs)

    training.clients = {client: pairs_of(client, 77) for client in CLIENTS}
    assert training.round().report["load"] < 1
    training.clients[7] = pairs_of(7, 78)
    assert training.round().report["load"] > 2


def test_damage_is_refused() -> None:
    training = Rounds(SECURE)
    updates = training.updates()
    told = training.server.begin(0, CLIENTS)
    for damaged in (*mutations(told[3]), told[7]):
        with pytest.raises(WireFormatError):
            training.clients[3].encode(0, updates[3], damaged)
    payloads = training.payloads(updates)
    for damaged in (*mutations(payloads[3]), payloads[7]):
        with pytest.raises(WireFormatError):
            training.server.receive(3, damaged)
    training.receive(payloads, (3, 7, 11))
    with pytest.raises(WireFormatError, match="has sent its update of this round before"):
        training.server.receive(3, payloads[3])
    requests = training.server.requests()
    for damaged in (*mutations(requests[3]), requests[7]):
        with pytest.raises(WireFormatError):
            training.clients[3].answer(damaged)
    answers = {client: training.clients[client].answer(each) for client, each in requests.items()}
    for damaged in (*mutations(answers[3]), answers[7], payloads[3]):
        with pytest.raises(WireFormatError):
            training.server.receive(3, damaged)
    for client, answer in answers.items():
        training.server.receive(client, answer)
    with pytest.raises(WireFormatError, match="has answered before"):
        training.server.receive(3, answers[3])
    mean = training.server.finish().mean
    true = torch.stack([updates[client] for client in (3, 7, 11)]).mean(dim=0)
    torch.testing.assert_close(mean, true, atol=0.01, rtol=0)


def test_what_was_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames whose check is right, made by somebody who knows how."""
    monkeypatch.setattr(wire, "zlib", SimpleNamespace(crc32=lambda *_: 0))
    random = Random(0)
    for index in range(40):
        training = Rounds(SECURE)
        payloads = training.payloads(training.updates())
        takes = [lambda frame, server=training.server: server.receive(3, frame)]
        frames = [payloads.pop(3)]
        if index % 2:
            payloads[3] = frames.pop()
            training.receive(payloads, (3, 7, 11))
            request = training.server.requests()[3]
            frames = [request, training.clients[3].answer(request)]
            takes.insert(0, training.clients[3].answer)
        for take, frame in zip(takes, frames, strict=True):
            body = bytearray(frame[2:-4])
            body[random.randrange(len(body))] ^= 1 << random.randrange(8)
            if random.random() < 0.5:
                del body[random.randrange(len(body)) :]
            with contextlib.suppress(WireFormatError):
                take(frame[:2] + bytes(body) + bytes(4))
        with contextlib.suppress(StateError):
            assert training.server.finish().mean.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("secure", r"lacks \['bits', 'norm'\]: such as secure:bits=8,norm=1"),
        ("secure:bits=8", r"lacks \['norm'\]"),
        ("secure:bits=0,norm=1", "bits=0: must be from 1 to 24"),
        ("secure:bits=8,norm=-1", "norm=-1.0: must be from"),
        ("secure:bits=8,norm=nan", "norm=nan: must be from"),
        ("secure:bits=8,norm=1,correlation=2", "correlation=2.0: must be from 0 to 1"),
        ("secure:bits=8,norm=1,failure=1", "failure=1.0: must be above 0 and below 1"),
        ("secure:bits=8,norm=1,least=1", "least=1: must be at least 2"),
        ("secure:bits=8,norm=1,predict=1.5", "predict=1.5: must be from 0 to 1"),
    ],
)
def test_settings_that_are_not_allowed(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_uplink(spec)


def test_specs() -> None:
    for uplink in (SECURE, SecureUplink(bits=4, norm=0.25, correlation=0.5, predict=1.0, least=5)):
        assert parse_uplink(uplink.spec) == uplink


def test_what_a_cohort_needs() -> None:
    server = SecureUplink(bits=4, norm=1.0).server(LAYOUT)
    with pytest.raises(
        ConfigError, match="with a cohort of 100 and failure=1e-05: must be at leas"
    ):
        server.begin(0, range(100))
    [needed] = {bits for bits in range(1, 24) if fits(bits) and not fits(bits - 1)}
    with pytest.raises(ConfigError, match=f"must be at least {needed}$"):
        SecureUplink(bits=1, norm=1.0).step(100, 1000)
    with pytest.raises(ConfigError, match=r"weights of clients are .*: must be equal"):
        server.begin(0, [1, 2, 3], weights={1: 1.0, 2: 2.0, 3: 1.0})
    steps = [SecureUplink(bits=b, norm=1.0).step(10, 1000) for b in range(6, 12)]
    assert all(1.9 < wide / narrow < 2.4 for wide, narrow in itertools.pairwise(steps))


def fits(bits: int) -> bool:
    try:
        return SecureUplink(bits=bits, norm=1.0).step(100, 1000) > 0
    except ConfigError:
        return False
