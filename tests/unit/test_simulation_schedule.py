"""Who trains on which model, what is aggregated when, and what it counts."""

import collections
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from commrt.errors import ConfigError, StateError
from commrt.simulation import aggregation, schedule
from commrt.simulation.aggregation import make_schedule
from commrt.simulation.policies import (
    POLICIES,
    FedAsync,
    FedAvg,
    FedBuff,
    FedFix,
    Policy,
    Staleness,
)
from commrt.simulation.schedule import Schedule
from commrt.simulation.steps import Aggregate, Lost, Start, Step, Update
from commrt.simulation.traces import TraceConfig, Traces

EVERY_POLICY = [
    FedAvg(cohort=8, over_selection=1.5, deadline_s=6.0, least=3),
    FedAvg(cohort=5, sampling="weighted"),
    FedAsync(concurrency=7, staleness="hinge:a=2,b=3"),
    FedBuff(buffer=4, concurrency=9),
    FedFix(interval_s=2.5),
]
every_policy = pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda p: type(p).__name__)

# Everything that can go wrong does.
ROUGH = TraceConfig(
    compute_s=0.02,
    compute_sigma=0.8,
    jitter=0.3,
    up_bytes_per_s=1e3,
    down_bytes_per_s=1e4,
    link_sigma=0.5,
    latency_s=0.1,
    straggler_share=0.2,
    straggler_factor=4,
    dropout=0.15,
    rejoin_s=3.0,
    on_s=40,
    off_s=15,
)


def rough(policy: Policy, *, num_clients: int = 30, aggregations: int = 40, **options: Any) -> Any:
    traces = Traces(options.pop("traces", ROUGH), num_clients, options.get("seed", 0))
    examples = [50.0 + client for client in range(num_clients)]
    return make_schedule(
        policy, traces, examples=examples, down_bytes=1000, aggregations=aggregations, **options
    )


def timed(
    tmp_path: Path, policy: Policy, seconds: Sequence[float], *, aggregations: int, **options: Any
) -> Schedule:
    """Clients that always take so long, all of it computing; a byte up takes a second."""
    path = tmp_path / "traces.csv"
    lines = "".join(f"{client},{value}\n" for client, value in enumerate(seconds))
    path.write_text("client,compute_s\n" + lines)
    traces = Traces(TraceConfig(file=path, up_bytes_per_s=1), len(seconds), 0)
    examples = [1.0] * len(seconds)
    return make_schedule(
        policy, traces, examples=examples, down_bytes=0, aggregations=aggregations, **options
    )


def size_of(client: int) -> int:
    return 100 + 37 * client % 900


def run(plan: Schedule, size: Callable[[int], int] = size_of) -> list[Step]:
    steps: list[Step] = []
    while step := plan.next():
        steps.append(step)
        if isinstance(step, Start):
            for client in step.clients:
                plan.sent(client, size(client))
    return steps


def aggregates(steps: Sequence[Step]) -> list[Aggregate]:
    return [step for step in steps if isinstance(step, Aggregate)]


def weights(step: Aggregate) -> dict[int, float]:
    return {update.client: update.weight for update in step.updates}


class Runner:
    """Carries a schedule out and keeps only what it says is alive."""

    def __init__(self) -> None:
        self.models = {0}
        self.held: dict[int, int] = {}
        self.newest = 0

    def take(self, step: Step) -> None:
        if isinstance(step, Start):
            assert step.version in self.models
            assert list(step.clients) == sorted(set(step.clients))
            assert not self.held.keys() & set(step.clients)
            self.held |= dict.fromkeys(step.clients, step.version)
        elif isinstance(step, Lost):
            for client in step.clients:
                self.held.pop(client, None)
        else:
            self._aggregate(step)

    def keep(self, alive: Sequence[int]) -> None:
        assert set(alive) <= self.models
        self.models = set(alive)

    def _aggregate(self, step: Aggregate) -> None:
        assert step.version == self.newest + 1
        assert self.newest in self.models
        self.newest = step.version
        self.models.add(step.version)
        assert step.updates
        for update in step.updates:
            assert self.held.pop(update.client) == update.version
            assert update.version in self.models or not step.mixes


