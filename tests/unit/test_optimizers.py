"""AdamW8bit, Lion, Adan and MoFO on one rank; what all optimizers share is in test_adam_mini."""

import copy
import io

import pytest
import torch
from torch import nn

from commrt.errors import ConfigError, StateError
from commrt.optim import AdamMini, AdamW8bit, Adan, Lion, MoFO
from tests.unit.test_adam_mini import assert_same, backward, gpt, train

FAMILY = [AdamW8bit, Lion, Adan, MoFO]
RATES = {AdamW8bit: 2e-3, Lion: 3e-4, Adan: 2e-3, MoFO: 4e-3}


def exact_adamw(g, w, s, t, lr, decay):
    m = s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
    v = s["v"] = 0.999 * s.get("v", 0.0) + 0.001 * g * g
    return (1 - lr * decay) * w - lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def exact_lion(g, w, s, t, lr, decay):
    m = s.get("m", torch.zeros_like(w))
    s["m"] = 0.99 * m + 0.01 * g
    return (1 - lr * decay) * w - lr * (0.9 * m + 0.1 * g).sign()


def exact_adan(g, w, s, t, lr, decay):
    d = g - s.get("g", g)
    s["g"] = g
    m = s["m"] = 0.98 * s.get("m", 0.0) + 0.02 * g
    n = s["n"] = 0.92 * s.get("n", 0.0) + 0.08 * d
    v = s["v"] = 0.99 * s.get("v", 0.0) + 0.01 * (g + 0.92 * d) ** 2
    step = m / (1 - 0.98**t) + 0.92 * n / (1 - 0.92**t)
    return (w - lr * step / ((v / (1 - 0.99**t)).sqrt() + 1e-8)) / (1 + lr * decay)


def exact_mofo(g, w, s, t, lr, decay):
    moved = exact_adamw(g, w, s, t, lr, decay)
    number = -(-w.numel() // 5)
    is_moved = s["m"].abs() >= s["m"].abs().flatten().topk(number).values[-1]
    return torch.where(is_moved, moved, w)


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda p: AdamW8bit(p, 1e-2, weight_decay=0.1, momentum_dtype="fp32"), exact_adamw),
        (lambda p: Lion(p, 1e-2, weight_decay=0.1), exact_lion),
        (lambda p: Adan(p, 1e-2, weight_decay=0.1), exact_adan),
        (lambda p: MoFO(p, 1e-2, weight_decay=0.1, fraction=0.2), exact_mofo),
    ],
)
def test_they_are_the_rules(make, exact):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 13), (300,), (2, 3, 4), ()]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    weights = [parameter.detach().double() for parameter in parameters]
    states = [{} for _ in shapes]
    optimizer = make(parameters)
    for t in range(1, 7):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(shapes[i], generator=generator)
            grad = parameter.grad.double()
            weights[i] = exact(grad, weights[i], states[i], t, 1e-2, 0.1)
        optimizer.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("momentum_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", FAMILY)
def test_every_format_trains_and_resumes_to_the_bit(kind, momentum_dtype):
    options = {"lr": RATES[kind], "momentum_dtype": momentum_dtype, "max_grad_norm": 1.0}
    if kind is MoFO and momentum_dtype == "int8":
        with pytest.raises(ConfigError, match="must be fp32 or bf16"):
            MoFO(gpt(), **options)
        return
    model = gpt(torch.bfloat16)
    optimizer = kind(model, weight_mode="residual", **options)
    losses = train(model, optimizer, 8)
    assert losses[-1] < losses[0] - 0.1
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved)
    resumed = gpt(torch.bfloat16, seed=1)
    resumed.load_state_dict(weights)
    again = kind(resumed, weight_mode="residual", **options)
    again.load_state_dict(state)
    assert train(model, optimizer, 3, 8) == train(resumed, again, 3, 8)
    assert_same(model, resumed)


