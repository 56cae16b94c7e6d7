"""Where sharded communication could go wrong: modes, shapes, hooks of others, restarts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import commrt
from commrt.errors import ConfigError, StateError
from commrt.hooks.sharded import MAX_PENDING
from commrt.testing import run_ranks
from tests.dist.sharded_checks import (
    mesh_of,
    shard,
    states_of_all,
    train,
    whole_gradients,
    whole_weights,
    wrap_as,
)
from tests.dist.small_training import (
    IN,
    all_of,
    assert_same_on_all_ranks,
    assert_same_owed,
    backward,
    backward_of_any,
    same_bits,
    small_model,
)


def inference_mode() -> None:
    """Evaluation between steps leaves training as it was."""
    for kind, gather in (("fsdp2", None), ("fsdp2", "block8"), ("hsdp", "block8")):
        models = [shard(small_model(), kind) for _ in range(2)]
        for model in models:
            commrt.attach(model, gather=gather, min_numel=64)
        optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
        for step in range(3):
            pairs = zip(models, optimizers, strict=True)
            first, second = (train(model, [step], backward, opt) for model, opt in pairs)
            assert first == second
            with torch.inference_mode():
                models[0](torch.ones(64, IN))


def units_without_rows() -> None:
    """Fewer rows than ranks: those without any take part all the same."""
    for kind in ("fsdp2", "hsdp"):
        head = nn.Linear(2048, 1)
        model = nn.Sequential(nn.Linear(IN, 2048), fully_shard(head, mesh=mesh_of(kind)))
        fully_shard(model, mesh=mesh_of(kind))
        comm = commrt.attach(model, min_numel=64)
        before = whole_weights(model)
        train(model, range(4), backward_of_any)
        assert comm.stats().steps == 4
        after = whole_weights(model)
        assert_same_on_all_ranks(*after.values())
        assert not any(same_bits(before[name], weight) for name, weight in after.items())


class Branches(nn.Module):
    """Two layers, of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(IN, 64), nn.Linear(IN, 64)
        self.uses_first = True

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.first if self.uses_first else self.second)(inputs)


def unused_parameters_rest() -> None:
    """What a branch is owed waits until it is used again; its gradient is zero meanwhile."""
    model = Branches()
    for layer in (model.first, model.second):
        fully_shard(layer)
    fully_shard(model)
    comm = commrt.attach(model, min_numel=64)
    backward_of_any(model, 0)
    model.zero_grad()
    before = comm.state_dict()["residuals"]
    model.uses_first = False
    for step in range(3):
        backward_of_any(model, step)
        gradients = whole_gradients(model)
        assert not gradients["first.weight"].any()
        assert gradients["second.weight"].any()
        model.zero_grad()
    after = comm.state_dict()["residuals"]
    assert same_bits(before["first.weight"], after["first.weight"])
    assert not same_bits(before["second.weight"], after["second.weight"])
    loss = model(torch.ones(2, IN).requires_grad_()).sum()
    torch.autograd.grad(loss, [model.second.weight], allow_unused=True)


def hooks_of_others() -> None:
    """A user's all-reduce hook sees the reduced gradient; what would be replaced is refused."""
    models = [shard(small_model()) for _ in range(2)]
    for model in models:
        for module in model.modules():
            if hasattr(module, "set_all_reduce_hook"):
                module.set_all_reduce_hook(lambda gradient: gradient.mul_(0.5))
    commrt.attach(models[1], "none")
    for model in models:
        backward(model, 0)
    for first, second in zip(*(whole_gradients(m).values() for m in models), strict=True):
        assert same_bits(first, second)
    with pytest.raises(ConfigError, match=r"_ReduceScatter of its own already: attach once"):
        commrt.attach(models[1])
    hybrid = shard(small_model(), "hsdp")
    hybrid[0].set_all_reduce_hook(lambda gradient: None)
    with pytest.raises(ConfigError, match=r"module '0' has an all-reduce hook already"):
        commrt.attach(hybrid)
    with pytest.raises(ConfigError, match=r"attach before torch\.compile"):
        commrt.attach(torch.compile(shard(small_model())))


