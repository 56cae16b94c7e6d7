"""The alpha-beta model: cases that can be computed by hand, and what it recommends.

How near it comes to measured step times is in bench/results: bench.cluster prints the error.
"""

import dataclasses

import pytest

from commrt.__main__ import main
from commrt.errors import ConfigError
from commrt.plan import (
    Cluster,
    CodecTimes,
    Job,
    Link,
    measure_codec,
    parse_rate,
    predict,
    recommend,
)

FREE = CodecTimes(0.0, 0.0)
CLUSTER_FIELDS = {field.name for field in dataclasses.fields(Cluster)}
SLOW = Link(bits_per_s=100e6, latency_s=0.0, message_s=0.0)


def job(**changes) -> Job:
    """A job, or one whose cluster is changed."""
    options = {"num_params": 10_000_000, "compute_s": 0.0}
    places = {"nodes": 4, "between": SLOW}
    for name, value in changes.items():
        (places if name in CLUSTER_FIELDS else options)[name] = value
    return Job(cluster=Cluster(**places), **options)


def test_fp32_takes_the_bytes_of_a_ring() -> None:
    found = predict(job(), "none", FREE)
    assert found.wire_bytes == pytest.approx(2 * 40e6 * 3 / 4)
    assert found.step_s == pytest.approx(60e6 * 8 / 100e6)


def test_loco_takes_the_bytes_of_its_payloads() -> None:
    small = 2 * 40e6 * 0.003
    found = predict(job(), "loco4", FREE)
    assert found.wire_bytes == pytest.approx((10e6 * (4.125 + 8.125) / 8 + small) * 3 / 4)
    both = predict(job(), "loco2/block2", FREE)
    assert both.wire_bytes == pytest.approx((10e6 * 2 * 2.125 / 8 + small) * 3 / 4)


def test_low_rank_takes_the_bytes_of_its_factors() -> None:
    """12 matrices of 1000 x 1000 are 12 e6 elements and 24,000 rows and columns."""
    cube = job(num_params=12_000_000, dim=1000)
    factors = 8 * 16_000 * (8.125 / 8)
    small = 2 * 48e6 * 0.003
    found = predict(cube, "lowrank8", FREE)
    assert found.wire_bytes == pytest.approx((2 * factors + small) * 3 / 4)


def test_two_levels_send_the_bytes_of_one_rank_a_node() -> None:
    two = job(ranks_per_node=8)
    flat = predict(two, "loco4", FREE).wire_bytes
    levels = predict(two, "loco4+intra=none", FREE).wire_bytes
    one = predict(job(), "loco4", FREE).wire_bytes
    assert levels == pytest.approx(one)
    assert flat > 2 * levels


def test_latency_counts_once_a_hop() -> None:
    slow = Link(bits_per_s=1e15, latency_s=0.01, message_s=0.0)
    one_bucket = job(between=slow, num_params=1000)
    assert predict(one_bucket, "none", FREE).step_s == pytest.approx(6 * 0.01)
    # all-to-all, and the ring of the gather leg
    assert predict(one_bucket, "loco4", FREE).step_s == pytest.approx((1 + 3) * 0.01)


def test_what_overlaps_does_not_count_twice() -> None:
    """Long compute hides all but the last bucket; a slow link hides all compute but the first."""
    fast = Link(bits_per_s=100e9, latency_s=0.0)
    assert predict(job(compute_s=1.0, between=fast), "none", FREE).step_s < 1.01
    slow = predict(job(compute_s=0.1), "none", FREE).step_s
    assert 4.8 + 0.04 < slow < 4.8 + 0.1


def test_codec_time_counts() -> None:
    fast = Link(bits_per_s=1e15, latency_s=0.0, message_s=0.0)
    times = CodecTimes(before=1e-9, after=2e-9)
    assert predict(job(between=fast), "loco4", times).step_s == pytest.approx(0.03, rel=0.35)


def test_it_says_when_compression_does_not_pay() -> None:
    def choose(bits_per_s: float) -> tuple[str, str]:
        link = Link(bits_per_s=bits_per_s, latency_s=1e-5)
        places = job(compute_s=0.5, between=link)
        times = CodecTimes(1e-9, 1e-9)
        found = [predict(places, "none", FREE), predict(places, "loco4", times)]
        best, reason = recommend(found)
        return best.method, reason

    assert choose(400e9)[0] == "none"
    assert "does not pay" in choose(400e9)[1]
    assert choose(100e6)[0] == "loco4"
    assert "times faster" in choose(100e6)[1]


def test_ten_thousand_nodes_are_counted_quickly() -> None:
    link = Link(bits_per_s=400e9, latency_s=1e-5)
    many = job(nodes=10_000, ranks_per_node=8, num_params=70_000_000_000, between=link)
    assert predict(many, "loco4+intra=none", FREE).wire_bytes == pytest.approx(
        70e9 * (4.125 + 8.125) / 8 + 2 * 280e9 * 0.003, rel=1e-3
    )


@pytest.mark.parametrize("method", ["loco4", "block8", "loco2/block2", "lowrank4"])
def test_codecs_are_measured(method: str) -> None:
    times = measure_codec(method, job(dim=64), numel=1 << 16)
    assert times.before > 0
    assert times.after > 0
    assert measure_codec("none", job()) == FREE


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [("200mbit", 200e6), ("1gbit", 1e9), ("10Gbit/s", 1e10), ("1.5e9", 1.5e9), ("56kbit", 56e3)],
)
def test_rates(text: str, bits_per_s: float) -> None:
    assert parse_rate(text) == bits_per_s


@pytest.mark.parametrize("text", ["", "fast", "0mbit", "-1gbit", "1mbyte", "1.2.3mbit", "inf"])
def test_what_is_not_a_rate(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a number with kbit, mbit or gbit"):
        parse_rate(text)


@pytest.mark.parametrize(
    "changes", [{"nodes": 0}, {"num_params": 0}, {"ranks_per_node": 0}, {"compute_s": -1.0}]
)
def test_jobs_that_make_no_sense(changes) -> None:
    [(name, value)] = changes.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}: must be"):
        job(**changes)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "--nodes", "4", "--params", "7.2e6", "--compute-ms", "100"]
    methods = ["--methods", "loco4", "block8"]
    assert main([*options, "--rate", "100mbit", *methods]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", "none", "loco4", "block8", "use"]
    assert lines[-1].startswith("use loco4: 4.")
    assert main([*options, "--rate", "fast"]) == 2
    assert "rate is 'fast'" in capsys.readouterr().err
    assert main([*options, "--rate", "1gbit", "--methods", "loco3"]) == 2
    assert "has 3 bits" in capsys.readouterr().err
    assert main([*options, "--rate", "1gbit", "--methods", "loco4+block8"]) == 2
    assert (
        "'block8' in 'loco4+block8': must be intra=CODEC or small=CODEC" in capsys.readouterr().err
    )
    assert main([*options, "--rate", "1gbit", "--methods", "loco4+small=loco4"]) == 2
    assert "small='loco4:" in capsys.readouterr().err


def test_links_are_given_or_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_options = ["plan", "--params", "7.2e6", "--compute-ms", "100"]
    for options, message in (
        (["--rate", "1gbit"], "nodes is not given"),
        (["--nodes", "4"], "given together, or all measured"),
        ([], "or run under torchrun with 2 ranks or more"),
    ):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert main([*job_options, *options]) == 2
        assert message in capsys.readouterr().err
