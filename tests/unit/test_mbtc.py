"""MBTC: what is decoded is what was coded, at the rate and the distortion that were asked for."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from commrt.codecs.entropy import encode_codes
from commrt.errors import ConfigError, StateError, WireFormatError
from commrt.federated import Aggregate, Layout, parse_uplink
from commrt.federated.mbtc import plan
from commrt.federated.mbtc.client import MbtcClient
from commrt.federated.mbtc.coding import read_codes
from commrt.federated.mbtc.parameters import NUM_CLASSES, Parameters, Plane
from commrt.federated.mbtc.rate import Coded, RateControl
from commrt.federated.mbtc.requests import Wanted, read_request, write_request
from commrt.federated.mbtc.server import MbtcServer
from commrt.federated.mean import ExactMean

BLOCK = 4096
# Two blocks, and what does not fill a third.
LAYOUT = Layout({"weight": (2 * BLOCK + 123,)})


class Cohort:
    """Clients whose updates are jointly Gaussian."""

    def __init__(
        self, spec: str, *, count: int = 8, rho: float = 0.0, layout: Layout = LAYOUT
    ) -> None:
        uplink = parse_uplink(spec)
        self.layout, self.count, self.rho = layout, count, rho
        server = uplink.server(layout)
        assert isinstance(server, MbtcServer)
        self.server = server
        self.clients: list[MbtcClient] = []
        for index in range(count):
            client = uplink.client(layout, index)
            assert isinstance(client, MbtcClient)
            self.clients.append(client)
        self.previous: Tensor | None = None
        self.index = 0

    def updates(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.index)
        common = math.sqrt(self.rho) * torch.randn(self.layout.numel, generator=generator)
        own = math.sqrt(1 - self.rho)
        return [
            common + own * torch.randn(self.layout.numel, generator=generator)
            for _ in range(self.count)
        ]

    def send(self, updates: list[Tensor], who: list[int] | None = None) -> None:
        told = self.server.begin(self.index, range(self.count))
        for index in range(self.count) if who is None else who:
            client, update = self.clients[index], updates[index]
            payload = client.encode(self.index, update, told[index], self.previous)
            self.server.receive(index, payload)

    def answer(self) -> int:
        """Ask until nothing lacks; how many were asked."""
        asked = 0
        while requests := self.server.requests():
            asked += len(requests)
            for index, request in requests.items():
                assert self.clients[index].may_be_asked
                self.server.receive(index, self.clients[index].answer(request))
        return asked

    def finish(self) -> Aggregate:
        aggregate = self.server.finish()
        self.previous, self.index = aggregate.mean, self.index + 1
        return aggregate

    def round(self) -> Aggregate:
        self.send(self.updates())
        self.answer()
        return self.finish()

    def distortion(self, aggregate: Aggregate, updates: list[Tensor]) -> float:
        """Of the mean, over an update's energy by the number of clients."""
        error = aggregate.mean - torch.stack(updates).mean(dim=0)
        return float(self.count * error.square().mean())


# -- rate and distortion --------------------------------------------------------------------------


@pytest.mark.parametrize("nmse", [0.05, 0.5, 5.0])
def test_the_distortion_asked_for(nmse: float) -> None:
    cohort = Cohort(f"mbtc:nmse={nmse}")
    found = []
    for _ in range(4):
        updates = cohort.updates()
        found.append(cohort.distortion(cohort.round(), updates))
    assert sum(found) / len(found) == pytest.approx(nmse, rel=0.05)


@pytest.mark.parametrize("bits", [0.3, 1.0, 3.0])
def test_the_bits_asked_for(bits: float) -> None:
    cohort = Cohort(f"mbtc:bits={bits}", count=3)
    found = [cohort.round().bits for _ in range(8)]
    assert found[-1] == pytest.approx(bits, rel=0.05)


def test_each_client_keeps_to_its_budget() -> None:
    """More bits buy less noise."""
    cohort, budgets = Cohort("mbtc:bits=1.0", count=3), {0: 0.5, 1: 1.0, 2: 3.0}
    for index in range(8):
        updates = cohort.updates()
        told = cohort.server.begin(index, range(3), budgets=budgets)
        bits = {}
        for client, update in enumerate(updates):
            payload = cohort.clients[client].encode(index, update, told[client], cohort.previous)
            cohort.server.receive(client, payload)
            bits[client] = 8 * len(payload) / LAYOUT.numel
        cohort.finish()
    assert bits == pytest.approx(budgets, rel=0.05)
    with pytest.raises(ConfigError, match=r"budgets of clients are \{2: None\}"):
        cohort.server.begin(8, range(3), budgets={0: 1.0, 1: 2.0})


