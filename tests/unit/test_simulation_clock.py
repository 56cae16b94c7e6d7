"""Virtual time, and how fast and how often there simulated clients are."""

import json
import math
import statistics
from pathlib import Path

import pytest

from commrt.errors import ConfigError
from commrt.simulation.clock import Clock, Event
from commrt.simulation.traces import ALWAYS, NEVER, TraceConfig, Traces


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "traces.csv"
    path.write_text(text)
    return path


def test_events_come_in_order_of_time_then_client() -> None:
    clock = Clock()
    for at_s, client in ((2.0, 1), (1.0, 5), (1.0, 3), (0.5, 9)):
        clock.add(Event(at_s, client, "arrival", 0))
    order = [clock.pop()[:2] for _ in range(4)]
    assert order == [(0.5, 9), (1.0, 3), (1.0, 5), (2.0, 1)]
    assert clock.now_s == 2.0
    assert clock.next_s == math.inf


@pytest.mark.parametrize("at_s", [0.5, math.inf, math.nan])
def test_nothing_happens_before_now_or_never(at_s: float) -> None:
    clock = Clock()
    clock.add(Event(1.0, 0, "arrival", 0))
    clock.pop()
    with pytest.raises(ConfigError, match=r"must be finite and not before 1\.0 s"):
        clock.add(Event(at_s, 0, "arrival", 0))


def test_clock_goes_on_from_json() -> None:
    clock, other = Clock(), Clock()
    for client in (4, 2, 8, 1):
        clock.add(Event(1.0 / client, client, "arrival", client))
    clock.pop()
    other.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    assert other.now_s == clock.now_s
    assert [other.pop() for _ in range(3)] == [clock.pop() for _ in range(3)]


def test_times_of_a_piece_of_work() -> None:
    config = TraceConfig(
        compute_s=0.5, up_bytes_per_s=100, down_bytes_per_s=1000, latency_s=0.25, on_s=1e9
    )
    finish = Traces(config, 3, 0).finish(1, 10.0, 8, 500, 200, 0)
    assert finish == (10.75, 14.75, 17.0, math.inf, None, None)


def test_unlimited_links_and_instant_training_take_no_time() -> None:
    finish = Traces(TraceConfig(compute_s=0), 1, 0).finish(0, 3.0, 100, 10**9, 10**9, 0)
    assert finish[:3] == (3.0, 3.0, 3.0)


def test_clients_are_the_same_however_many_and_in_whatever_order() -> None:
    config = TraceConfig(
        compute_sigma=1, link_sigma=1, up_bytes_per_s=1e5, jitter=0.5, dropout=0.5, on_s=9, off_s=4
    )
    few, many = Traces(config, 5, 7), Traces(config, 50, 7)

    def answers(traces: Traces, clients: list[int]) -> dict[int, object]:
        found: dict[int, object] = {}
        for client in clients:
            # Asked late first: windows must not depend on it.
            late, early = traces.window(client, 500.0), traces.window(client, 0.0)
            found[client] = late, early, traces.finish(client, early[0], 10, 10, 10, 3)
        return found

    assert answers(few, [0, 1, 2, 3, 4]) == answers(many, [4, 2, 0, 3, 1])
    assert answers(Traces(config, 5, 8), [0]) != answers(few, [0])


def test_speeds_are_log_normal_around_the_median() -> None:
    traces = Traces(TraceConfig(compute_s=2.0, compute_sigma=0.5), 2000, 1)
    logs = [math.log(traces.finish(c, 0.0, 1, 0, 0, 0).computed_s / 2.0) for c in range(2000)]
    assert statistics.fmean(logs) == pytest.approx(0, abs=0.04)
    assert statistics.stdev(logs) == pytest.approx(0.5, abs=0.03)


def test_jitter_varies_from_round_to_round_and_not_without() -> None:
    def times(jitter: float) -> set[float]:
        traces = Traces(TraceConfig(jitter=jitter), 1, 0)
        return {traces.finish(0, 0.0, 1, 0, 0, index).computed_s for index in range(20)}

    assert len(times(0.0)) == 1
    assert len(times(0.1)) == 20