@every_policy
def test_work_is_aggregated_or_lost_and_never_both(policy: Policy) -> None:
    plan, runner = rough(policy), Runner()
    now_s = 0.0
    trained = 0
    while step := plan.next():
        runner.take(step)
        if isinstance(step, Start):
            trained += len(step.clients)
            for client in step.clients:
                plan.sent(client, size_of(client))
        else:
            assert step.at_s >= now_s
            now_s = step.at_s
        runner.keep(plan.alive)
        assert plan.version == runner.newest
    assert plan.ended == "aggregations"
    assert runner.newest == plan.version == 40
    assert trained > 40
    if not isinstance(policy, FedAvg):
        assert set(runner.held) <= set(plan.at_work)


@every_policy
def test_resumed_anywhere_it_goes_on_as_if_nothing_had_been(policy: Policy) -> None:
    reference = run(rough(policy, aggregations=12))
    for stop in range(0, len(reference), 7):
        plan = rough(policy, aggregations=12)
        for number in range(stop):
            step = plan.next()
            assert step == reference[number]
            if isinstance(step, Start):
                for client in step.clients:
                    plan.sent(client, size_of(client))
        state, alive = json.loads(json.dumps(plan.state_dict())), plan.alive
        plan = rough(policy, aggregations=12)
        plan.load_state_dict(state)
        assert plan.alive == alive
        assert run(plan) == reference[stop:]


@every_policy
def test_resumed_between_two_clients_of_a_start(policy: Policy) -> None:
    reference = run(rough(policy, aggregations=5))
    plan = rough(policy, aggregations=5)
    first = plan.next()
    assert isinstance(first, Start)
    assert len(first.clients) > 1
    plan.sent(first.clients[-1], size_of(first.clients[-1]))
    state = json.loads(json.dumps(plan.state_dict()))
    plan = rough(policy, aggregations=5)
    plan.load_state_dict(state)
    with pytest.raises(StateError, match="call sent"):
        plan.next()
    for client in first.clients[:-1]:
        plan.sent(client, size_of(client))
    assert run(plan) == reference[1:]


@every_policy
def test_a_run_that_has_ended_can_be_prolonged(policy: Policy) -> None:
    by_number = rough(policy, aggregations=6)
    steps = run(by_number)
    by_time = rough(policy, aggregations=15, until_s=by_number.now_s + 2.6)
    by_time.load_state_dict(by_number.state_dict())
    steps += run(by_time)
    assert (by_number.ended, by_time.ended) == ("aggregations", "time")
    long = rough(policy, aggregations=15)
    long.load_state_dict(by_time.state_dict())
    assert steps + run(long) == run(rough(policy, aggregations=15))


@every_policy
def test_the_seed_decides_and_the_order_of_reports_does_not(policy: Policy) -> None:
    plan = rough(policy)
    steps = []
    while step := plan.next():
        steps.append(step)
        if isinstance(step, Start):
            for client in reversed(step.clients):
                plan.sent(client, size_of(client))
    assert steps == run(rough(policy))
    assert steps != run(rough(policy, seed=1))


@every_policy
def test_larger_payloads_take_longer(policy: Policy) -> None:
    fast, slow = rough(policy), rough(policy)
    small, large = run(fast, lambda client: 10), run(slow, lambda client: 4000)
    if isinstance(policy, FedFix):
        assert sum(len(a.updates) for a in aggregates(large)) < sum(
            len(a.updates) for a in aggregates(small)
        )
    else:
        assert slow.now_s > fast.now_s


# FedAvg


def test_fedavg_weights_are_the_importance_of_what_arrived(tmp_path: Path) -> None:
    policy = FedAvg(cohort=4, deadline_s=10)
    importance = [1.0, 2.0, 5.0, 8.0]
    plan = timed(tmp_path, policy, [1, 2, 3, 11], aggregations=1, importance=importance)
    steps = run(plan, lambda client: 1)
    assert steps == [
        # The last could not have sent anything in time, so it need not train.
        Start(0, (0, 1, 2), 0, 0.0),
        Lost((3,), "late", 10.0),
        Aggregate(1, (Update(0, 0, 1 / 8), Update(1, 0, 2 / 8), Update(2, 0, 5 / 8)), 10.0, False),
    ]