def test_larger_shares_have_less_noise() -> None:
    """The same part each of the mean's error, which takes the fewest bits where noise is little."""
    shares = {0: 1.0, 1: 1.0, 2: 4.0}
    cohort, error, energy = Cohort("mbtc:nmse=0.02", count=3), 0.0, 0.0
    for index in range(4):
        updates = cohort.updates()
        told = cohort.server.begin(index, range(3), weights=shares)
        sizes = []
        for client, update in enumerate(updates):
            payload = cohort.clients[client].encode(index, update, told[client], cohort.previous)
            cohort.server.receive(client, payload)
            sizes.append(8 * len(payload) / LAYOUT.numel)
        mean = cohort.finish().mean
        true = (updates[0] + updates[1] + 4 * updates[2]) / 6
        error += float((mean - true).square().mean())
        energy += sum((shares[k] / 6) ** 2 * float(updates[k].square().mean()) for k in range(3))
    assert error / energy == pytest.approx(0.02, rel=0.05)
    assert sizes[2] - sizes[0] == pytest.approx(math.log2(4), abs=0.1)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_little_more_than_the_limit_of_independent_coding() -> None:
    """0.25 bits more, what subtractive dither costs at a high rate, and less at a low one."""
    cohort = Cohort("mbtc:nmse=0.02,memory=False", count=3)
    cohort.round()
    aggregate = cohort.round()
    limit = 0.5 * math.log2(1 + 1 / 0.02)
    assert aggregate.report["limit_independent"] == pytest.approx(limit, abs=0.02)
    assert limit < aggregate.bits < limit + 0.27


@pytest.mark.parametrize("size", [2003, 8000])
def test_points_of_e8_take_a_tenth_of_a_bit_less(size: int) -> None:
    """At the same distortion, also where the last point is not full."""
    bits = {}
    for lattice in ("z", "e8"):
        spec = f"mbtc:nmse=0.05,joint=off,lattice={lattice}"
        cohort, found = Cohort(spec, count=4, layout=Layout({"weight": (size,)})), []
        bits[lattice] = 0.0
        for index in range(6):
            updates = cohort.updates()
            aggregate = cohort.round()
            found.append(cohort.distortion(aggregate, updates))
            if index > 0:  # before, there are no tables
                bits[lattice] += (aggregate.bits - 8 * 15 / size * (lattice == "e8")) / 5
        assert sum(found) / len(found) == pytest.approx(0.05, rel=0.05)
    assert 0.06 < bits["z"] - bits["e8"] < 0.15


def test_unbiased() -> None:
    """The error of one update, coded in many rounds, averages out."""
    layout = Layout({"weight": (1000,)})
    cohort, update = Cohort("mbtc:nmse=1.0", count=1, layout=layout), torch.linspace(-1, 1, 1000)
    total = torch.zeros(1000)
    for _ in range(60):
        cohort.send([update])
        total += cohort.finish().mean - update
    energy = float(update.square().mean())
    assert float((total / 60).square().mean()) < 2 * energy / 60


def test_what_is_known_is_not_sent_again() -> None:
    """Updates that repeat themselves take fewer bits, more so where clients are remembered."""
    bits = {}
    for memory in (True, False):
        cohort = Cohort(f"mbtc:nmse=0.1,memory={memory}", count=4)
        updates = cohort.updates()
        for _ in range(5):
            cohort.send(updates)
            aggregate = cohort.finish()
        bits[memory] = aggregate.bits
    assert bits[True] < 0.6 * bits[False]


# -- joint decoding -------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", ["auto", "modulo"])
def test_joint_decoding_finds_the_same_codes(joint: str) -> None:
    """In fewer bits, and not a bit of the mean is another, as long as the steps are the same."""
    spec = f"mbtc:nmse=0.02,memory=False,block={BLOCK}"
    alone, jointly = (
        Cohort(spec + ",joint=off", rho=0.99),
        Cohort(f"{spec},joint={joint}", rho=0.99),
    )
    for index in range(2):
        one, two = alone.round(), jointly.round()
        assert torch.equal(one.mean, two.mean)
        assert two.report["joint_groups"] == (index > 0)
    assert two.bits < one.bits - 0.3
    assert two.bits > two.report["limit_joint"]


