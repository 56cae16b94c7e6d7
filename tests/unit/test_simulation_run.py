"""Simulated runs on one rank: every policy learns, and a run goes on as if it had not stopped."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from commrt.errors import ConfigError, StateError
from commrt.metrics import Row
from commrt.simulation import checkpoint
from commrt.simulation import run as run_module
from commrt.simulation.config import Config
from commrt.simulation.run import Run
from commrt.simulation.transport import Ranks

CLIENTS = {"count": 12, "partition": "dirichlet:alpha=1"}
LOCAL = {"batch_size": 16, "epochs": 2}
TRACES = {"compute_sigma": 0.5, "up_bytes_per_s": 1e5, "dropout": 0.1, "straggler_share": 0.2}
FEDAVG = {"policy": "fedavg", "cohort": 5, "over_selection": 1.5, "deadline_s": 5.0}
ASYNC = {
    "fedasync": {"policy": "fedasync", "concurrency": 6},
    "fedbuff": {"policy": "fedbuff", "buffer": 3, "concurrency": 6},
    "fedfix": {"policy": "fedfix", "interval_s": 0.5},
}
MEMORYLESS = "mbtc:nmse=0.5,memory=False"


def config(**sections: Any) -> Config:
    run = {"aggregations": 6, **sections.pop("run", {})}
    return Config.make(
        {
            "uplink": "mbtc:nmse=0.3",
            "clients": CLIENTS,
            "local": LOCAL,
            "schedule": FEDAVG,
            "traces": TRACES,
            "run": run,
            **sections,
        }
    )


def carried_out(settings: Config) -> tuple[Run, list[Row]]:
    run, rows = Run(settings, Ranks()), list[Row]()
    run.carry_out(rows.append)
    return run, rows


@pytest.mark.parametrize("uplink", ["fp32", "mbtc:nmse=0.5", "topk:share=0.1", "loco4"])
def test_rounds_learn(uplink: str) -> None:
    _, rows = carried_out(config(uplink=uplink, run={"aggregations": 15}))
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert rows[-1]["accuracy"] > 0.5
    assert rows[-1]["virtual_s"] > rows[0]["virtual_s"] > 0
    assert all(0 < row["bits"] < 33 for row in rows)
    assert sum(row["lost"] for row in rows) > 0


@pytest.mark.parametrize("policy", ASYNC)
def test_policies_without_rounds_learn(policy: str) -> None:
    settings = config(uplink=MEMORYLESS, schedule=ASYNC[policy], run={"aggregations": 80})
    _, rows = carried_out(settings)
    assert rows[-1]["accuracy"] > 0.5


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "adam-mini", "lion"])
def test_optimizers_of_the_server_learn(optimizer: str) -> None:
    lr = 0.003 if optimizer == "lion" else 0.02
    server = {"optimizer": optimizer, "lr": lr, "momentum": 0.5}
    _, rows = carried_out(config(server=server, run={"aggregations": 15}))
    assert rows[-1]["accuracy"] > 0.4


@pytest.mark.parametrize("policy", ["fedavg", *ASYNC])
@pytest.mark.parametrize("at", [1, 4])
def test_a_run_goes_on(policy: str, at: int, tmp_path: Path) -> None:
    """Weights and figures are those of a run that did not stop."""
    settings = config(schedule=ASYNC.get(policy, FEDAVG))
    if policy != "fedavg":
        settings = dataclasses.replace(settings, uplink=MEMORYLESS)
    whole, rows = carried_out(settings)
    shorter = dataclasses.replace(
        settings, run=dataclasses.replace(settings.run, aggregations=at, checkpoint_every=at)
    )
    Run(shorter, Ranks()).carry_out(out=tmp_path)
    again, found = Run(settings, Ranks()), list[Row]()
    again.resume(tmp_path)
    again.carry_out(found.append)
    assert torch.equal(again.weights, whole.weights)
    assert without_times(found) == without_times(rows[at:])


def test_what_a_run_does_not_go_on_from(tmp_path: Path) -> None:
    settings = config()
    run = Run(settings, Ranks())
    with pytest.raises(StateError, match="no checkpoint at"):
        run.resume(tmp_path)
    run.save(tmp_path)
    with pytest.raises(StateError, match="of other settings"):
        Run(config(uplink="fp32"), Ranks()).resume(tmp_path)
    file = tmp_path / checkpoint.NAME
    whole = file.read_bytes()
    for at in (len(whole) // 3, len(whole) // 2):  # weights
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StateError, match="is damaged"):
            run.resume(tmp_path)
    torch.save({"step": 3}, file)
    with pytest.raises(StateError, match="is no checkpoint"):
        run.resume(tmp_path)
    file.write_bytes(whole)
    for size in (10, file.stat().st_size // 2):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(StateError, match="is damaged"):
            run.resume(tmp_path)


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_clients_that_are_damaged(damage: str, tmp_path: Path) -> None:
    run, _ = carried_out(config(run={"aggregations": 1}))
    run.save(tmp_path)
    (path,) = tmp_path.glob("clients-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "gone":
        path.unlink()
    with pytest.raises(StateError, match=f"{path} is damaged"):
        run.resume(tmp_path)


ASKING = "mbtc:nmse=0.3,block=256,least_gain=0"


@pytest.mark.parametrize("uplink", ["topk:share=0.1", ASKING])
def test_states_in_files_and_updates_in_pieces(
    uplink: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is another: what is remembered, what is asked for once more, what is trained."""
    alike = {"uplink": uplink, "schedule": {"cohort": 6}, "traces": {}}
    alike["local"] = {"batch_size": 16, "epochs": 4}
    clients = {"count": 8, "partition": "iid"}
    plain, rows = carried_out(config(**alike, clients=clients))
    assert uplink != ASKING or sum(row["asked_clients"] for row in rows) > 0
    monkeypatch.setattr(run_module, "_TRAINED_BYTES", 2 * 4 * plain.layout.numel)
    state_mb = 5 * plain.layout.numel / 1e6  # of two clients with MBTC, of none with top-k
    clients |= {"state_mb": state_mb, "state_folder": str(tmp_path)}
    bounded, found = carried_out(config(**alike, clients=clients))
    assert without_times(found) == without_times(rows)
    assert torch.equal(bounded.weights, plain.weights)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) >= 6


