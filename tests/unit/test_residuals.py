"""Residuals by parameter name: their size, and that a bad state dict changes nothing."""

import copy

import pytest
import torch
from torch import Tensor

from commrt.codecs import Window, parse
from commrt.errors import StateError
from commrt.hooks.residuals import Residuals

CPU = torch.device("cpu")
NUMELS = {"first.weight": 1000, "second.weight": 129, "one": 1}


def filled(codec: str = "loco4") -> Residuals:
    """Residuals after one encoding of random gradients."""
    parsed = parse(codec)
    residuals = Residuals(parsed)
    generator = torch.Generator().manual_seed(0)
    for name, numel in NUMELS.items():
        residuals.add(name, numel, CPU)
        num_blocks = parsed.num_blocks(numel)
        payload = torch.zeros(parsed.payload_bytes(num_blocks), dtype=torch.uint8)
        gradient = torch.randn(numel, generator=generator)
        window = Window(0, num_blocks, 0)
        parsed.encode(gradient, payload, window, residual=residuals.get(name), seed=0)
    return residuals


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_state_round_trips_to_the_bit() -> None:
    state = filled().state_dict()
    assert any(payload.any() for payload in state.values())
    fresh = Residuals(parse("loco4"))
    for name, numel in NUMELS.items():
        fresh.add(name, numel, CPU)
    fresh.load_state_dict(state)
    assert_same(fresh.state_dict(), state)


def test_the_state_is_a_copy_both_ways() -> None:
    residuals = filled()
    state = residuals.state_dict()
    before = copy.deepcopy(state)
    residuals.reset(["first.weight", "second.weight"])
    assert_same(state, before)
    residuals.load_state_dict(state)
    residuals.reset(["first.weight", "second.weight"])
    assert_same(state, before)


def test_adding_a_parameter_again_keeps_its_residual() -> None:
    residuals = filled()
    before = residuals.state_dict()
    residuals.add("first.weight", 1000, CPU)
    assert_same(residuals.state_dict(), before)


def test_reset_empties_the_named_ones_only() -> None:
    residuals = filled()
    before = residuals.state_dict()
    residuals.reset(["first.weight", "not compressed"])
    after = residuals.state_dict()
    assert not after["first.weight"].any()
    assert torch.equal(after["second.weight"], before["second.weight"])


def test_the_norm_is_of_all_residuals_together() -> None:
    residuals = filled()
    codec, total = parse("loco4"), 0.0
    for name, payload in residuals.state_dict().items():
        error = torch.empty(NUMELS[name])
        codec.decode_residual(payload, error)
        total += float(error.double().square().sum())
    assert total > 0
    assert residuals.norm() == pytest.approx(total**0.5)
    residuals.reset(list(NUMELS))
    assert residuals.norm() == 0.0


@pytest.mark.parametrize("codec", ["none", "block8"])
def test_a_codec_without_memory_has_no_residuals(codec: str) -> None:
    residuals = Residuals(parse(codec))
    residuals.add("weight", 1000, CPU)
    assert residuals.get("weight") is None
    assert residuals.num_bytes() == 0
    assert residuals.norm() == 0.0
    assert residuals.state_dict() == {}


@pytest.mark.parametrize(("codec", "most"), [("loco4", 1.1), ("loco4:residual=4", 0.6)])
def test_memory_of_a_big_parameter(codec: str, most: float) -> None:
    """Bytes a parameter, counted from the buffers."""
    numel = 768 * 3072
    residuals = Residuals(parse(codec))
    residuals.add("weight", numel, CPU)
    buffer = residuals.get("weight")
    assert buffer is not None
    assert residuals.num_bytes() == buffer.numel() * buffer.element_size()
    assert residuals.num_bytes() / numel <= most


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "second.weight"), "missing second.weight, unexpected none"),
        (
            lambda state: state | {"third": torch.zeros(1, dtype=torch.uint8)},
            "missing none, unexpected third",
        ),
        (lambda state: {}, "missing first.weight, one, second.weight, unexpected none"),
        (
            lambda state: state | {"second.weight": state["first.weight"]},
            r"'second.weight' is torch.uint8 \(1040,\): must be torch.uint8 \(260,\)",
        ),
        (
            lambda state: state | {"one": state["one"].float()},
            r"'one' is torch.float32 \(130,\): must be torch.uint8 \(130,\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_says_why_and_changes_nothing(change, message: str) -> None:
    residuals = filled()
    before = residuals.state_dict()
    bad = change({name: torch.ones_like(value) for name, value in before.items()})
    with pytest.raises(StateError, match=message):
        residuals.load_state_dict(bad)
    assert_same(residuals.state_dict(), before)


def test_many_missing_names_are_cut_short() -> None:
    residuals = Residuals(parse("loco4"))
    for index in range(10):
        residuals.add(f"layer.{index}", 128, CPU)
    with pytest.raises(StateError, match=r"missing layer\.0, .*layer\.7 and 2 more, unexpected"):
        residuals.load_state_dict({})