def test_fedavg_waits_for_all_without_a_deadline(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedAvg(cohort=3), [1, 2, 50], aggregations=2)
    steps = run(plan, lambda client: 1)
    assert [step.at_s for step in aggregates(steps)] == [51.0, 102.0]
    assert not [step for step in steps if isinstance(step, Lost)]


def test_who_arrives_at_the_deadline_is_in_time_and_after_it_is_not(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedAvg(cohort=2, deadline_s=8), [4, 4], aggregations=1)
    _, lost, made = run(plan, {0: 5, 1: 4}.__getitem__)
    assert lost == Lost((0,), "late", 8.0)
    assert isinstance(made, Aggregate)
    assert weights(made) == {1: 1.0}


def test_over_selection_keeps_the_first_to_arrive(tmp_path: Path) -> None:
    policy = FedAvg(cohort=2, over_selection=1.5)
    plan = timed(tmp_path, policy, [9, 1, 4], aggregations=2)
    steps = run(plan, lambda client: 1)
    assert policy.asked == 3
    assert steps[0] == Start(0, (0, 1, 2), 0, 0.0)
    assert [(set(weights(a)), a.at_s) for a in aggregates(steps)] == [({1, 2}, 5), ({1, 2}, 10)]
    assert steps[1] == Lost((0,), "late", 5.0)


def test_of_more_than_there_are_all_are_asked(tmp_path: Path) -> None:
    policy = FedAvg(cohort=2, over_selection=1e6)
    plan = timed(tmp_path, policy, [1, 2, 3], aggregations=1)
    assert run(plan)[0] == Start(0, (0, 1, 2), 0, 0.0)
    assert [FedAvg(cohort=100, over_selection=f).asked for f in (1.1, 1.101, 1.105)] == [
        *(110, 111, 111)
    ]


def test_a_round_with_too_few_is_given_up_and_another_drawn(tmp_path: Path) -> None:
    # Two of five are too slow: the round is good if neither is drawn.
    policy = FedAvg(cohort=3, least=3, deadline_s=5)
    plan = timed(tmp_path, policy, [1, 1, 1, 90, 90], aggregations=3)
    steps = run(plan, lambda client: 1)
    reasons = collections.Counter(step.reason for step in steps if isinstance(step, Lost))
    assert reasons["late"] == reasons["too few"] > 0
    assert [set(weights(step)) for step in aggregates(steps)] == [{0, 1, 2}] * 3
    starts = [step.index for step in steps if isinstance(step, Start)]
    assert starts == list(range(len(starts)))
    assert len(starts) == 3 + reasons["late"]


def test_rounds_that_can_never_succeed_end_in_an_error(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedAvg(cohort=2, least=2, deadline_s=5), [1.0, 9.0, 9.0], aggregations=1)
    with pytest.raises(StateError, match=r"least=2, with deadline_s=5"):
        run(plan, lambda client: 1)
    assert plan.now_s == 5.0 * aggregation.MOST_FAILED_ROUNDS


def test_failed_rounds_count_only_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation, "MOST_FAILED_ROUNDS", 40)
    policy = FedAvg(cohort=2, least=2, deadline_s=5)
    plan = timed(tmp_path, policy, [1, 1, 90], aggregations=60)
    steps = run(plan, lambda client: 1)
    assert sum(isinstance(step, Start) for step in steps) > 60 + 40


def test_a_round_begins_when_enough_are_there(tmp_path: Path) -> None:
    path = tmp_path / "windows.csv"
    path.write_text("client,on_s,off_s\n0,0,50\n1,10,50\n2,20,50\n3,30,50\n")
    traces = Traces(TraceConfig(file=path, compute_s=1), 4, 0)
    plan = make_schedule(
        FedAvg(cohort=4, least=3), traces, examples=[1.0] * 4, down_bytes=0, aggregations=1
    )
    steps = run(plan)
    assert steps[0] == Start(0, (0, 1, 2), 0, 20.0)
    assert steps[1].at_s == 21.0