def test_no_joint_decoding_where_it_does_not_pay() -> None:
    cohort = Cohort(f"mbtc:nmse=0.1,block={BLOCK}", rho=0.2)
    assert all(cohort.round().report["joint_groups"] == 0 for _ in range(3))
    assert not any(client.may_be_asked for client in cohort.clients)


def lacking(cohort: Cohort) -> None:
    """Make clients send too few bits, so that blocks fail."""
    for record in cohort.server._cosets._records:
        record.margin = -0.5


def test_missing_bits_are_asked_for() -> None:
    spec = f"mbtc:nmse=0.02,memory=False,block={BLOCK}"
    alone, jointly = Cohort(spec + ",joint=off", rho=0.99), Cohort(spec, rho=0.99)
    alone.round(), jointly.round()
    lacking(jointly)
    jointly.send(jointly.updates())
    assert jointly.answer() > 0
    aggregate = jointly.finish()
    assert aggregate.traffic.answer_bytes > 0
    assert aggregate.report["missing_blocks"] == 0
    assert torch.equal(aggregate.mean, alone.round().mean)


def test_rates_are_learned_from_answers_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = Cohort(f"mbtc:nmse=0.02,memory=False,block={BLOCK}", rho=0.99)
    cohort.round()
    lacking(cohort)
    cohort.send(cohort.updates())
    assert cohort.answer() > 0
    learned = dict[int, Coded]()
    monkeypatch.setattr(RateControl, "learn", lambda _, coded: learned.update(coded))
    bits = cohort.finish().traffic.uplink_bytes * 8 / LAYOUT.numel
    assert sum(each.bits for each in learned.values()) == pytest.approx(bits)


def test_a_block_that_lacks_bits_is_left_out_at_the_deadline() -> None:
    """Of that client only, and the weights of the others are made to add up."""
    cohort = Cohort(f"mbtc:nmse=0.001,memory=False,block={BLOCK}", rho=0.99)
    cohort.round()
    lacking(cohort)
    updates = cohort.updates()
    cohort.send(updates)
    requests = cohort.server.requests()
    assert requests
    aggregate = cohort.finish()
    assert aggregate.report["missing_blocks"] > 0
    stack = torch.stack(updates)
    for part in (slice(0, BLOCK), slice(BLOCK, 2 * BLOCK)):
        weights = torch.linalg.lstsq(stack[:, part].T, aggregate.mean[part, None]).solution[:, 0]
        present = weights > 0.5 / cohort.count
        assert float((weights[present] - 1 / int(present.sum())).abs().max()) < 0.02
        assert all(weight < 0.02 for weight in weights[~present].abs().tolist())
        expected = stack[present][:, part].mean(dim=0)
        assert float((aggregate.mean[part] - expected).square().mean()) < 0.001


def test_the_linear_estimate_is_nearer_and_says_its_bias() -> None:
    errors, reports = {}, {}
    for combine in ("mean", "lmmse"):
        cohort = Cohort(f"mbtc:nmse=2.0,memory=False,combine={combine}", rho=0.5)
        for _ in range(3):
            updates = cohort.updates()
            aggregate = cohort.round()
        errors[combine] = cohort.distortion(aggregate, updates)
        reports[combine] = aggregate.report
        true = torch.stack(updates).mean(dim=0)
        alignment = float(aggregate.mean @ true / true.square().sum())
        assert alignment == pytest.approx(reports[combine].get("alignment", 1.0), abs=0.05)
    assert errors["lmmse"] < 0.8 * errors["mean"]
    assert reports["lmmse"]["alignment"] < 0.8


def test_large_cohorts_are_coded_without_each_other() -> None:
    layout = Layout({"weight": (600,)})
    cohort = Cohort("mbtc:nmse=0.1", count=65, rho=0.9, layout=layout)
    for _ in range(2):
        report = cohort.round().report
    assert report["joint_groups"] == 0
    assert "limit_joint" not in report
    server = parse_uplink("mbtc:nmse=0.1,combine=lmmse").server(layout)
    with pytest.raises(ConfigError, match="combine='lmmse' of 65 clients: must be 64 at most"):
        server.begin(0, range(65))


# -- states that differ ---------------------------------------------------------------------------


def test_a_client_that_forgot_starts_anew() -> None:
    cohort = Cohort("mbtc:nmse=0.1", count=3)
    cohort.round()
    cohort.clients[1].load_state_dict({})
    updates = cohort.updates()
    assert cohort.distortion(cohort.round(), updates) == pytest.approx(0.1, rel=0.1)


