"""Residuals by parameter name: their size, their mean over a world, and that a bad state dict
changes nothing.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from commrt.codecs import Window, parse
from commrt.errors import StateError
from commrt.hooks.residuals import Residuals, Shard

NUMELS = {"first.weight": 1000, "second.weight": 129, "one": 1}


def whole(numel: int) -> list[Shard]:
    return [Shard(0, numel, numel)]


def empty(codec: str = "loco4") -> Residuals:
    residuals = Residuals(parse(codec))
    for name, numel in NUMELS.items():
        residuals.add(name, torch.empty(numel), whole(numel))
    return residuals


def filled(codec: str = "loco4", seed: int = 0) -> Residuals:
    """Residuals after one encoding of random gradients."""
    parsed = parse(codec)
    residuals = empty(codec)
    generator = torch.Generator().manual_seed(seed)
    for name, numel in NUMELS.items():
        num_blocks = parsed.num_blocks(numel)
        payload = torch.zeros(parsed.payload_bytes(num_blocks), dtype=torch.uint8)
        gradient = torch.randn(numel, generator=generator)
        window = Window(0, num_blocks, 0)
        parsed.encode(gradient, payload, window, residual=residuals.get(name), seed=0)
    return residuals


def payloads(residuals: Residuals) -> dict[str, Tensor]:
    return residuals.state_dict()["residuals"]


def values(residuals: Residuals, codec: str = "loco4") -> dict[str, Tensor]:
    """The decoded residuals."""
    decoded = {name: torch.empty(numel) for name, numel in NUMELS.items()}
    for name, payload in payloads(residuals).items():
        parse(codec).decode_residual(payload, decoded[name])
    return decoded


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_state_round_trips_to_the_bit() -> None:
    state = filled().state_dict()
    assert any(payload.any() for payload in state["residuals"].values())
    fresh = empty()
    fresh.check(state)
    assert fresh.fits(state)
    fresh.load(state)
    assert_same(payloads(fresh), state["residuals"])


def test_the_state_is_a_copy_both_ways() -> None:
    residuals = filled()
    state = residuals.state_dict()
    before = copy.deepcopy(state["residuals"])
    residuals.reset(["first.weight", "second.weight"])
    assert_same(state["residuals"], before)
    residuals.load(state)
    residuals.reset(["first.weight", "second.weight"])
    assert_same(state["residuals"], before)


def test_adding_a_parameter_again_keeps_its_residual() -> None:
    residuals = filled()
    before = payloads(residuals)
    residuals.add("first.weight", torch.empty(1000), whole(1000))
    assert_same(payloads(residuals), before)


def test_reset_empties_the_named_ones_only() -> None:
    residuals = filled()
    before = payloads(residuals)
    residuals.reset(["first.weight", "not compressed"])
    after = payloads(residuals)
    assert not after["first.weight"].any()
    assert torch.equal(after["second.weight"], before["second.weight"])


def test_the_norm_is_of_all_residuals_together() -> None:
    residuals = filled()
    total = sum(float(error.double().square().sum()) for error in values(residuals).values())
    assert total > 0
    assert residuals.norm() == pytest.approx(total**0.5)
    residuals.reset(list(NUMELS))
    assert residuals.norm() == 0.0


@pytest.mark.parametrize("ratio", [2.0, 0.5, 2.0**-40, 2.0**40])
def test_rescaling_by_a_power_of_two_is_exact(ratio: float) -> None:
    residuals = filled()
    before = values(residuals)
    residuals.rescale_(torch.tensor(ratio))
    assert_same(values(residuals), {name: error * ratio for name, error in before.items()})
    residuals.rescale_(torch.tensor(1 / ratio))
    assert_same(values(residuals), before)


def test_rescaling_never_makes_a_residual_that_is_not_finite_or_subnormal() -> None:
    residuals = filled()
    residuals.rescale_(torch.tensor(2.0**-126))
    residuals.rescale_(torch.tensor(2.0**-20))
    assert residuals.norm() == 0.0
    residuals = filled()
    for _ in range(3):
        residuals.rescale_(torch.tensor(2.0**120))
    assert all(error.isfinite().all() for error in values(residuals, "loco4:beta=0").values())


def test_the_mean_of_a_world_is_what_every_rank_gets() -> None:
    """Three ranks become others: each has the mean, rounded its own way, the mean of which is
    unbiased.
    """
    world = [filled(seed=seed) for seed in range(3)]
    states = [residuals.state_dict() for residuals in world]
    mean = {name: sum(values(residuals)[name] for residuals in world) / 3 for name in NUMELS}
    copies = []
    for rank in range(64):
        fresh = empty()
        fresh.load_mean(states, seed=rank)
        copies.append(values(fresh))
    for name, expected in mean.items():
        step = 1.02 * float(expected.abs().max()) / 127
        for found in copies:
            assert (found[name] - expected).abs().max() <= step
        average = sum(found[name] for found in copies) / len(copies)
        # The mean of 64 uniform roundings has a standard deviation of at most step / 16.
        assert (average - expected).abs().max() <= 6 * step / 16


def test_shares_of_a_node_are_put_together() -> None:
    """Two nodes of two ranks, each holding half a parameter, become one rank, and back."""
    codec = parse("loco4")
    halves = [Shard(0, 512, 1000), Shard(512, 1000, 1000)]
    generator = torch.Generator().manual_seed(0)
    states, errors = [], []
    for shard in halves * 2:
        part = Residuals(codec)
        part.add("weight", torch.empty(1000), [shard])
        error = torch.randn(shard.size, generator=generator)
        codec.encode_residual(error, part.get("weight"), seed=0)
        codec.decode_residual(part.get("weight"), error)
        states.append(part.state_dict())
        errors.append(error)
    expected = (torch.cat(errors[:2]) + torch.cat(errors[2:])) / 2
    for shard in (*whole(1000), *halves):
        fresh = Residuals(codec)
        fresh.add("weight", torch.empty(1000), [shard])
        fresh.check(states[0])
        fresh.load_mean(states, seed=1)
        found = torch.empty(shard.size)
        codec.decode_residual(fresh.get("weight"), found)
        step = 1.02 * float(expected.abs().max()) / 127
        lost = expected[shard.begin : shard.end] - found
        assert 0 < lost.abs().max() <= step
        carry = fresh.carry("weight")
        assert carry is not None
        torch.testing.assert_close((1 - codec.beta) * carry, lost, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("codec", ["none", "block8"])
def test_a_codec_without_memory_has_no_residuals(codec: str) -> None:
    residuals = empty(codec)
    assert residuals.get("first.weight") is None
    assert residuals.num_bytes() == 0
    assert residuals.norm() == 0.0
    assert residuals.state_dict() == {
        "residuals": {},
        "shards": {},
        "carries": {},
        "bases": {},
    }


@pytest.mark.parametrize(("codec", "most"), [("loco4", 1.1), ("loco4:residual=4", 0.6)])
def test_memory_of_a_big_parameter(codec: str, most: float) -> None:
    """Bytes a parameter, counted from the buffers."""
    numel = 768 * 3072
    residuals = Residuals(parse(codec))
    residuals.add("weight", torch.empty(numel), whole(numel))
    buffer = residuals.get("weight")
    assert buffer is not None
    assert residuals.num_bytes() == buffer.numel() * buffer.element_size()
    assert residuals.num_bytes() / numel <= most


def changed(state: dict[str, Any], **payloads: Tensor | None) -> dict[str, Any]:
    """With these residuals instead; None takes one away. An unknown one is of one element."""
    residuals = {
        **state["residuals"],
        **{name.replace("_", "."): p for name, p in payloads.items()},
    }
    residuals = {name: payload for name, payload in residuals.items() if payload is not None}
    return {"residuals": residuals, "shards": {"third": [[0, 1, 1]], **state["shards"]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: changed(state, second_weight=None),
            "missing second.weight, unexpected none",
        ),
        (
            lambda state: changed(state, third=torch.zeros(130, dtype=torch.uint8)),
            "missing none, unexpected third",
        ),
        (
            lambda state: {"residuals": {}, "shards": {}},
            "missing first.weight, one, second.weight, unexpected none",
        ),
        (
            lambda state: changed(state, second_weight=state["residuals"]["first.weight"]),
            r"'second.weight' is torch.uint8 \(1040,\): must be torch.uint8 \(260,\)",
        ),
        (
            lambda state: changed(state, one=state["residuals"]["one"].float()),
            r"'one' is torch.float32 \(130,\): must be torch.uint8 \(130,\)",
        ),
        (
            lambda state: {**state, "shards": {**state["shards"], "one": [[0, 1, 2]]}},
            "residual of 'one' is of 2 elements: must be 1",
        ),
    ],
)
def test_a_state_that_does_not_fit_says_why(change, message: str) -> None:
    residuals = filled()
    with pytest.raises(StateError, match=message):
        residuals.check(change(residuals.state_dict()))


def test_a_state_of_another_share_does_not_fit() -> None:
    residuals, state = filled(), filled().state_dict()
    state["shards"]["first.weight"] = [[0, 128, 1000]]
    assert not residuals.fits(state)


def test_many_missing_names_are_cut_short() -> None:
    residuals = Residuals(parse("loco4"))
    for index in range(10):
        residuals.add(f"layer.{index}", torch.empty(128), whole(128))
    with pytest.raises(StateError, match=r"missing layer\.0, .*layer\.7 and 2 more, unexpected"):
        residuals.check({"residuals": {}, "shards": {}})
