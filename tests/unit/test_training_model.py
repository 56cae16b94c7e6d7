"""The model: its size, its causality, its optimizer and learning rate."""

import pytest
import torch

from commrt.training.config import PRESETS, TrainConfig
from commrt.training.model import GPT, next_byte_losses
from commrt.training.optimizer import learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("preset", "count"),
    [("1m", 842_496), ("7m", 7_246_080), ("25m", 25_482_240), ("124m", 86_039_040)],
)
def test_parameter_counts(preset, count):
    with torch.device("meta"):
        model = GPT(TrainConfig.make(preset=preset).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_every_preset_is_counted():
    assert set(PRESETS) == {"1m", "7m", "25m", "124m"}


def test_later_bytes_do_not_change_earlier_predictions():
    torch.manual_seed(0)
    model = GPT(TrainConfig.make(seq_len=12).model)
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = torch.randint(256, (2, 5))
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_an_untrained_model_guesses_evenly():
    torch.manual_seed(0)
    tokens = torch.randint(256, (4, 33))
    losses = next_byte_losses(GPT(TrainConfig.make().model)(tokens[:, :-1]), tokens[:, 1:])
    assert losses.shape == (4, 32)
    assert losses.mean().item() == pytest.approx(torch.tensor(256.0).log().item(), rel=0.02)


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = TrainConfig.make(lr=1.0, warmup=10, steps=110)
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("warmup", [0, 100])
def test_learning_rate_when_all_or_nothing_is_warm_up(warmup):
    config = TrainConfig.make(lr=1.0, warmup=warmup, steps=100)
    assert all(0 < learning_rate(step, config) <= 1 for step in range(101))


def test_only_matrices_decay():
    model = GPT(TrainConfig.make().model)
    optimizer = make_optimizer(model, TrainConfig.make(weight_decay=0.3))
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert decay[parameter] == (0.3 if parameter.dim() >= 2 else 0.0)
