"""Optimizers whose parameters are in several ranks: the same training as on one.

To tolerance: everything, since the gradients of a batch that is split are rounded differently.
"""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from commrt import optim
from commrt.errors import ConfigError, PeerMismatchError
from commrt.optim import AdamMini
from commrt.testing import run_ranks

DIM, HEADS, VOCAB, BATCH = 96, 3, 50, 8
CPU = torch.device("cpu")


class Conv1D(nn.Module):
    """That of transformers: columns are output neurons."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.05)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Layer(nn.Module):
    """Heads of 32 rows, which four ranks cut, a stack of three matrices, and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.k_proj = nn.Linear(DIM, DIM, bias=False)
        self.c_attn = Conv1D(3 * DIM, DIM)
        self.stack = nn.Parameter(torch.randn(3, DIM, 70) * 0.05)
        self.conv = nn.Conv1d(70, DIM, 3, padding=1)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q_proj(x).tanh() * self.k_proj(x).sigmoid()
        q, k, v = self.c_attn(self.norm(x)).split(DIM, dim=-1)
        x = x + torch.softmax(q @ k.transpose(1, 2) / DIM**0.5, dim=-1) @ v
        hidden = torch.einsum("btd,edh->bth", x, self.stack).tanh()
        return x + self.conv(hidden.transpose(1, 2)).transpose(1, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def wrap(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = make_model(dtype)
    match kind:
        case "ddp":
            return DistributedDataParallel(model)
        case "fsdp1" | "fsdp1-flat":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return FullyShardedDataParallel(
                    model,
                    auto_wrap_policy=ModuleWrapPolicy({Layer}),
                    device_id=CPU,
                    use_orig_params=kind == "fsdp1",
                )
        case "fsdp2" | "hsdp":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            if kind == "hsdp":
                mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)
    return model


def losses_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 8, first: int = 0
) -> list[float]:
    """Of the whole batch, of which every rank has a part."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (BATCH, 9), generator=generator)[own]
        targets = (tokens * 7 + 3) % VOCAB
        logits = model(tokens).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().double() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def alone(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[float]:
    model = make_model(dtype)
    return losses_of(model, AdamMini(model, **options))


FP32 = {"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}
COLUMNS = {**FP32, "partition": {r".*(stack|head.weight)": "column"}}
INT8 = {"lr": 3e-3, "momentum_dtype": "int8"}


def train(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[float]:
    model = wrap(kind, dtype)
    return losses_of(model, AdamMini(model, **options))


def of_all_kinds(kinds: tuple[str, ...]) -> dict[str, list[float]]:
    return {
        f"{kind} {name}": train(kind, options)
        for kind in kinds
        for name, options in (("fp32", FP32), ("columns", COLUMNS), ("int8", INT8))
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_training_on_any_number_of_ranks(world_size):
    kinds = ("ddp", "fsdp1", "fsdp1-flat", "fsdp2") + (("hsdp",) if world_size == 4 else ())
    expected = {"fp32": alone(FP32), "columns": alone(COLUMNS), "int8": alone(INT8)}
    for losses in run_ranks(of_all_kinds, kinds, world_size=world_size, timeout_s=100):
        for name, found in losses.items():
            options = name.split()[1]
            rel = 1e-6 if options != "int8" else 1e-3
            assert found == pytest.approx(expected[options], rel=rel), name
    assert expected["fp32"][-1] < expected["fp32"][0] - 0.1


# -- placements -----------------------------------------------------------------------------------

SHAPES = [
    *[((12, 40), text) for text in ("row", "row:4", "column", "column:8", "element", "tensor")],
    *[((6, 8, 10), text) for text in ("row", "row:2", "column", "column:5")],
    *[((13, 7), text) for text in ("row", "row:13", "column")],
    *[((48, 1024), text) for text in ("row:16", "column")],
    ((9,), "element"),
    ((9,), "tensor"),
]


def given_weights(
    dtype: torch.dtype, options: dict[str, Any]
) -> tuple[list[nn.Parameter], list[list[Tensor]], Any]:
    """Parameters of every shape, gradients of three steps, and the optimizer's options."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape, _ in SHAPES]

    parameters = [nn.Parameter(value) for value in draw()]
    grads = [draw() for _ in range(3)]
    return parameters, grads, {"lr": 0.1, "max_grad_norm": 3.0, **options}


def step_all(
    parameters: list[nn.Parameter], grads: list[list[Tensor]], name: str, options: dict[str, Any]
) -> None:
    named = [(f"p{i}", parameter) for i, parameter in enumerate(parameters)]
    if name == "AdamMini":
        options["partition"] = {f"p{i}": text for i, (_, text) in enumerate(SHAPES)}
    optimizer = getattr(optim, name)(named, **options)
    for of_step in grads:
        for parameter, grad in zip(parameters, of_step, strict=True):
            parameter.grad = grad
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.grad = distribute_tensor(grad, mesh, placements)
        optimizer.step()