def test_a_payload_that_was_lost() -> None:
    """The client remembers what the server never had, and is told so."""
    cohort = Cohort("mbtc:nmse=0.1", count=3)
    cohort.round()
    cohort.send(cohort.updates(), who=[0, 2])
    cohort.clients[1].encode(
        1, cohort.updates()[1], cohort.server.begin(1, range(3))[1], cohort.previous
    )
    cohort.send(cohort.updates(), who=[0, 2])
    cohort.finish()
    updates = cohort.updates()
    assert cohort.distortion(cohort.round(), updates) == pytest.approx(0.1, rel=0.1)


def test_another_global_update_is_noticed() -> None:
    cohort = Cohort("mbtc:nmse=0.1", count=2)
    cohort.round()
    told, updates = cohort.server.begin(1, range(2)), cohort.updates()
    wrong = torch.zeros(LAYOUT.numel)
    with pytest.raises(WireFormatError, match="of another client or state"):
        cohort.server.receive(0, cohort.clients[0].encode(1, updates[0], told[0], wrong))


@pytest.mark.parametrize("lattice", ["z", "e8"])
@pytest.mark.parametrize("spec", ["nmse=0.1", "bits=12.0", "nmse=1e-9"])
def test_elements_far_from_the_rest(spec: str, lattice: str) -> None:
    """The client chooses a step with which they have a code; the first time, and later on."""
    cohort = Cohort(f"mbtc:{spec},joint=off,lattice={lattice}", count=1)
    for _ in range(2):
        update = cohort.updates()[0]
        update[5] = 1e9
        cohort.send([update])
        mean = cohort.finish().mean
        assert float((mean - update).abs().max()) < 1e9 / 16000 * 2 if spec != "nmse=0.1" else 1e9
        assert float(mean[5]) == pytest.approx(1e9, rel=0.5)
        cohort.round()


@pytest.mark.parametrize("spec", ["nmse=0.1", "nmse=0.1,lattice=e8", "bits=1"])
def test_rounds_of_nothing(spec: str) -> None:
    """Zeros of all clients, or of one, and updates a million times as large as before."""
    cohort = Cohort(f"mbtc:{spec},joint=off", count=4)
    for scale in (0.0, 1.0, 1.0, 0.0, 1.0, 1e6, 1e6):
        updates = [scale * update for update in cohort.updates()]
        cohort.send(updates)
        aggregate = cohort.finish()
        assert bool(scale) <= (cohort.distortion(aggregate, updates) < 0.6 * scale**2)
        assert aggregate.bits < 26
    updates = cohort.updates()
    updates[2].zero_()
    cohort.send(updates)
    cohort.finish()
    assert cohort.round().bits < 6


def test_bits_that_cannot_be_reached() -> None:
    """The noise stays within bounds."""
    cohort = Cohort("mbtc:bits=1", count=2, layout=Layout({"weight": (3,)}))
    for _ in range(30):
        updates = cohort.updates()
        cohort.send(updates)
        error = cohort.distortion(cohort.finish(), updates)
    assert error < 1000


def test_what_is_refused_teaches_nothing() -> None:
    one, two = (Cohort("mbtc:bits=1", count=2) for _ in range(2))
    for _ in range(4):
        for cohort, junk in ((one, b""), (two, bytes(100_000))):
            told = cohort.server.begin(cohort.index, range(2))
            for k, update in enumerate(cohort.updates()):
                with pytest.raises(WireFormatError):
                    cohort.server.receive(k, junk)
                payload = cohort.clients[k].encode(cohort.index, update, told[k], cohort.previous)
                cohort.server.receive(k, payload)
            cohort.finish()
        assert torch.equal(one.previous, two.previous)


def test_a_server_goes_on_after_what_went_wrong() -> None:
    cohort = Cohort("mbtc:nmse=0.1", count=2)
    cohort.round()
    state = cohort.server.state_dict()
    cohort.send(cohort.updates())
    with pytest.raises(ConfigError):
        cohort.server.begin(7, [0, 1], budgets={0: 1.0})
    assert cohort.finish().clients == (0, 1)
    cohort.server.begin(2, [0, 1])
    with pytest.raises(StateError, match="no update of 2 asked"):
        cohort.server.finish()
    cohort.index = 3
    cohort.round()
    before = cohort.server.state_dict()
    for broken in ({}, {**state, "mean": torch.ones(3)}, {**state, "rates": None}):
        with pytest.raises(StateError, match="not a state of mbtc"):
            cohort.server.load_state_dict(broken)
    assert torch.equal(cohort.server.state_dict()["mean"], before["mean"])


