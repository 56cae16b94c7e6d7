"""AdamMini on one rank: its rule on whole models, and the contract of torch's optimizers."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from commrt.errors import ConfigError, StateError
from commrt.optim import AdamMini
from commrt.training.config import ModelConfig, TrainConfig
from commrt.training.model import GPT, next_byte_losses

MOMENTA = ("fp32", "bf16", "int8")


def gpt(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return GPT(ModelConfig(dim=64, num_layers=1, num_heads=4, seq_len=32)).to(dtype)


def backward(model, step=0):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(8, (2, 33), generator=generator)
    loss = next_byte_losses(model(tokens[:, :-1]).float(), tokens[:, 1:]).mean()
    loss.backward()
    return loss


def train(model, optimizer, steps=5, first=0):
    losses = []
    for step in range(first, first + steps):
        losses.append(backward(model, step).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same(first, second):
    for (name, a), (_, b) in zip(
        first.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def blocks(optimizer, parameter):
    [layout] = optimizer._layouts[parameter]
    return layout.blocks


class Float64AdamMini:
    """The rule, block by block, in float64."""

    def __init__(self, model, optimizer, lr, betas, eps, weight_decay):
        self.options, self.step_number = (lr, betas, eps, weight_decay), 0
        self.entries = [
            (
                p,
                blocks(optimizer, p),
                p.detach().double(),
                torch.zeros(p.shape, dtype=torch.float64),
                {},
            )
            for p in model.parameters()
        ]

    def step(self):
        lr, (beta1, beta2), eps, decay = self.options
        self.step_number += 1
        t = self.step_number
        for p, of_p, weight, moment, second in self.entries:
            grad = p.grad.double()
            moment.mul_(beta1).add_(grad, alpha=1 - beta1)
            weight.mul_(1 - lr * decay)
            for index in indices(of_p):
                mean = grad[index].square().mean()
                v = second.get(str(index), 0.0) * beta2 + (1 - beta2) * mean
                second[str(index)] = v
                root = math.sqrt(v / (1 - beta2**t)) + eps
                weight[index] -= lr / (1 - beta1**t) / root * moment[index]

    def difference(self):
        """Largest, relative to the weights' size."""
        return max(((p - w).abs().max() / w.abs().max()).item() for p, _, w, _, _ in self.entries)


def indices(blocks):
    """The indices of every block, of parameters of one or two dimensions."""
    if blocks.axis == "element":
        yield from itertools.product(*map(range, blocks.shape))
        return
    line = 0
    for lines, size in blocks.block_sizes():
        for first in range(line, line + lines, size):
            part = slice(first, first + size)
            yield part if blocks.axis == "row" else (slice(None), part)
        line += lines


@pytest.mark.parametrize("partition", [None, {".*weight": "column"}, {".*": "tensor"}])
def test_it_is_the_rule(partition):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 300), nn.ReLU(), nn.Linear(300, 5))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamMini(model, partition=partition, **options)
    exact = Float64AdamMini(model, optimizer, **options)
    for step in range(5):
        model.zero_grad()
        torch.manual_seed(step)
        model(torch.randint(7, (16,))).square().mean().backward()
        exact.step()
        optimizer.step()
    assert exact.difference() < 1e-6