def placements_for(shape: tuple[int, ...]) -> list[tuple[Any, ...]]:
    last = len(shape) - 1
    found = [(Shard(0), Replicate()), (Replicate(), Shard(last)), (Replicate(), Replicate())]
    if last:
        found += [(Shard(0), Shard(1)), (Shard(1), Shard(0))]
    if shape[0] % 4 == 0:
        found += [(Shard(0), Shard(0)), (_StridedShard(0, split_factor=2), Shard(0))]
    return found


def any_placement(
    name: str, dtype: torch.dtype, options: dict[str, Any], most_different: float
) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole, grads, options = given_weights(dtype, options)
    step_all(whole, grads, name, options)
    number = max(len(placements_for(shape)) for shape, _ in SHAPES)
    for choice in range(number):
        given, _, _ = given_weights(dtype, {})
        cut = []
        for parameter in given:
            places = placements_for(tuple(parameter.shape))
            placed = distribute_tensor(parameter.detach(), mesh, places[choice % len(places)])
            cut.append(nn.Parameter(placed))
        step_all(cut, grads, name, options)
        for (shape, text), expected, found in zip(SHAPES, whole, cut, strict=True):
            case = f"{shape} {text} {found.placements}"
            differs = (found.full_tensor() - expected).abs() > 1e-5
            assert differs.float().mean().item() <= most_different, case


@pytest.mark.parametrize(
    ("name", "dtype", "options", "most_different"),
    [
        ("AdamMini", torch.float32, {}, 0.0),
        ("AdamMini", torch.float32, {"momentum_dtype": "int8"}, 0.0),
        # Where a sum is rounded differently, a weight can be, too.
        ("AdamMini", torch.bfloat16, {"weight_mode": "stochastic"}, 0.02),
        ("AdamW8bit", torch.float32, {}, 0.0),
        ("Lion", torch.float32, {"momentum_dtype": "int8"}, 0.0),
        ("Adan", torch.bfloat16, {"weight_mode": "residual"}, 0.02),
        ("MoFO", torch.float32, {"fraction": 0.3}, 0.0),
    ],
)
def test_any_placement(name, dtype, options, most_different):
    run_ranks(any_placement, name, dtype, options, most_different, world_size=4, timeout_s=60)


# -- ranks that differ ----------------------------------------------------------------------------


def other_options() -> None:
    rank = dist.get_rank()
    for options, name in (
        ({"max_grad_norm": 1.0 + rank}, "max_grad_norm: rank 0: '1.0', rank 1: '2.0'"),
        ({"partition": {".*q_proj.*": "row" if rank else "tensor"}}, "q_proj.weight"),
        ({"seed": rank}, "seed: rank 0: 0, rank 1: 1"),
    ):
        model = wrap("fsdp2")
        optimizer = AdamMini(model, **options)
        with pytest.raises(PeerMismatchError, match=name):
            losses_of(model, optimizer, 1)


def infinite_on_one() -> None:
    """All ranks leave out a step in which one has found a gradient that is not finite."""
    for kind in (AdamMini, optim.Lion):
        leave_out(kind)


def leave_out(kind: Any) -> None:
    model = wrap("fsdp2")
    optimizer = kind(model, lr=1e-2)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    optimizer.found_inf = torch.tensor(float(dist.get_rank() == 1))
    losses_of(model, optimizer, 1)
    for value, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(value, parameter.to_local())
    optimizer.found_inf = torch.tensor(0.0)
    losses_of(model, optimizer, 1)
    assert not torch.equal(before[0], next(iter(model.parameters())).to_local())


