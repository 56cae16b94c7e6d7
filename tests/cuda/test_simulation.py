"""Simulated clients on a real GPU. Skipped without one, and never yet run.

To tolerance with the CPU: the kernels of matrix products round otherwise.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from commrt.simulation.job import run_job
from commrt.simulation.transport import Ranks
from tests.mpi.test_federated import results, start
from tests.unit.test_simulation_devices import CLIENTS, WAYS
from tests.unit.test_simulation_local import MODELS, OPTIONS, training

pytestmark = pytest.mark.gpu

CONFIG = """
uplink = "fp32"
[clients]
count = 9
[schedule]
cohort = 5
[run]
aggregations = 4
checkpoint_every = 2
"""


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("name", [name for name in WAYS if name != "random"])
def test_updates_are_those_of_the_cpu(name: str, options: dict[str, Any]) -> None:
    """But for rounding, with clients in chunks."""
    options = {"vectorise": WAYS[name] != "loop", "chunk": 4, **options}
    on_cpu, on_gpu = (training(MODELS[name], device=each, **options) for each in ("cpu", "cuda"))
    assert on_gpu.way == WAYS[name]
    start = on_cpu.start(0)
    found = on_gpu.updates(start, CLIENTS, 2, 3)
    assert found.device.type == "cpu"
    expected = on_cpu.updates(start, CLIENTS, 2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert on_gpu.evaluate(start) == pytest.approx(on_cpu.evaluate(start), abs=0.05)


def test_what_a_model_draws_is_the_client_s() -> None:
    """Dropout, by the GPU's own generator."""
    on_gpu = training(MODELS["random"], device="cuda")
    start = on_gpu.start(0)
    both = on_gpu.updates(start, CLIENTS[:1] + CLIENTS[2:3], 2, 3)
    torch.rand(3, device="cuda")
    torch.testing.assert_close(on_gpu.updates(start, CLIENTS[2:3], 2, 3)[0], both[1])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def test_a_run_is_that_of_the_cpu_and_goes_on(config: Path, tmp_path: Path) -> None:
    on_cpu, on_gpu = tmp_path / "cpu", tmp_path / "gpu"
    run_job(config, out=on_cpu)
    run_job(config, ["run.device=cuda", "run.aggregations=2"], out=on_gpu)
    run_job(config, ["run.device=cuda"], out=on_gpu, resume=True)
    assert_near(on_gpu, on_cpu)


@pytest.mark.mpi
def test_two_ranks_are_as_one(config: Path, tmp_path: Path) -> None:
    """On a GPU that they may share; the asynchronous policy sends the model between them."""
    policy = 'schedule={policy="fedbuff", buffer=2, concurrency=4}'
    run_job(config, [policy], out=tmp_path / "cpu")
    sets = ("--set", policy, "--set", "run.device=cuda")
    start(2, config, "--out", tmp_path / "gpu", *sets)
    assert_near(tmp_path / "gpu", tmp_path / "cpu")


def test_mpi_takes_a_tensor_of_the_gpu() -> None:
    """Through the host or not, as this machine's MPI wants; alone, so nothing of it may change."""
    from mpi4py import MPI

    ranks, flat = Ranks(MPI.COMM_SELF), torch.arange(5.0, device="cuda")
    ranks.broadcast_(flat)
    assert flat.tolist() == [0, 1, 2, 3, 4]


def assert_near(one: Path, other: Path) -> None:
    (found, _), (expected, _) = results(one), results(other)
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-3, atol=1e-4)