def test_states_are_saved_without_code(tmp_path: Path) -> None:
    cohort, other = Cohort("mbtc:nmse=0.1", count=2), Cohort("mbtc:nmse=0.1", count=2)
    cohort.round(), other.round()
    torch.save(cohort.server.state_dict(), tmp_path / "server")
    torch.save(cohort.clients[0].state_dict(), tmp_path / "client")
    cohort.server.load_state_dict(torch.load(tmp_path / "server", weights_only=True))
    cohort.clients[0].load_state_dict(torch.load(tmp_path / "client", weights_only=True))
    assert torch.equal(cohort.round().mean, other.round().mean)


def test_states_that_do_not_fit() -> None:
    cohort = Cohort("mbtc:nmse=0.1", count=2)
    cohort.round()
    state = cohort.server.state_dict()
    for wrong in (
        {"tables": {each: {"counts": torch.zeros(3)} for each in (False, True)}},
        {"cosets": {**state["cosets"], "records": [{"odd": 1.0}]}},
    ):
        with pytest.raises(StateError, match="not a state of"):
            cohort.server.load_state_dict(state | wrong)
    cohort.round()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_history_that_is_not_finite(value: float) -> None:
    cohort = Cohort("mbtc:nmse=0.1", count=2)
    cohort.round()
    history = cohort.clients[0].state_dict()["decoded"].clone()
    history[-3] = value
    with pytest.raises(StateError, match="must be finite"):
        cohort.clients[0].load_state_dict({"decoded": history})
    cohort.round()


def test_what_others_do_with_the_mean() -> None:
    cohort, other = Cohort("mbtc:nmse=0.1", count=2), Cohort("mbtc:nmse=0.1", count=2)
    mean, _ = cohort.round().mean, other.round()
    cohort.previous = mean.clone()
    mean.mul_(0.1)
    assert torch.equal(cohort.round().mean, other.round().mean)


def test_an_update_that_is_coded_twice() -> None:
    """The server has the one, the client remembers the other: it is not predicted from."""
    cohort = Cohort("mbtc:nmse=0.1", count=2)
    told = cohort.server.begin(0, range(2))
    for k, update in enumerate(cohort.updates()):
        cohort.server.receive(k, cohort.clients[k].encode(0, update, told[k]))
        cohort.clients[k].encode(0, 2 * update, told[k])
    cohort.finish()
    assert cohort.round().clients == (0, 1)


def test_bits_are_kept_with_joint_decoding() -> None:
    """Finer steps than in the round before do not make cosets look dear: they go on."""
    cohort = Cohort(f"mbtc:bits=3,memory=False,block={BLOCK}", count=9, rho=0.9)
    rounds = [cohort.round() for _ in range(8)][4:]
    assert [each.report["joint_groups"] for each in rounds] == [1.0] * 4
    assert all(2.7 < each.bits < 3.3 for each in rounds)


def test_parts_that_only_light_clients_have() -> None:
    total = ExactMean(6, 1.0, 2)
    total.add(torch.zeros(1, 6), [1 - 1e-9], [[slice(0, 3)]])
    total.add(torch.ones(1, 6), [1e-9])
    mean = total.mean()
    assert (mean[:3] - 1).abs().max() < 1e-6
    assert float(mean[3:].abs().max()) < 1e-8


def send_and_encode_again(cohort: Cohort, factor: float) -> None:
    """The first payloads arrive, of which the clients do not know."""
    told = cohort.server.begin(cohort.index, range(cohort.count))
    for index, update in enumerate(cohort.updates()):
        client = cohort.clients[index]
        payload = client.encode(cohort.index, update, told[index], cohort.previous)
        client.encode(cohort.index, factor * update, told[index], cohort.previous)
        cohort.server.receive(index, payload)


def test_answers_are_of_the_payload_that_arrived() -> None:
    once, again = (Cohort(f"mbtc:nmse=0.02,block={BLOCK}", rho=0.9) for _ in range(2))
    for cohort in (once, again):
        for _ in range(3):
            cohort.round()
        lacking(cohort)
    once.send(once.updates())
    send_and_encode_again(again, 1.0)
    assert once.answer() == again.answer() > 0
    assert torch.equal(once.finish().mean, again.finish().mean)