@pytest.mark.parametrize("sampling", ["uniform", "weighted"])
def test_cohorts_are_drawn_as_said(sampling: str) -> None:
    importance = [1.0, 1.0, 2.0, 4.0]
    policy = FedAvg(cohort=1, sampling=sampling)
    traces = TraceConfig(compute_s=1)
    plan = rough(policy, num_clients=4, aggregations=3000, traces=traces, importance=importance)
    drawn = collections.Counter(a.updates[0].client for a in aggregates(run(plan)))
    expected = [share / 8 for share in importance] if sampling == "weighted" else [0.25] * 4
    assert [drawn[client] / 3000 for client in range(4)] == pytest.approx(expected, abs=0.03)


def test_no_client_is_twice_in_a_cohort_and_weighted_ones_count_the_same() -> None:
    policy = FedAvg(cohort=5, sampling="weighted")
    importance = [1.0] * 5 + [1000.0]
    plan = rough(
        policy, num_clients=6, aggregations=20, traces=TraceConfig(), importance=importance
    )
    for made in aggregates(run(plan)):
        assert set(weights(made).values()) == {0.2}
        assert len(weights(made)) == 5


# FedAsync and FedBuff


def test_staleness_as_published() -> None:
    constant, polynomial, hinge = map(
        Staleness.parse, ("constant", "polynomial:a=0.5", "hinge:a=10,b=4")
    )
    assert [constant(tau) for tau in (0, 9)] == [1, 1]
    assert [polynomial(tau) for tau in (0, 3, 8)] == [1, 1 / 2, 1 / 3]
    assert Staleness.parse("polynomial:a=2")(3) == 1 / 16
    assert [hinge(tau) for tau in (0, 4, 5, 14)] == [1, 1, 1 / 11, 1 / 101]


def test_fedasync_mixes_every_arrival_by_its_staleness(tmp_path: Path) -> None:
    policy = FedAsync(concurrency=2, alpha=0.5, staleness="polynomial:a=0.5")
    plan = timed(tmp_path, policy, [1, 3], aggregations=6)
    made = aggregates(run(plan, lambda client: 0))
    assert all(step.mixes for step in made)
    assert [(*step.updates[0], step.at_s) for step in made] == [
        (0, 0, 0.5, 1.0),
        (0, 1, 0.5, 2.0),
        (0, 2, 0.5, 3.0),
        (1, 0, 0.25, 3.0),  # three came between: 0.5 / sqrt(1 + 3)
        # Both began at 3 s, one before that aggregation and one after it.
        (0, 3, 0.5 / math.sqrt(2), 4.0),
        (0, 5, 0.5, 5.0),
    ]


def test_fedasync_keeps_the_models_it_mixes_from(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedAsync(concurrency=2), [1, 3], aggregations=3)
    first = plan.next()
    assert isinstance(first, Start)
    for client in first.clients:
        plan.sent(client, 0)
    assert plan.alive == (0,)
    assert isinstance(plan.next(), Aggregate)
    assert plan.alive == (0, 1)


def test_fedbuff_counts_by_staleness_and_buffer(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedBuff(buffer=2, concurrency=3), [2, 3, 7], aggregations=3)
    made = aggregates(run(plan, lambda client: 0))
    assert not any(step.mixes for step in made)
    assert [(step.updates, step.at_s) for step in made] == [
        # Whoever is in the buffer waits there: client 0 from 2 s on.
        (((0, 0, 0.5), (1, 0, 0.5)), 3.0),
        # Clients 0 and 1 began again at 3 s.
        (((0, 1, 0.5), (1, 1, 0.5)), 6.0),
        # Two aggregations came while client 2 was at work: 1 / (2 sqrt(1 + 2)).
        (((0, 2, 0.5), (2, 0, 1 / (2 * math.sqrt(1 + 2)))), 8.0),
    ]


def test_fedbuff_keeps_as_many_at_work_as_said() -> None:
    policy = FedBuff(buffer=10, concurrency=25)
    plan = rough(policy, num_clients=60, traces=TraceConfig(compute_sigma=1, dropout=0.2))
    while step := plan.next():
        if isinstance(step, Start):
            for client in step.clients:
                plan.sent(client, 1)
        assert len(plan.at_work) == 25