def made_too_early() -> None:
    model = make_model()
    optimizer = AdamMini(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    for group in optimizer.param_groups:  # as Accelerate does
        group["params"] = list(model.parameters())
    with pytest.raises(ConfigError, match="must be made after the model is wrapped"):
        losses_of(model, optimizer, 1)


def nothing_on_one() -> None:
    """A rank may have no gradients, if its parts are empty; and parameters may be frozen."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    short = nn.Parameter(distribute_tensor(torch.ones(1, 5), mesh, [Shard(0)]))
    frozen = nn.Parameter(distribute_tensor(torch.ones(4, 5), mesh, [Shard(0)]))
    optimizer = AdamMini([short, frozen], lr=0.1, partition=lambda *_: "tensor")
    if short.to_local().numel():
        short.grad = torch.ones_like(short)
    optimizer.step()
    assert bool((short.full_tensor() < 1).all())
    assert bool((frozen.full_tensor() == 1).all())


def parameters_without_their_model() -> None:
    model = wrap("fsdp1")
    with pytest.raises(ConfigError, match="give the model that FSDP has wrapped"):
        AdamMini(model.parameters())
    by_function = {
        kind: AdamMini(wrap(kind), partition=lambda _, p: "element" if p.dim() == 2 else None)
        for kind in ("fsdp1-flat", "fsdp2")
    }
    first, second = (
        sorted(line.split()[:4] for line in optimizer.describe().splitlines()[1:])
        for optimizer in by_function.values()
    )
    assert first == second
    groups = [{"params": [p], "lr": 1e-3} for p in model.parameters()]
    losses = losses_of(model, AdamMini(groups, model=model, lr=1.0))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "check",
    [
        other_options,
        infinite_on_one,
        made_too_early,
        nothing_on_one,
        parameters_without_their_model,
    ],
)
def test_ranks_that_differ(check):
    run_ranks(check, world_size=2, timeout_s=60)


# -- state ----------------------------------------------------------------------------------------

STEPS = 4


def save(kind: str, options: dict[str, Any], folder: str) -> list[float]:
    """Train, write a checkpoint, and go on."""
    model = wrap(kind)
    optimizer = AdamMini(model, **options)
    losses_of(model, optimizer, STEPS)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return losses_of(model, optimizer, STEPS, STEPS)


def resume(kind: str, options: dict[str, Any], folder: str) -> list[float]:
    model = wrap(kind)
    optimizer = AdamMini(model, **options)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for group in optimizer.param_groups:
        group["betas"] = tuple(group["betas"])
    return losses_of(model, optimizer, STEPS, STEPS)


def save_all(kinds: list[str], folder: str) -> dict[str, list[float]]:
    return {
        f"{kind}-{i}": save(kind, options, f"{folder}/{kind}-{i}")
        for kind in kinds
        for i, options in enumerate((COLUMNS, INT8))
    }


def resume_all(kinds: list[str], folder: str) -> dict[str, list[float]]:
    return {
        f"{kind}-{i}": resume(kind, options, f"{folder}/{kind}-{i}")
        for kind in kinds
        for i, options in enumerate((COLUMNS, INT8))
    }


# FSDP1's load fails in torch (2.13) on a rank that has nothing of a tensor, also with its AdamW.
@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [(4, 2, ["fsdp2", "fsdp1", "fsdp1-flat"]), (2, 4, ["fsdp2"])],
)
def test_a_checkpoint_serves_another_number_of_ranks(before, after, kinds, tmp_path):
    expected = run_ranks(save_all, kinds, str(tmp_path), world_size=before, timeout_s=100)[0]
    for found in run_ranks(resume_all, kinds, str(tmp_path), world_size=after, timeout_s=100):
        for name, losses in found.items():
            rel = 1e-6 if name.endswith("0") else 1e-3
            assert losses == pytest.approx(expected[name], rel=rel), name


def test_a_checkpoint_serves_one_process(tmp_path):
    [expected, _] = run_ranks(save, "fsdp2", COLUMNS, str(tmp_path), world_size=2, timeout_s=60)
    assert resume("none", COLUMNS, str(tmp_path)) == pytest.approx(expected, rel=1e-6)


def state_formats() -> None:
    """DTensors cut as the parameter; of FSDP1 what AdamW would have."""
    model = wrap("fsdp2")
    optimizer = AdamMini(model, lr=1e-3, momentum_dtype="int8", partition={".*stack": "column"})
    losses_of(model, optimizer, 1)
    state = optimizer.state[model.layers[0].q_proj.weight]
    local = {n: tuple(v.to_local().shape) for n, v in state.items() if isinstance(v, DTensor)}
    rows = DIM // dist.get_world_size()
    assert local == {"exp_avg": (rows, DIM), "exp_avg_scale": (rows, 1), "exp_avg_sq": (rows, 1)}
    assert state["exp_avg"].dtype == torch.int8
    whole = state["exp_avg_sq"].full_tensor().flatten()
    assert len(whole.unique()) == HEADS
    stack = optimizer.state[model.layers[0].stack]["exp_avg_sq"]
    assert stack.shape == (3, 1, 70)
    for kind in ("fsdp1", "fsdp1-flat"):
        model = wrap(kind)
        optimizer = AdamMini(model, lr=1e-3, momentum_dtype="int8")
        losses_of(model, optimizer, 1)
        saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
        name = "layers.0.q_proj.weight"
        for moment in ("exp_avg", "exp_avg_sq"):
            assert saved[name][moment].shape == (DIM, DIM)
            assert saved[name][moment].dtype == torch.float32
        assert torch.allclose(saved[name]["exp_avg_sq"][:, 0], whole, rtol=1e-5)


def test_formats_of_state():
    run_ranks(state_formats, world_size=4, timeout_s=60)