def test_a_share_of_the_clients_are_stragglers() -> None:
    config = TraceConfig(compute_s=1.0, straggler_share=0.25, straggler_factor=6)
    traces = Traces(config, 40, 3)
    times = [traces.finish(c, 0.0, 1, 0, 0, 0).computed_s for c in range(40)]
    assert sorted(times) == [1.0] * 30 + [6.0] * 10
    assert times != sorted(times)


def test_dropouts_are_as_frequent_as_said_and_before_sending() -> None:
    traces = Traces(TraceConfig(dropout=0.3, latency_s=1.0), 100, 0)
    all_of_them = [traces.finish(c, 5.0, 1, 0, 0, r) for c in range(100) for r in range(50)]
    lost = [finish for finish in all_of_them if finish.lost_s is not None]
    assert len(lost) / len(all_of_them) == pytest.approx(0.3, abs=0.02)
    assert {finish.reason for finish in lost} == {"dropout"}
    parts = [(f.lost_s - 5.0) / (f.computed_s - 5.0) for f in lost if f.lost_s is not None]
    assert 0 < min(parts) < 0.01 < 0.99 < max(parts) < 1
    assert statistics.fmean(parts) == pytest.approx(0.5, abs=0.03)


def test_what_is_lost_does_not_depend_on_the_bytes_sent() -> None:
    traces = Traces(TraceConfig(dropout=0.5, up_bytes_per_s=10), 1, 0)
    for index in range(20):
        short, long = (traces.finish(0, 0.0, 9, 0, size, index) for size in (0, 10**6))
        assert short[3:] == long[3:]
        assert traces.resize(0, short, 10**6) == long


def test_drawn_windows_have_the_mean_lengths() -> None:
    traces = Traces(TraceConfig(on_s=30, off_s=10), 200, 0)
    present = sum(traces.window(c, t)[0] <= t for c in range(200) for t in range(0, 1000, 50))
    assert present / 4000 == pytest.approx(0.75, abs=0.04)
    lengths, gaps = [], []
    for client in range(200):
        on_s, off_s = traces.window(client, 100.0)
        after = traces.window(client, off_s)
        assert on_s < off_s < after[0] < after[1]
        lengths.append(after[1] - after[0])
        gaps.append(after[0] - off_s)
    assert statistics.fmean(lengths) == pytest.approx(30, rel=0.2)
    assert statistics.fmean(gaps) == pytest.approx(10, rel=0.2)


def test_work_is_lost_when_the_window_closes(tmp_path: Path) -> None:
    path = write(tmp_path, "client,compute_s,up_bytes_per_s,on_s,off_s\n0,1.0,10,5,20\n")
    traces = Traces(TraceConfig(file=path), 1, 0)
    assert traces.finish(0, 5.0, 10, 0, 50, 0).lost_s is None  # arrives as it closes
    finish = traces.finish(0, 5.0, 10, 0, 51, 0)
    assert traces.resize(0, traces.finish(0, 5.0, 10, 0, 0, 0), 51) == finish
    assert (finish.lost_s, finish.reason) == (20.0, "offline")
    for absent_s in (4.0, 20.0):
        with pytest.raises(ConfigError, match="not there"):
            traces.finish(0, absent_s, 1, 0, 0, 0)


def test_nobody_drops_out_who_is_no_longer_there(tmp_path: Path) -> None:
    path = write(tmp_path, "client,compute_s,on_s,off_s\n0,1.0,0,50\n")
    traces = Traces(TraceConfig(file=path, dropout=0.999), 1, 0)
    lost = [traces.finish(0, 0.0, 100, 0, 0, index) for index in range(100)]
    reasons = {finish.reason for finish in lost}
    assert reasons == {"dropout", "offline"}
    assert all(f.lost_s == 50 if f.reason == "offline" else f.lost_s < 50 for f in lost)