def test_fedbuff_keeps_a_model_only_while_somebody_trains_from_it(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedBuff(buffer=1, concurrency=2), [1, 3], aggregations=3)
    first = plan.next()
    assert isinstance(first, Start)
    plan.sent(0, 0)
    assert plan.alive == (0,)
    plan.sent(1, 0)
    assert isinstance(plan.next(), Aggregate)
    # Client 1 is still on its way, but has its update.
    assert plan.alive == (1,)


def test_many_train_together() -> None:
    policy = FedBuff(buffer=10, concurrency=25)
    plan = rough(policy, num_clients=60, traces=TraceConfig(compute_sigma=0.3, jitter=0.2))
    steps = run(plan)
    starts = [step for step in steps if isinstance(step, Start)]
    assert len(starts[0].clients) == 25
    assert sum(len(step.clients) for step in starts) / len(starts) > 5


# FedFix


def test_fedfix_counts_the_intervals_since_the_last_time(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedFix(interval_s=1), [0.5, 1.0, 2.5], aggregations=6)
    made = aggregates(run(plan, lambda client: 0))
    third = 1 / 3
    assert [step.at_s for step in made] == [1, 2, 3, 4, 5, 6]
    both, all_of_them = {0: third, 1: third}, {0: third, 1: third, 2: 3 * third}
    expected = [both, both, all_of_them, both, both, all_of_them]
    assert list(map(weights, made)) == expected
    assert [u.version for u in made[5].updates] == [5, 5, 3]


def test_fedfix_counts_no_more_intervals_than_it_is_told(tmp_path: Path) -> None:
    policy = FedFix(interval_s=1, most_gap=2)
    plan = timed(tmp_path, policy, [0.5, 3.5, 1.5], aggregations=4)
    made = aggregates(run(plan, lambda client: 0))
    third = 1 / 3
    assert weights(made[1]) == {0: third, 2: 2 * third}
    assert weights(made[3]) == {0: third, 1: 2 * third, 2: 2 * third}


def test_fedfix_with_a_long_interval_is_fedavg_of_all(tmp_path: Path) -> None:
    fix = timed(tmp_path, FedFix(interval_s=8), [1, 2, 7], aggregations=4, importance=[1, 2, 5])
    avg = timed(tmp_path, FedAvg(cohort=3), [1, 2, 7], aggregations=4, importance=[1, 2, 5])
    fixed, averaged = (aggregates(run(plan, lambda client: 1)) for plan in (fix, avg))
    assert fixed == averaged


def test_an_interval_in_which_nothing_came_has_no_aggregation(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedFix(interval_s=1), [2.5], aggregations=2)
    made = aggregates(run(plan, lambda client: 0))
    assert [(step.version, step.at_s, weights(step)) for step in made] == [
        (1, 3.0, {0: 3.0}),
        (2, 6.0, {0: 3.0}),
    ]


def test_fedfix_is_unbiased_however_clients_come_and_go() -> None:
    num_clients, intervals = 20, 4000
    importance = [1.0 + client % 4 for client in range(num_clients)]
    policy = FedFix(interval_s=1.5)
    plan = rough(
        policy,
        num_clients=num_clients,
        aggregations=10**9,
        until_s=1.5 * intervals,
        importance=importance,
    )
    sums = dict.fromkeys(range(num_clients), 0.0)
    times = dict.fromkeys(range(num_clients), 0)
    for step in aggregates(run(plan)):
        for update in step.updates:
            sums[update.client] += update.weight
            times[update.client] += 1
    for client, share in enumerate(importance):
        expected = share / sum(importance)
        assert sums[client] / intervals == pytest.approx(expected, rel=0.03)
    # Which is not for want of differences: some take part far more often than others.
    assert max(times.values()) > 3 * min(times.values())