@pytest.mark.parametrize("kind", FAMILY)
def test_zero_gradients_at_rate_zero_change_no_bit(kind):
    model = gpt()
    before = copy.deepcopy(model)
    optimizer = kind(model, lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_same(before, model)
    assert len(optimizer.state) == len(list(model.parameters()))


def test_bytes_of_8_bit_moments():
    model = gpt()
    matrix = model.blocks[0].up.weight
    assert AdamW8bit(model).state_bytes_of(matrix) == 2 * (256 * 64 + 256 * 4) + 4
    assert Lion(model, momentum_dtype="int8").state_bytes_of(matrix) == 256 * 64 + 256 * 4 + 4


@pytest.mark.parametrize("make", [lambda m: AdamMini(m, 1e-3, momentum_dtype="int8"), AdamW8bit])
def test_adamws_state_goes_on(make):
    """Moments are coded, and a block's second moment is the mean of its elements'."""
    model = gpt()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, adamw, 10)
    goes_on = copy.deepcopy(model)
    optimizer = make(goes_on)
    optimizer.load_state_dict(adamw.state_dict())
    expected = train(model, adamw, 5, 10)
    assert train(goes_on, optimizer, 5, 10) == pytest.approx(expected, rel=0.02)
    state = optimizer.state[goes_on.blocks[0].up.weight]
    assert state["exp_avg"].dtype == torch.int8
    assert state["step"].item() == 15
    with pytest.raises(StateError, match="exp_avg_diff"):
        Adan(gpt()).load_state_dict(adamw.state_dict())


def test_adamws_second_moments_are_averaged():
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 8, bias=False))
    adamw = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 6)).square().mean().backward()
    adamw.step()
    optimizer = AdamMini(model, partition={"0.weight": "row:2", "1.weight": "column:4"})
    optimizer.load_state_dict(adamw.state_dict())
    first, second = (adamw.state[p]["exp_avg_sq"] for p in model.parameters())
    found = [optimizer.state[p]["exp_avg_sq"] for p in model.parameters()]
    rows = first.view(2, 12).mean(1).repeat_interleave(2)[:, None]
    torch.testing.assert_close(found[0], rows)
    torch.testing.assert_close(found[1], second.mean()[None, None].expand(1, 4))


def test_adamws_state_of_vectors_and_of_bf16():
    vector = nn.Linear(16, 1)
    adamw = torch.optim.AdamW(vector.parameters())
    vector(torch.randn(3, 16)).square().mean().backward()
    adamw.step()
    optimizer = AdamMini(vector, vectors="tensor")
    optimizer.load_state_dict(adamw.state_dict())
    mean = adamw.state[vector.weight]["exp_avg_sq"].mean()
    torch.testing.assert_close(
        optimizer.state[vector.weight]["exp_avg_sq"], mean.expand_as(vector.weight)[:, :1]
    )
    model = gpt(torch.bfloat16)
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, 2)
    optimizer = AdamW8bit(model)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.state[model.blocks[0].up.weight]["master"].dtype == torch.float32


def test_a_load_that_fails_changes_nothing():
    model = gpt()
    optimizer = AdamMini(model, momentum_dtype="int8")
    train(model, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    other = gpt()
    bf16 = AdamMini(other, momentum_dtype="bf16")
    train(other, bf16, 1)
    with pytest.raises(StateError, match="exp_avg"):
        optimizer.load_state_dict(bf16.state_dict())
    for id_, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][id_][name]) for name, value in state.items())


def test_sparse_gradients_are_refused():
    model = nn.Embedding(4, 4, sparse=True)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match=r"gradient of 'weight' .* must be dense"):
        Lion(model).step()


def test_groups_that_are_refused_leave_nothing_behind():
    model = nn.Linear(4, 4)
    optimizer = Lion([model.weight])
    with pytest.raises(ConfigError, match="complex64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2).to(torch.complex64))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ConfigError, match=r"betas=\(0.9, 0.99\): must be 3"):
        Adan(model, betas=(0.9, 0.99))
    empty = AdamMini([{"params": []}], max_grad_norm=1.0)
    empty.step()


def test_mofo_moves_a_fraction_and_keeps_the_rest():
    model = gpt()
    optimizer = MoFO(model, lr=1e-3, fraction=0.05)
    for step in range(3):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        for old, new in zip(before, model.parameters(), strict=True):
            moved = int((old != new).sum())
            assert moved <= -(-new.numel() // 20)
            assert new.grad.count_nonzero() < new.numel() or moved > 0.04 * new.numel()
    with pytest.raises(ConfigError, match="fraction=0"):
        MoFO(model, fraction=0.0)