@pytest.mark.parametrize("mark", ["", "\ufeff"])  # of spreadsheets
def test_file_takes_the_place_of_what_is_drawn(mark: str, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"{mark}client,compute_s,down_bytes_per_s,latency_s,on_s,off_s\n"
        "1,2.0,,,0,10\n1,,,,10,30\n1,,,,50,inf\n0,,100,0.5,,\n9,,,,,\n",
    )
    traces = Traces(TraceConfig(file=path, compute_s=4.0), 2, 0)
    assert traces.finish(0, 0.0, 1, 100, 0, 0)[:3] == (1.5, 5.5, 6.0)
    assert traces.finish(1, 0.0, 1, 100, 0, 0)[:3] == (0.0, 2.0, 2.0)
    assert traces.window(0, 7.0) == ALWAYS
    assert [traces.window(1, t) for t in (0.0, 29.0, 30.0)] == [(0, 30), (0, 30), (50, math.inf)]


def test_windows_of_a_file_begin_again(tmp_path: Path) -> None:
    text = "client,on_s,off_s\n0,22,30\n0,10,12\n1,0,24\n2,0,4\n2,20,24\n"
    traces = Traces(TraceConfig(file=write(tmp_path, text), file_period_s=24), 3, 0)
    assert traces.window(0, 1.0) == (-2, 6)  # from the day before
    assert traces.window(0, 48 + 7.0) == (48 + 10, 48 + 12)
    assert traces.window(0, 48 + 23.0) == (48 + 22, 48 + 30)
    assert traces.window(1, 1e6) == ALWAYS
    assert traces.window(2, 0.0) == (-4, 4)  # across midnight it is one
    assert traces.window(2, 9.0) == (20, 28)


def test_without_a_period_a_client_goes_for_good(tmp_path: Path) -> None:
    path = write(tmp_path, "client,on_s,off_s\n0,1,2\n")
    assert Traces(TraceConfig(file=path), 1, 0).window(0, 2.0) == NEVER


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("client,speed\n0,1\n", "has columns client, speed"),
        ("compute_s\n1\n", "client among them"),
        ("client,compute_s\n0,fast\n", "line 2: compute_s is 'fast': not a number"),
        ("client,compute_s\n0,nan\n", "not a number"),
        ("client,compute_s\n0,-1\n", "at least 0"),
        ("client,up_bytes_per_s\n0,0\n", "above 0"),
        ("client,compute_s\n-1,1\n", "client is '-1'"),
        ("client,compute_s\n0,1\n0,2\n", "line 3: compute_s of client 0 again"),
        ("client,on_s,off_s\n0,5,\n", "on_s is 5.0 and off_s None"),
        ("client,on_s,off_s\n0,5,5\n", "below off_s"),
        ("client,on_s,off_s\n0,0,6\n0,5,9\n", "overlap at 5.0 s"),
        ("client,on_s,off_s\n0,30,40\n", "the period of 24 s"),
        ("client,on_s,off_s\n0,2,4\n0,20,27\n", "begins again at 26.0 s"),
        ("client,on_s,off_s\n1,2,4\n", "client 0 among them"),
        ("client,on_s\n0,1,2\n", "line 2: more fields"),
        ("", "client among them"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        Traces(TraceConfig(file=path, file_period_s=24), 1, 0)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Traces(TraceConfig(file=tmp_path / "none.csv"), 1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("compute_s", -1.0), ("compute_s", math.inf), ("jitter", math.nan), ("latency_s", -0.1)),
        *(("compute_sigma", 1000.0), ("link_sigma", 1000.0), ("jitter", 10.1)),
        *(("up_bytes_per_s", 0.0), ("down_bytes_per_s", math.nan), ("straggler_share", 1.1)),
        *(("straggler_factor", 0.5), ("dropout", 1.0), ("off_s", 5.0), ("file_period_s", 5.0)),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    # A time off without a time on, and a period without a file, are refused as well.
    with pytest.raises(ConfigError, match=f"{'on_s' if name == 'off_s' else name} is"):
        TraceConfig(**{name: value})  # type: ignore[arg-type]