def trajectory(policy: Policy, until_s: float) -> list[tuple[float, float]]:
    """Times and models: clients each pull towards their number, and stragglers to another side."""
    num_clients = 50
    config = TraceConfig(compute_s=1, jitter=0.2, straggler_share=0.2, straggler_factor=10)
    traces = Traces(config, num_clients, 0)
    is_slow = [traces.finish(client, 0.0, 1, 0, 0, 0).computed_s > 4 for client in range(50)]
    plan = make_schedule(
        policy,
        traces,
        examples=[1.0] * num_clients,
        down_bytes=0,
        aggregations=10**9,
        until_s=until_s,
    )
    models, updates, history = {0: -10.0}, {}, []
    while step := plan.next():
        if isinstance(step, Start):
            for client in step.clients:
                updates[client] = 0.4 * (5.0 * is_slow[client] - models[step.version])
                plan.sent(client, 1)
        elif isinstance(step, Aggregate):
            old = models[step.version - 1]
            parts = [u.weight * updates.pop(u.client) for u in step.updates]
            models[step.version] = old + sum(parts)
            history.append((step.at_s, models[step.version]))
        models = {version: models[version] for version in plan.alive}
    return history


def test_fedfix_finds_the_optimum_of_all_sooner_than_fedavg() -> None:
    policies = FedAvg(cohort=50), FedFix(interval_s=2), FedBuff(buffer=10, concurrency=40)
    fedavg, fedfix, fedbuff = (trajectory(policy, 300.0) for policy in policies)
    ends = [statistics.fmean(w for t, w in run if t > 150) for run in (fedavg, fedfix, fedbuff)]
    # A fifth of them want 5, the others 0. With FedBuff those count that are fast.
    assert ends[:2] == pytest.approx([1.0, 1.0], abs=0.05)
    assert ends[2] < 0.5
    reached = [next(t for t, w in run if abs(w - 1) < 1) for run in (fedavg, fedfix)]
    assert reached[1] < reached[0] / 2


# Coming, going, and the end


def test_a_client_that_drops_out_comes_back_after_a_while() -> None:
    config = TraceConfig(compute_s=1, dropout=0.5, rejoin_s=100)
    plan = rough(FedBuff(buffer=1, concurrency=1), num_clients=1, aggregations=20, traces=config)
    lost_s = None
    returns = 0
    for step in run(plan):
        if isinstance(step, Lost):
            assert step.reason == "dropout"
            lost_s = step.at_s
        elif isinstance(step, Start) and lost_s is not None:
            assert step.at_s == lost_s + 100
            returns += 1
            lost_s = None
    assert returns > 3


def test_who_has_nothing_to_send_is_lost_and_begins_again(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedBuff(buffer=1, concurrency=1), [2], aggregations=1)
    assert plan.next() == Start(0, (0,), 0, 0.0)
    plan.failed(0)
    assert plan.next() == Lost((0,), "failed", 2.0)
    assert plan.next() == Start(1, (0,), 0, 2.0)


def test_it_ends_in_time(tmp_path: Path) -> None:
    plan = timed(tmp_path, FedFix(interval_s=1), [0.5, 9], aggregations=100, until_s=3.25)
    steps = run(plan, lambda client: 0)
    assert plan.ended == "time"
    assert [step.at_s for step in aggregates(steps)] == [1, 2, 3]


@pytest.mark.parametrize(
    "policy", [FedAvg(cohort=2), FedBuff(buffer=2, concurrency=2), FedFix(interval_s=1)]
)
def test_it_ends_when_nobody_will_ever_come(tmp_path: Path, policy: Policy) -> None:
    path = tmp_path / "windows.csv"
    path.write_text("client,on_s,off_s\n0,0,5.5\n1,0,3.5\n")
    traces = Traces(TraceConfig(file=path, compute_s=1), 2, 0)
    plan = make_schedule(policy, traces, examples=[1.0] * 2, down_bytes=0, aggregations=99)
    steps = run(plan)
    assert plan.ended == "clients"
    assert aggregates(steps)
    assert {step.reason for step in steps if isinstance(step, Lost)} == {"offline"}


def test_settings_that_lead_nowhere_end_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MOST_EVENTS", 2000)
    config = TraceConfig(compute_s=1e6, on_s=5, off_s=5)
    with pytest.raises(StateError, match="without an aggregation"):
        run(rough(FedFix(interval_s=1), traces=config))