def test_with_an_element_a_block_it_is_adamw():
    first, second = gpt(), gpt()
    ours = AdamMini(first, lr=1e-3, weight_decay=0.1, partition={".*": "element"})
    theirs = torch.optim.AdamW(second.parameters(), lr=1e-3, weight_decay=0.1)
    for expected, found in zip(train(first, ours), train(second, theirs), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("momentum_dtype", MOMENTA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_mode", ["master", "residual", "stochastic"])
def test_every_format_trains_and_resumes_to_the_bit(momentum_dtype, dtype, weight_mode):
    options = {"lr": 2e-3, "momentum_dtype": momentum_dtype, "weight_mode": weight_mode}
    model = gpt(dtype)
    optimizer = AdamMini(model, **options)
    losses = train(model, optimizer, 8)
    assert losses[-1] < losses[0] - 0.2
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved)
    resumed = gpt(dtype, seed=1)
    resumed.load_state_dict(weights)
    again = AdamMini(resumed, **options)
    again.load_state_dict(state)
    for before, after in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert {n: v.dtype for n, v in before.items()} == {n: v.dtype for n, v in after.items()}
    assert train(model, optimizer, 3, 8) == train(resumed, again, 3, 8)
    assert_same(model, resumed)


@pytest.mark.parametrize(
    ("momentum_dtype", "most"), [("fp32", 4.05), ("bf16", 2.05), ("int8", 1.05)]
)
def test_bytes_of_state(momentum_dtype, most):
    """A parameter of a model in the shape of GPT-2 small; and those there are, counted."""
    with torch.device("meta"):
        large = GPT(TrainConfig.make(preset="124m").model)
    numel = sum(parameter.numel() for parameter in large.parameters())
    optimizer = AdamMini(large, momentum_dtype=momentum_dtype)
    assert sum(map(optimizer.state_bytes_of, large.parameters())) / numel <= most
    model = gpt()
    optimizer = AdamMini(model, momentum_dtype=momentum_dtype)
    train(model, optimizer, 1)
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    counted = sum(value.numel() * value.element_size() for value in tensors)
    assert counted == sum(map(optimizer.state_bytes_of, model.parameters()))


def test_a_table_of_the_blocks():
    text = AdamMini(gpt(), momentum_dtype="int8").describe()
    row = next(line for line in text.splitlines() if line.startswith("blocks.0.qkv.weight"))
    assert row.split()[1:4] == ["192", "x", "64"]
    assert "queries, keys: a head" in row
    assert "72" in row.split()
    assert "int8" in row


# -- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_mode", ["master", "residual", "stochastic"])
def test_zero_gradients_at_rate_zero_change_no_bit(dtype, weight_mode):
    model = gpt(dtype)
    before = copy.deepcopy(model)
    optimizer = AdamMini(model, lr=0.0, weight_mode=weight_mode, momentum_dtype="int8")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_same(before, model)
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_rate_in_a_tensor_and_schedulers():
    models = [gpt() for _ in range(2)]
    first = AdamMini(models[0], lr=1e-3)
    second = AdamMini(models[1], lr=torch.tensor(1e-3))
    assert train(models[0], first) == pytest.approx(train(models[1], second), rel=1e-6)
    for make in (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=True),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    ):
        scheduler = make(first)
        before = first.param_groups[0]["lr"]
        train(models[0], first, 1)
        scheduler.step()
        assert first.param_groups[0]["lr"] != before


def test_closures_and_going_up():
    model = nn.Linear(4, 1)
    optimizer = AdamMini(model, lr=0.1, maximize=True)
    inputs = torch.ones(1, 4)

    def closure():
        optimizer.zero_grad()
        value = model(inputs).sum()
        value.backward()
        return value

    values = [optimizer.step(closure).item() for _ in range(5)]
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.5


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_copies_go_on_alike(duplicate):
    model = gpt()
    optimizer = AdamMini(model, lr=1e-3, momentum_dtype="int8", max_grad_norm=1.0)
    train(model, optimizer, 2)
    other, other_optimizer = duplicate((model, optimizer))
    assert train(model, optimizer, 2, 2) == train(other, other_optimizer, 2, 2)
    assert_same(model, other)


