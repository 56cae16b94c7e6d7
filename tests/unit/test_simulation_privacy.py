"""Clipping, noise and epsilon of simulated runs."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.federated import parse_uplink
from commrt.metrics import Row
from commrt.simulation.config import Config
from commrt.simulation.policies import FedAvg
from commrt.simulation.privacy import Privacy, PrivacyConfig
from commrt.simulation.run import Run
from commrt.simulation.traces import TraceConfig
from commrt.simulation.transport import Ranks

NOISE = {"clip": 0.5, "noise_multiplier": 1.5, "delta": 1e-4}
EVERYONE = {"policy": "fedavg", "cohort": 5, "least": 5}


def privacy(
    uplink: str = "fp32",
    policy: FedAvg | None = None,
    traces: TraceConfig | None = None,
    **settings: Any,
) -> Privacy:
    return Privacy(
        PrivacyConfig(**{**NOISE, **settings}),
        policy=policy or FedAvg(cohort=10, least=10),
        traces=traces or TraceConfig(),
        uplink=parse_uplink(uplink),
        num_clients=100,
        seed=3,
    )


def updates(count: int, numel: int = 2000) -> Tensor:
    return torch.randn(count, numel, generator=torch.Generator().manual_seed(0))


def test_updates_are_clipped() -> None:
    own = privacy(noise_multiplier=0.0)
    [update] = updates(1)
    clipped = own.protect(update, 0, 1)
    assert clipped.norm() == pytest.approx(0.5, rel=1e-6)
    torch.testing.assert_close(clipped, update * (0.5 / update.norm()))
    small = update * (0.4 / update.norm())
    assert torch.equal(own.protect(small, 0, 1), small)
    assert torch.equal(own.protect(torch.zeros(5), 0, 1), torch.zeros(5))
    for bad in (math.nan, math.inf):
        assert torch.equal(own.protect(torch.tensor([1.0, bad]), 0, 1), torch.zeros(2))
    assert torch.equal(privacy(clip=None, noise_multiplier=0.0).protect(update, 0, 1), update)


def test_the_sum_of_least_has_the_noise_that_is_stated() -> None:
    own = privacy()
    zeros = torch.zeros(20_000)
    noises = torch.stack([own.protect(zeros, 4, client) for client in range(10)])
    assert noises.sum(dim=0).std() == pytest.approx(1.5 * 0.5, rel=0.02)
    assert abs(float(noises.mean())) < 5 * 1.5 * 0.5 / math.sqrt(10 * noises.numel())
    correlations = torch.corrcoef(torch.stack([*noises, own.protect(zeros, 5, 0)]))
    assert (correlations - torch.eye(11)).abs().max() < 0.04
    assert torch.equal(noises[7], own.protect(zeros, 4, 7))
    [update] = updates(1, 20_000)
    difference = own.protect(update, 4, 7) - noises[7]
    torch.testing.assert_close(difference, update * (0.5 / update.norm()), atol=1e-6, rtol=0)


def accountant() -> dp_accounting.rdp.RdpAccountant:
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    return dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)


def test_epsilon_of_fixed_cohorts_is_that_of_samples() -> None:
    """A replaced client moves the sum by twice the clip, hence the half."""
    theirs = accountant()
    event = dp_accounting.GaussianDpEvent(1.5 / 2)
    theirs.compose(dp_accounting.SampledWithoutReplacementDpEvent(100, 10, event), 30)
    for uplink in ("fp32", "secure:bits=12,norm=1"):
        own = privacy(uplink)
        assert own.epsilon(30) == pytest.approx(theirs.get_epsilon(1e-4), rel=1e-9)
    assert 0 < own.epsilon(1) < own.epsilon(2) < own.epsilon(30)


def test_a_sample_of_nearly_all_costs_no_more_than_all() -> None:
    """Where the bound for samples is above the one without."""
    own = privacy("fp32", FedAvg(cohort=95, least=95), noise_multiplier=10.0)
    theirs = accountant()
    event = dp_accounting.GaussianDpEvent(10.0 / 2)
    theirs.compose(dp_accounting.SampledWithoutReplacementDpEvent(100, 95, event), 30)
    assert own.epsilon(30) == pytest.approx(gaussian_epsilon(10.0 / 2, 30), rel=1e-9)
    assert own.epsilon(30) < theirs.get_epsilon(1e-4)


@pytest.mark.parametrize(
    ("policy", "traces"),
    [
        (FedAvg(cohort=10, least=10, over_selection=1.2), TraceConfig()),
        (FedAvg(cohort=10, least=10, deadline_s=3.0), TraceConfig()),
        (FedAvg(cohort=10, least=10, sampling="weighted"), TraceConfig()),
        (FedAvg(cohort=10, least=10), TraceConfig(dropout=0.1)),
        (FedAvg(cohort=10, least=10), TraceConfig(on_s=5.0, off_s=1.0)),
        (FedAvg(cohort=10, least=10), TraceConfig(file=Path("some.csv"))),
    ],
)
def test_nothing_is_gained_by_samples_that_are_not_uniform(
    policy: FedAvg, traces: TraceConfig
) -> None:
    own = privacy("fp32", policy, traces)
    for clients in ((1, 2), (2, 3), (2, 5)):
        own.begin(clients)
    assert own.epsilon(30) == pytest.approx(gaussian_epsilon(1.5 / 2, 3), rel=1e-9)


@pytest.mark.parametrize("uplink", ["mbtc:nmse=0.5", "spread:step=2", "eden1", "sign", "fp16"])
def test_codecs_of_single_updates_release_them(uplink: str) -> None:
    own = privacy(uplink)
    for clients in ((1, 2), (2, 3)):
        own.begin(clients)
    stated = gaussian_epsilon(1.5 / 2 / math.sqrt(10), 2)
    assert own.epsilon(1) == pytest.approx(stated, rel=1e-9)
    again = privacy(uplink)
    again.load_state_dict(own.state_dict())
    assert again.epsilon(1) == own.epsilon(1)


def gaussian_epsilon(multiplier: float, times: int) -> float:
    """Of Renyi divergences of ``times order / (2 multiplier**2)``: Canonne et al., prop. 12."""
    epsilons = []
    for order in accountant().orders:
        if order > 1.01:
            divergence = times * order / (2 * multiplier**2)
            gain = math.log1p(-1 / order) - math.log(1e-4 * order) / (order - 1)
            epsilons.append(divergence + gain)
    return min(epsilons)


def test_more_noise_is_more_privacy() -> None:
    found = [privacy(noise_multiplier=z).epsilon(10) for z in (0.5, 1.0, 2.0, 8.0)]
    assert found == sorted(found, reverse=True)
    assert privacy(noise_multiplier=0.0).epsilon(10) == math.inf


def config(**sections: Any) -> Config:
    return Config.make(
        {
            "uplink": "fp32",
            "clients": {"count": 12, "importance": "equal"},
            "local": {"batch_size": 16, "epochs": 2},
            "schedule": EVERYONE,
            "run": {"aggregations": 4},
            **sections,
        }
    )


def carried_out(settings: Config) -> tuple[Run, list[Row]]:
    run, rows = Run(settings, Ranks()), list[Row]()
    run.carry_out(rows.append)
    return run, rows


def test_rows_have_epsilon_and_a_run_goes_on(tmp_path: Path) -> None:
    traces = {"dropout": 0.2}
    schedule = {**EVERYONE, "least": 3}
    sections: dict[str, Any] = {"privacy": NOISE, "traces": traces, "schedule": schedule}
    whole, rows = carried_out(config(**sections))
    epsilons = [row["epsilon"] for row in rows]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] == pytest.approx(gaussian_epsilon(1.5 / 2, 1))
    shorter = config(**sections, run={"aggregations": 2, "checkpoint_every": 2})
    Run(shorter, Ranks()).carry_out(out=tmp_path)
    again, found = Run(config(**sections), Ranks()), list[Row]()
    again.resume(tmp_path)
    again.carry_out(found.append)
    assert torch.equal(again.weights, whole.weights)
    assert [row["epsilon"] for row in found] == epsilons[2:]
    assert all("epsilon" not in row for row in carried_out(config())[1])


def test_clipped_clients_move_the_model_by_the_clip_at_most() -> None:
    run = Run(config(privacy={"clip": 1e-3}), Ranks())
    before = run.weights
    run.carry_out()
    assert 0 < float((run.weights - before).norm()) <= 4e-3 * 1.001


def test_noise_is_in_the_model() -> None:
    run, plain = (
        Run(config(privacy=each, run={"aggregations": 1}), Ranks())
        for each in (NOISE, {"clip": 0.5})
    )
    for each in (run, plain):
        each.carry_out()
    assert (run.weights - plain.weights).std() == pytest.approx(1.5 * 0.5 / 5, rel=0.03)


@pytest.mark.parametrize("over_selection", [1.0, 1.4])
def test_secure_runs_are_those_of_plain_sums(over_selection: float) -> None:
    """Those who are left say the seeds that they share with who is late."""
    schedule = {**EVERYONE, "least": 2, "over_selection": over_selection}
    sections: dict[str, Any] = {"schedule": schedule, "traces": {"dropout": 0.3}}
    plain, _ = carried_out(config(**sections))
    secure, rows = carried_out(config(**sections, uplink="secure:bits=24,norm=4"))
    torch.testing.assert_close(secure.weights, plain.weights, atol=1e-3, rtol=0)
    assert (sum(row["answer_bytes"] for row in rows) > 0) == (over_selection > 1)
    assert all(row["load"] < 1 for row in rows)


def test_noise_fits_into_a_secure_sum() -> None:
    sections = {"privacy": NOISE, "uplink": "secure:bits=12,norm=44.1,correlation=0"}
    _, rows = carried_out(config(**sections))
    assert all(0.9 < row["load"] < 1.05 for row in rows)
    assert rows[-1]["epsilon"] > 0


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"privacy": {"clip": 0}}, "privacy: clip is 0.0: must be positive"),
        *(
            (
                {"privacy": NOISE | {"noise_multiplier": z}},
                "privacy: noise_multiplier is .*: must be 0",
            )
            for z in (-1, 1e-300, 1e9, math.inf, math.nan)
        ),
        ({"privacy": {"delta": 1}}, "privacy: delta is 1.0: must be above 0 and below 1"),
        ({"privacy": {"noise_multiplier": 1, "clip": 1}}, "privacy: delta is missing"),
        ({"privacy": {"noise_multiplier": 1, "delta": 1e-3}}, "privacy: clip is missing"),
        (
            {"privacy": NOISE, "clients": {"importance": "examples"}},
            "privacy: noise_multiplier is 1.5: must be 0, or clients.importance equal",
        ),
        (
            {"privacy": NOISE, "schedule": {"policy": "fedbuff", "buffer": 2, "concurrency": 3}},
            r"privacy: noise_multiplier is 1.5: must be 0 with FedBuff\(",
        ),
    ],
)
def test_what_nothing_is_stated_of(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**sections)


def test_without_the_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'commrt\[privacy\]'"):
        config(privacy=NOISE)
    assert config(privacy={"clip": 1.0}).privacy.clip == 1


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"clients": {"count": 12}}, "importance is examples: must be equal"),
        ({"schedule": {**EVERYONE, "least": 1}}, "least is 1: must be 2 at least"),
        ({"schedule": {"policy": "fedfix", "interval_s": 1.0}}, "adds up rounds, which FedFix"),
        ({"uplink": "secure:bits=2,norm=1"}, "bits=2 with a cohort of 5"),
        ({"privacy": NOISE}, "norm is 1.0: must be 44.02 at least"),
    ],
)
def test_runs_without_a_secure_sum(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Run(config(**{"uplink": "secure:bits=12,norm=1", **sections}), Ranks())