def test_a_training_that_diverges_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounds nothing else would end it; not where some clients fail, however often."""
    monkeypatch.setattr(schedule, "MOST_FAILED", 40)
    plan = rough(FedBuff(buffer=5, concurrency=10))

    def carry_out(until: int, failing: Callable[[int], bool]) -> None:
        while plan.version < until and (step := plan.next()):
            for client in step.clients if isinstance(step, Start) else ():
                plan.failed(client) if failing(client) else plan.sent(client, 9)

    carry_out(30, lambda client: bool(client % 2))
    with pytest.raises(StateError, match=r"40 updates .* training diverges"):
        carry_out(40, lambda _: True)


def test_thousands_of_clients() -> None:
    policy = FedBuff(buffer=200, concurrency=2000)
    plan = rough(policy, num_clients=5000, aggregations=40)
    runner = Runner()
    while step := plan.next():
        runner.take(step)
        if isinstance(step, Start):
            for client in step.clients:
                plan.sent(client, 100)
        runner.keep(plan.alive)
        assert plan.version == runner.newest
    assert runner.newest == 40


# Mistakes


def test_calls_out_of_turn_are_refused() -> None:
    plan = rough(FedAvg(cohort=3))
    with pytest.raises(StateError, match="client 0 is not among"):
        plan.sent(0, 1)
    first = plan.next()
    with pytest.raises(StateError, match="have started: call sent"):
        plan.next()
    plan.sent(first.clients[0], 1)
    with pytest.raises(StateError, match="is not among"):
        plan.sent(first.clients[0], 1)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: rough(FedAvg(cohort=4)), "settings of the state is .*cohort=3"),
        (lambda: rough(FedAvg(cohort=3), num_clients=29), "num_clients"),
        (lambda: rough(FedAvg(cohort=3), seed=1), "seed"),
    ],
)
def test_a_state_of_another_run_is_refused(other: Callable[[], Schedule], says: str) -> None:
    state = rough(FedAvg(cohort=3)).state_dict()
    with pytest.raises(StateError, match=says):
        other().load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fedavg", {"cohort": 0}, "cohort is 0"),
        ("fedavg", {"cohort": 3, "over_selection": 0.9}, "over_selection is 0.9"),
        ("fedavg", {"cohort": 3, "over_selection": 1e300}, "over_selection is 1e[+]300"),
        ("fedavg", {"cohort": 3, "deadline_s": 0.0}, "deadline_s is 0.0"),
        ("fedavg", {"cohort": 3, "least": 4}, "least is 4: it must be from 1 to 3"),
        ("fedavg", {"cohort": 3, "sampling": "best"}, "sampling is best"),
        ("fedasync", {"concurrency": 0}, "concurrency is 0"),
        ("fedasync", {"concurrency": 1, "alpha": 1.5}, "alpha is 1.5"),
        ("fedasync", {"concurrency": 1, "staleness": "old"}, "staleness is 'old'"),
        ("fedbuff", {"buffer": 0, "concurrency": 1}, "buffer is 0"),
        ("fedbuff", {"buffer": 1, "concurrency": 1, "staleness": "hinge:a=0"}, "a must be"),
        ("fedbuff", {"buffer": 1, "concurrency": 1, "staleness": "constant:a=1"}, "constant:a=1"),
        ("fedfix", {"interval_s": math.inf}, "interval_s is inf"),
        ("fedfix", {"interval_s": 1.0, "most_gap": 0}, "most_gap is 0"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        POLICIES[name](**options)


@pytest.mark.parametrize(
    ("policy", "options", "says"),
    [
        (FedAvg(cohort=31), {}, "cohort is 31: .* number of clients, 30"),
        (FedBuff(buffer=31, concurrency=1), {}, "buffer is 31"),
        (FedAsync(concurrency=31), {}, "concurrency is 31"),
        (FedFix(interval_s=1), {"importance": [1.0]}, "importance has 1 values"),
        (FedFix(interval_s=1), {"importance": [1.0] * 29 + [0.0]}, "importance of client 29 is 0"),
        (FedFix(interval_s=1), {"aggregations": 0}, "aggregations 0"),
        (FedFix(interval_s=1), {"until_s": 0.0}, "until_s 0.0"),
        (FedBuff(buffer=1, concurrency=1), {"importance": [1.0] * 30}, "counts all clients the"),
    ],
)
def test_what_does_not_fit_the_clients_is_refused(
    policy: Policy, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        rough(policy, **options)
