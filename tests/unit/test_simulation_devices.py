"""Training on a GPU, as far as that can be tested without one: see pretended.py for how far."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from commrt.errors import ConfigError
from commrt.simulation.config import Config
from commrt.simulation.devices import device_of, why_staged
from commrt.simulation.run import Run
from commrt.simulation.transport import Ranks
from tests.unit import test_simulation_run as runs
from tests.unit.pretended import CPU, GPU, pretended_gpu
from tests.unit.test_simulation_local import MODELS, OPTIONS, SIZES, training

WAYS = {"batched": "batched", "aligned": "vmap", "loop": "loop", "random": "loop"}
CLIENTS = [SIZES.index(size) for size in (30, 0, 14, 15, 9, 16, 40)]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("name", WAYS)
def test_no_operation_mixes_devices(name: str, options: dict[str, Any]) -> None:
    """And the updates are those of the CPU, to the bit, since its kernels make them."""
    options = {"vectorise": WAYS[name] != "loop", "chunk": 4, **options}
    on_cpu = training(MODELS[name], **options)
    start = on_cpu.start(0)
    expected, metric = on_cpu.updates(start, CLIENTS, 2, 3), on_cpu.evaluate(start)
    with pretended_gpu() as gpu:
        on_gpu = training(MODELS[name], device="cuda", **options)
        assert on_gpu.way == on_cpu.way == WAYS[name]
        pinned = gpu.pinned
        room = on_gpu.room(len(CLIENTS))
        assert gpu.pinned == pinned + 1
        found = on_gpu.updates(start, CLIENTS, 2, 3, out=room)
        assert (found.device, on_gpu.device) == (CPU, GPU)
        assert gpu.copies_to_host == 1
        assert on_gpu.evaluate(start) == on_gpu.evaluate(start.to(GPU)) == metric
    assert torch.equal(found, expected)


class Drawing(nn.Linear):
    """Draws on the GPU."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=torch.cuda.default_generators[0])
        return super().forward(x + noise.to(x.device))


def test_what_a_model_draws_on_a_gpu_is_the_client_s() -> None:
    """Whatever was drawn before, and what others draw afterwards goes on from there."""
    with pretended_gpu():
        on_gpu = training(lambda: nn.Sequential(nn.Flatten(), Drawing(12, 5)), device="cuda")
        start = on_gpu.start(0)
        generator = torch.cuda.default_generators[0]
        before = generator.get_state()
        all_of_them = on_gpu.updates(start, CLIENTS, 2, 3)
        assert torch.equal(generator.get_state(), before)
        assert torch.equal(on_gpu.updates(start, CLIENTS[3:4], 2, 3)[0], all_of_them[3])


@pytest.mark.parametrize("policy", ["fedavg", "fedasync", "fedbuff"])
def test_runs_on_either_device(policy: str, tmp_path: Path) -> None:
    """One that goes on on the other device as well: with the CPU's kernels, the same to the bit."""
    sections = {"schedule": runs.ASYNC.get(policy, runs.FEDAVG)}
    if policy != "fedavg":
        sections["uplink"] = runs.MEMORYLESS
    sections["server"] = {"optimizer": "adam", "lr": 0.02}
    expected, rows = runs.carried_out(runs.config(**sections))
    with pretended_gpu() as gpu:
        length = {"aggregations": 3, "checkpoint_every": 3, "device": "cuda"}
        Run(runs.config(**sections, run=length), Ranks()).carry_out(out=tmp_path)
        found, on_gpu = runs.carried_out(runs.config(**sections, run={"device": "cuda"}))
        assert gpu.has(found.weights)
        again = Run(runs.config(**sections, run={"device": "cuda"}), Ranks())
        again.resume(tmp_path)
        again.carry_out()
        weights = [found.weights.cpu(), again.weights.cpu()]
    here = Run(runs.config(**sections), Ranks())
    here.resume(tmp_path)
    here.carry_out()
    assert runs.without_times(on_gpu) == runs.without_times(rows)
    assert all(torch.equal(each, expected.weights) for each in (*weights, here.weights))


def test_the_pretended_gpu_is_as_strict_as_one() -> None:
    """So that the tests above can fail."""
    with pretended_gpu() as gpu:
        here, there = torch.ones(3, 4), torch.ones(3, 4, device="cuda")
        rows = torch.tensor([2, 0])
        mistakes = [
            lambda: there + here,
            lambda: there.index_select(0, rows),
            lambda: torch.sub(there, there, out=here),
            lambda: torch.func.vmap(torch.dot)(there, here),
            lambda: (there.new_zeros(3) * here[:, 0]).sum(),
            lambda: there[0].view(2, 2) @ here[:2, :2],
        ]
        for mistake in mistakes:
            with pytest.raises(RuntimeError, match="of tensors on cuda:0 and cpu"):
                mistake()
        with pytest.raises(TypeError, match="to numpy"):
            there[0].numpy()
        assert there[rows].device == (there * torch.tensor(2.0)).device == GPU
        assert not gpu.has(there.cpu())
        here.copy_(there * 2)
        assert float(here.sum()) == 24
    assert here.device == CPU


# -- which device ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"device": "gpu"}, "run: device is 'gpu': must be cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "run: device is 'cuda:x': must be cpu, cuda or cuda:N"),
        ({"device": "cuda:1"}, "run: device is 'cuda:1': must be below cuda:1, as many there are"),
        ({"device": 0}, "run: device is 0: must be of type str"),
        ({"cuda_aware": "yes"}, "run: cuda_aware is 'yes': must be of type"),
    ],
)
def test_a_device_that_cannot_be_is_named(run: dict[str, Any], says: str) -> None:
    with pretended_gpu(), pytest.raises(ConfigError, match=says):
        Config.make({"run": run})


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_no_gpu_is_said(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=f"run: device is '{device}': torch .* finds no GPU here"):
        Config.make({"run": {"device": device}})