def attached_again() -> None:
    """After close() the model goes on without commrt, and takes it again."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    hybrid = mesh_of("hsdp")
    for make, settings in (
        (lambda: shard(small_model()), {}),
        (lambda: shard(small_model()), {"hierarchy": 2}),
        (lambda: shard(small_model(), mesh=mesh["dp"]), {"gather": "block8"}),
        (lambda: shard(small_model(), mesh=hybrid), {"intra": "block8"}),
    ):
        plain, model = make(), make()
        for _ in range(3):
            comm = commrt.attach(model, min_numel=64, **settings)
            backward(model, 0)
            assert comm.stats().wire_bytes > 0
            model.zero_grad()
            comm.close()
        assert train(plain, range(2), backward) == train(model, range(2), backward)
    for _ in range(3):
        model = wrap_as("ddp")
        comm = commrt.attach(model, hierarchy=2)
        backward(model, 0)
        comm.close()


def noop() -> None:
    for kind in ("fsdp2", "fsdp2-2", "hsdp"):
        model = shard(small_model(), kind)
        comm = commrt.attach(model, "noop")
        backward(model, 0)
        assert comm.stats().wire_bytes == 0
        comm.detach()
        backward(model, 1)
        assert comm.stats().wire_bytes > 0


def few_units_wait() -> None:
    """However many units a model has, few unsharded gradients are alive."""
    model = nn.Sequential(*(nn.Linear(IN, IN) for _ in range(8)))
    comm = commrt.attach(shard(model), min_numel=64)
    most, settle = 0, comm._settle

    def counted(*args: Any) -> None:
        nonlocal most
        settle(*args)
        most = max(most, len(comm._pending))

    comm._settle = counted
    backward_of_any(model, 0)
    assert 0 < most <= MAX_PENDING


def mixed_dtypes() -> None:
    """FSDP2 gathers them as bytes, which is said."""
    model = nn.Sequential(nn.Linear(IN, 64, bias=False), nn.Linear(64, 64, bias=False).bfloat16())
    model[1].requires_grad_(False)
    fully_shard(model)
    comm = commrt.attach(model, gather="block8", min_numel=64)
    hidden = torch.ones(2, IN)
    model.forward = lambda x: model[1](model[0](x).bfloat16())
    model(hidden).float().sum().backward()
    assert "its module's weights are gathered as torch.uint8" in comm.report()


def differences_need_gathered_weights() -> None:
    model = shard(small_model(), "fsdp2-keep")
    commrt.attach(model, gather="delta4", min_numel=64)
    backward(model, 0)
    model.set_reshard_after_forward(True)
    with pytest.raises(ConfigError, match=r"reshard_after_forward of module .* must be False"):
        backward(model, 1)


@pytest.mark.parametrize(
    "checks",
    [
        [inference_mode, units_without_rows, unused_parameters_rest, few_units_wait],
        [hooks_of_others, noop, mixed_dtypes, differences_need_gathered_weights],
        [attached_again],
    ],
)
def test_edges(checks: Any) -> None:
    run_ranks(all_of, checks, world_size=4, timeout_s=120)


class Named(nn.Module):
    """A parameter with the name of a key."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Parameter(torch.randn(64, IN))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.rest.T


def groups_in_one_checkpoint(path: Path) -> None:
    """Two groups that train different models write under one key; each finds its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def made() -> tuple[nn.Module, Any]:
        model = fully_shard(Named(), mesh=mesh["dp"])
        return model, commrt.attach(model, "loco4:block=32", min_numel=1)

    torch.manual_seed(mesh.get_local_rank("tp"))
    model, comm = made()
    train(model, range(2), backward_of_any)
    dcp.save({"comm": comm.distributed_state()}, checkpoint_id=path)
    _, again = made()
    again.load_distributed(path)
    saved, loaded = comm.state_dict()["residuals"], again.state_dict()["residuals"]
    assert same_bits(saved["rest"], loaded["rest"])


def rows_on_some_ranks(path: Path) -> None:
    """Differences after a load, where one rank has no row of the weight."""

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 5, bias=False))
        fully_shard(model, reshard_after_forward=False)
        return model, commrt.attach(model, "loco4", "delta4:block=32", min_numel=64)

    def run(model: nn.Module, step: int) -> float:
        loss = model(torch.full((2, 512), 0.1 * step + dist.get_rank())).square().mean()
        loss.backward()
        return loss.item()

    model, comm = made()
    train(model, range(3), run)
    dcp.save({"comm": comm.distributed_state()}, checkpoint_id=path)
    weights = whole_weights(model)
    expected = train(model, range(3, 5), run, torch.optim.SGD(model.parameters(), lr=0.01))
    fresh, again = made()
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            local = torch.distributed.tensor.distribute_tensor(
                weights[name], parameter.device_mesh, parameter.placements
            )
            parameter.copy_(local)
    again.load_distributed(path)
    found = train(fresh, range(3, 5), run, torch.optim.SGD(fresh.parameters(), lr=0.01))
    assert found == expected
    assert not again._gathers._loaded


def frozen_in_fsdp1() -> None:
    """They have no residuals, and a state goes to DDP and back."""
    states = []
    for kind in ("FULL_SHARD", "ddp"):
        inner = small_model()
        inner[0].requires_grad_(False)
        model = wrap_as(kind, inner)
        comm = commrt.attach(model, "loco4:block=32", min_numel=1)
        backward(model, 0)
        backward(model, 1)
        assert not any(name.startswith("0.") for name in comm.state_dict()["residuals"])
        states.append(states_of_all(comm))
    comm.load_state_dict(states[0])
    assert_same_owed(states[0], states_of_all(comm))


def smaller_shards(path: Path) -> None:
    """A parameter that is compressed in one world and not in another is named, with the reason."""
    world = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        mesh = torch.distributed.device_mesh.DeviceMesh.from_group(world, "cpu")
        model = shard(small_model(), mesh=mesh)
        torch.save(commrt.attach(model, min_numel=64).state_dict(), path / f"{dist.get_rank()}")
    dist.barrier()
    states = [torch.load(path / f"{rank}") for rank in range(2)]
    comm = commrt.attach(shard(small_model()), min_numel=64)
    with pytest.raises(StateError, match=r"'5\.weight', which is not compressed here: shards of"):
        comm.load_state_dict(states)
    assert comm.load_state_dict(states, strict=False).unexpected == ["5.weight"]


@pytest.mark.parametrize("check", [groups_in_one_checkpoint, rows_on_some_ranks, smaller_shards])
def test_states(check: Any, tmp_path: Path) -> None:
    run_ranks(check, tmp_path, world_size=4)


def test_frozen_parameters_of_fsdp1() -> None:
    run_ranks(frozen_in_fsdp1, world_size=2)