def test_a_request_for_another_payload_is_refused() -> None:
    cohort = Cohort(f"mbtc:nmse=0.02,block={BLOCK}", rho=0.9)
    cohort.round()
    lacking(cohort)
    send_and_encode_again(cohort, 1.1)
    requests = cohort.server.requests()
    assert requests
    for index, request in requests.items():
        with pytest.raises(WireFormatError, match="of another client or state"):
            cohort.clients[index].answer(request)


def test_an_answer_is_that_of_its_request() -> None:
    """Not that of the request before, which came twice."""
    cohort = Cohort(f"mbtc:nmse=0.02,memory=False,block={BLOCK}", rho=0.99)
    cohort.round()
    lacking(cohort)
    cohort.send(cohort.updates())
    before: dict[int, bytes] = {}
    refused = 0
    while requests := cohort.server.requests():
        for index, request in requests.items():
            if index in before:
                refused += 1
                with pytest.raises(WireFormatError):
                    cohort.server.receive(index, before[index])
            before[index] = cohort.clients[index].answer(request)
            cohort.server.receive(index, before[index])
    assert refused
    assert cohort.finish().report["missing_blocks"] == 0


def test_steps_are_bounded_where_they_are_read() -> None:
    told = Parameters(step=1.0, history=0, tables=None, planes=((),), has_previous=False)
    for step in (1e-39, 1e37, math.inf, math.nan, -1.0):
        body = dataclasses.replace(told, step=step).pack()
        with pytest.raises(WireFormatError, match="a step of"):
            Parameters.unpack(body, 1, BLOCK)


# -- parts ----------------------------------------------------------------------------------------


def test_parameters() -> None:
    tables = torch.arange(NUM_CLASSES, dtype=torch.int16)[None] * 16
    for told in (
        Parameters(step=0.0, history=0, tables=None, planes=((),), has_previous=False),
        Parameters(step=0.5, history=7, tables=tables, planes=((),), has_previous=True),
        Parameters(
            step=0.5,
            history=7,
            tables=tables,
            planes=((Plane(3, 512), Plane(1, 8)),),
            has_previous=True,
        ),
    ):
        body = told.pack()
        found = Parameters.unpack(body, 1, BLOCK)
        assert found.pack() == body
        assert found.planes == told.planes
        for length in range(len(body)):
            with pytest.raises(WireFormatError):
                Parameters.unpack(body[:length], 1, BLOCK)
    with pytest.raises(WireFormatError, match="a plane of bin"):
        Parameters.unpack(body, 1, 256)


def test_no_code_decodes_to_nan() -> None:
    rows = torch.zeros(3, dtype=torch.int16)
    for code in (-32767, 32767):
        codes = torch.tensor([0, code, 1], dtype=torch.int16)
        assert torch.equal(read_codes(encode_codes(codes, rows), rows), codes)
    payload = encode_codes(torch.tensor([0, -32768, 1], dtype=torch.int16), rows)
    with pytest.raises(WireFormatError, match="a code of -32768, which no number has"):
        read_codes(payload, rows)


def test_requests() -> None:
    planes = ((Plane(3, 512), Plane(1, 8)),)
    wanted = [Wanted(0, 0, 1, BLOCK, 0), Wanted(0, 1, 0, 512, 128)]
    found = read_request(write_request(wanted, planes), LAYOUT, planes, BLOCK)
    assert [each.is_whole for each in found] == [True, False]
    assert found[1] == wanted[1]
    with pytest.raises(WireFormatError, match="behind"):
        read_request(write_request([*wanted, *wanted], planes), LAYOUT, planes, BLOCK)
    for body in (b"\x01", b"\x00\x02", b"\x00\x01\x03", b"\x00\x01\x00\x00\x00"):
        with pytest.raises(WireFormatError):
            read_request(body, LAYOUT, planes, BLOCK)


@pytest.mark.parametrize("is_modulo", [False, True])
def test_planes_grow_with_what_is_unknown(is_modulo: bool) -> None:
    bits = []
    for sigma in (0.05, 0.2, 0.5, 1.0, 4.0):
        planes = plan.planes_for(sigma, BLOCK, 0.0, is_modulo=is_modulo)
        bits.append(plan.bits_of(planes, BLOCK))
    assert bits == sorted(bits)
    assert bits[0] < 1.1
    assert bits[-1] > 4.0