def test_ranks_of_a_machine_share_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    indices = [device_of("cuda", local_rank).index for local_rank in range(5)]
    assert indices == [0, 1, 2, 0, 1]
    assert device_of("cuda:1", 2) == torch.device("cuda", 1)
    assert device_of("cpu", 2) == CPU


# -- what MPI is given ----------------------------------------------------------------------------


class Communicator:
    """Of two ranks: notes what it is given, and fills it where it is not the root's.

    No MPI that reads GPU memory is tested, nor that the pointer which mpi4py finds is that of the
    GPU; tests/mpi hands tensors of a pretended GPU to a real one.
    """

    def __init__(self, rank: int = 0, kinds: str | None = None) -> None:
        self.rank, self.kinds, self.events = rank, kinds, list[Any]()

    def Get_rank(self) -> int:  # noqa: N802
        return self.rank

    def Get_size(self) -> int:  # noqa: N802
        return 2

    def Get_info(self) -> Any:  # noqa: N802
        kinds = {"mpi_memory_alloc_kinds": self.kinds}
        return SimpleNamespace(Get=kinds.get, Free=lambda: self.events.append("freed"))

    def Bcast(self, data: Any) -> None:  # noqa: N802
        self.events.append(data)
        if self.rank:
            data[:] = data.new_tensor(PATTERN) if isinstance(data, Tensor) else PATTERN


NUMBERS = torch.tensor([1.5, -2.0, 3.0])
PATTERN = NUMBERS.view(torch.uint8).numpy()


@pytest.mark.parametrize("rank", [0, 1])
def test_mpi_that_reads_gpus_is_given_the_tensor(rank: int) -> None:
    """Once what calculates it is done."""
    communicator = Communicator(rank)
    with pretended_gpu() as gpu:
        ranks = Ranks(communicator)
        ranks.use_gpus(True)
        flat = (torch.zeros(3) if rank else NUMBERS).to("cuda")
        torch.cuda.current_stream().synchronize = lambda: communicator.events.append("synchronised")
        ranks.broadcast_(flat)
        done, given = communicator.events
        assert done == "synchronised"
        assert gpu.has(given)
        assert (given.data_ptr(), given.dtype) == (flat.data_ptr(), torch.uint8)
        assert gpu.copies_to_host == 0
        assert torch.equal(flat.cpu(), NUMBERS)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("is_asked", [False, True])
def test_mpi_that_does_not_gets_a_copy(rank: int, is_asked: bool) -> None:
    """As one of which nobody has asked. It comes back, and the first rank says so, once."""
    communicator = Communicator(rank, kinds="mpi,system")
    with pretended_gpu() as gpu:
        ranks = Ranks(communicator)
        if is_asked and rank == 0:
            with pytest.warns(UserWarning, match="are 'mpi,system': models go between"):
                ranks.use_gpus("auto")
        elif is_asked:
            with warnings.catch_warnings(action="error"):
                ranks.use_gpus("auto")
        flat = (torch.zeros(3) if rank else NUMBERS).to("cuda")
        ranks.broadcast_(flat)
        assert isinstance(communicator.events[-1], np.ndarray)
        assert gpu.has(flat)
        assert torch.equal(flat.cpu(), NUMBERS)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_large_tensors_go_in_pieces(is_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commrt.simulation.transport._PIECE", 5)
    communicator = Communicator()
    with pretended_gpu():
        ranks = Ranks(communicator)
        ranks.use_gpus(True)
        ranks.broadcast_(NUMBERS.to("cuda") if is_gpu else NUMBERS)
        assert [len(piece) for piece in communicator.events] == [5, 5, 2]
        assert b"".join(bytes(piece.tolist()) for piece in communicator.events) == bytes(PATTERN)


@pytest.mark.parametrize(
    ("kinds", "query", "setting", "says"),
    [
        ("mpi,system,cuda:device", None, "auto", ""),
        ("system, CUDA", None, "auto", ""),
        ("", True, "auto", "MPI's memory kinds are ''"),
        ("mpi,system", True, "auto", "MPI's memory kinds are 'mpi,system'"),
        ("system,cuda:host", True, "auto", "MPI's memory kinds are 'system,cuda:host'"),
        (None, True, "auto", ""),
        (None, False, "auto", "MPI is not CUDA-aware"),
        (None, None, "auto", "MPI does not say whether it is CUDA-aware"),
        ("mpi,system", False, True, ""),
        ("cuda:device", True, False, "cuda_aware is false"),
    ],
)
def test_whether_mpi_reads_gpus(
    kinds: str | None, query: bool | None, setting: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of the standard decides where there is one, the library's own word otherwise."""
    monkeypatch.setattr("commrt.simulation.devices._query", lambda: query)
    communicator = Communicator(kinds=kinds)
    assert why_staged(communicator, setting) == says
    assert communicator.events == ([] if setting != "auto" else ["freed"])


def test_the_mpi_that_is_here() -> None:
    """Open MPI of PyPI, built without CUDA, has no such key, but the query."""
    from mpi4py import MPI

    assert why_staged(MPI.COMM_SELF, "auto") == "MPI is not CUDA-aware"