def test_memory_may_be_another_when_a_run_goes_on(tmp_path: Path) -> None:
    settings = config()
    whole, _ = carried_out(settings)
    shorter = dataclasses.replace(settings, run=dataclasses.replace(settings.run, aggregations=3))
    begun, _ = carried_out(shorter)
    begun.save(tmp_path)
    again = Run(
        dataclasses.replace(settings, clients=dataclasses.replace(settings.clients, state_mb=0.0)),
        Ranks(),
    )
    again.resume(tmp_path)
    again.carry_out()
    assert torch.equal(again.weights, whole.weights)


@pytest.mark.parametrize("policy", ["fedavg", *ASYNC])
def test_clients_without_examples(policy: str) -> None:
    """They take as long as their messages do, and add nothing."""
    clients = {"count": 30, "partition": "quantity:alpha=0.05", "least": 0}
    schedule = ASYNC.get(policy, {"cohort": 30})
    run, rows = carried_out(
        config(uplink=MEMORYLESS, clients=clients, schedule=schedule, traces={"latency_s": 0.1})
    )
    assert 0 in run.training.sizes
    assert len(rows) == 6
    assert rows[0]["virtual_s"] > 0.1


def test_uplinks_that_need_rounds() -> None:
    with pytest.raises(ConfigError, match="must have memory=False"):
        Run(config(schedule=ASYNC["fedbuff"]), Ranks())


def without_times(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "wall_s"} for row in rows]