def test_frozen_parameters_and_late_groups():
    model = gpt()
    model.embedding.weight.requires_grad_(False)
    frozen = model.embedding.weight.clone()
    optimizer = AdamMini(model.blocks, lr=1e-3)
    late = [("norm.weight", model.norm.weight), ("positions", model.positions)]
    optimizer.add_param_group({"params": late, "lr": 1e-2, "weight_decay": 0.0})
    optimizer.add_param_group({"params": [("embedding.weight", model.embedding.weight)]})
    losses = train(model, optimizer, 5)
    assert losses[-1] < losses[0]
    assert torch.equal(model.embedding.weight, frozen)
    assert model.embedding.weight not in optimizer.state
    assert optimizer.state[model.positions]["exp_avg_sq"].shape == (32, 1)


@pytest.mark.parametrize(
    "params",
    [
        lambda m: m,
        lambda m: list(m.named_parameters()),
        lambda m: [{"params": list(m.named_parameters()), "lr": 1e-3}],
    ],
)
def test_what_it_is_made_of(params):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = AdamMini(params(model), partition={r"0\.weight": "tensor"})
    assert blocks(optimizer, model[0].weight).num_blocks == 1
    assert blocks(optimizer, model[1].weight).num_blocks == 2
    assert blocks(AdamMini(model.parameters()), model[1].weight).num_blocks == 2
    chosen = AdamMini(model, partition=lambda name, p: "element" if p.dim() == 2 else None)
    assert blocks(chosen, model[0].weight).axis == "element"


def test_clipping_is_torchs():
    first, second = gpt(), gpt()
    ours = AdamMini(first, lr=1e-3, max_grad_norm=0.1)
    theirs = AdamMini(second, lr=1e-3)
    for step in range(4):
        backward(first, step)
        backward(second, step)
        norm = nn.utils.clip_grad_norm_(second.parameters(), 0.1)
        ours.step()
        theirs.step()
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_grad_scaler_changes_nothing_but_the_range():
    first, second = gpt(), gpt()
    optimizers = AdamMini(first, lr=1e-3), AdamMini(second, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(4):
        backward(first, step)
        optimizers[0].step()
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(8, (2, 33), generator=generator)
        loss = next_byte_losses(second(tokens[:, :-1]), tokens[:, 1:]).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert_same(first, second)
    second.norm.weight.grad = torch.full_like(second.norm.weight, math.inf)
    before = copy.deepcopy(second)
    scaler.step(optimizers[1])
    scaler.update()
    assert_same(before, second)


def test_weights_that_are_not_contiguous():
    torch.manual_seed(0)
    first = nn.Conv2d(8, 16, 3)
    second = copy.deepcopy(first).to(memory_format=torch.channels_last)
    inputs = torch.randn(2, 8, 9, 9)
    optimizers = AdamMini(first, lr=1e-2), AdamMini(second, lr=1e-2)
    for _ in range(3):
        for model, optimizer in zip((first, second), optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    assert not second.weight.is_contiguous()
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vectors", ["element", "tensor"])
def test_empty_parameters(vectors):
    parameters = [nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0, 4)),
                  nn.Parameter(torch.tensor(1.0))]  # fmt: skip
    optimizer = AdamMini(parameters, max_grad_norm=1.0, vectors=vectors)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameters[2].item() < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "must be in"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"momentum_dtype": "int4"}, "fp32, bf16, int8"),
        ({"weight_mode": "none"}, "auto, master, residual, stochastic"),
        ({"vectors": "row"}, "element or tensor"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"seed": -1}, "seed"),
        ({"partition": {".*": "head"}}, "blocks 'head'"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ConfigError, match=message):
        AdamMini(nn.Linear(4, 4), **options)


def test_dtypes_that_are_none():
    with pytest.raises(ConfigError, match="complex64: must be float32"):
        AdamMini([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(ConfigError, match="must be 'master'"):
        AdamMini(nn.Linear(2, 2).half(), weight_mode="residual")


def test_states_of_another_format_are_refused():
    model = gpt()
    optimizer = AdamMini(model)
    train(model, optimizer, 1)
    with pytest.raises(StateError, match="exp_avg"):
        AdamMini(gpt(), momentum_dtype="bf16").load_state_dict(optimizer.state_dict())
