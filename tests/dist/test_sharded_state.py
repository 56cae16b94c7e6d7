"""Checkpoints of a sharded model's communication, from world to world and from kind to kind.

Bit-identical: a run that was saved and loaded half way, and the run that was not. To rounding in
fp32: what a world owes and what another one does that loads its states.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import commrt
from commrt.errors import StateError
from commrt.hooks.gathers import Gathers
from commrt.hooks.residuals import Shard
from commrt.testing import run_ranks
from tests.dist.sharded_checks import (
    states_of_all,
    train,
    whole_weights,
    wrap_as,
)
from tests.dist.small_training import (
    assert_same_on_all_ranks,
    assert_same_owed,
    backward,
    owed,
    same_bits,
    small_model,
)

CODEC = "loco4:block=32"


def made(kind: str, **settings: Any) -> tuple[nn.Module, commrt.hooks.BaseComm]:
    model = wrap_as(kind, small_model())
    return model, commrt.attach(model, CODEC, min_numel=1, **settings)


def save(kind: str, path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Train a little and save everything; the states of all ranks."""
    model, comm = made(kind, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, range(4), backward, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    everything = {"model": weights, "optimizer": moments, "comm": comm.distributed_state()}
    dcp.save(everything, checkpoint_id=path)
    return states_of_all(comm)


def load(
    kind: str, path: Path, settings: dict[str, Any], steps: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[float]]:
    """Load everything and go on; the states of all ranks before and after, and the losses."""
    model, comm = made(kind, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    comm.load_distributed(path)
    loaded = states_of_all(comm)
    losses = train(model, range(4, 4 + steps), backward, optimizer)
    return loaded, states_of_all(comm), losses


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (("fsdp2", 4, {}), [("fsdp2", 2, {}), ("fsdp2", 3, {}), ("ddp", 2, {})]),
        (("ddp", 2, {}), [("fsdp2", 3, {}), ("FULL_SHARD", 2, {})]),
        (("FULL_SHARD", 2, {}), [("fsdp2", 4, {"hierarchy": 2}), ("hsdp", 4, {})]),
        (("hsdp", 4, {}), [("fsdp2", 2, {"residuals": "host"}), ("NO_SHARD", 2, {})]),
    ],
)
def test_what_is_owed_goes_from_world_to_world(
    first: tuple[str, int, dict[str, Any]],
    others: list[tuple[str, int, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """To 1e-6; after the next steps no carry is left, and the losses are near each other."""
    kind, world_size, settings = first
    saved = run_ranks(save, kind, tmp_path, settings, world_size=world_size)[0]
    for kind, world_size, settings in others:
        args = kind, tmp_path, settings, 3
        loaded, trained, losses = run_ranks(load, *args, world_size=world_size)[0]
        assert_same_owed(saved, loaded)
        assert any(state["carries"] for state in loaded)
        assert not any(state["carries"] for state in trained)
        assert all(loss < 1.0 for loss in losses)


def resume(kind: str, path: Path, settings: dict[str, Any]) -> None:
    model, comm = made(kind, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, range(4), backward, optimizer)
    losses = train(model, range(4, 7), backward, optimizer)
    save(kind, path, settings)
    _, states, resumed = load(kind, path, settings, 3)
    assert resumed == losses
    own = comm.state_dict()
    found = states[dist.get_rank()]
    assert own["residuals"].keys() == found["residuals"].keys()
    for name, residual in own["residuals"].items():
        assert same_bits(residual, found["residuals"][name]), name
    assert_same_on_all_ranks(*whole_weights(model).values())


def resume_all(path: Path, cells: list[tuple[str, dict[str, Any]]]) -> None:
    for number, (kind, settings) in enumerate(cells):
        resume(kind, path / str(number), settings)


@pytest.mark.parametrize(
    "cells",
    [
        [
            ("ddp", {}),
            ("fsdp2", {"gather": "block8"}),
            ("fsdp2", {"residuals": "host", "hierarchy": 2}),
            ("fsdp2-keep", {"gather": "delta4"}),
        ],
        [("hsdp", {"intra": "block8"}), ("FULL_SHARD", {}), ("NO_SHARD", {})],
    ],
    ids=["FSDP2", "others"],
)
def test_a_resumed_run_is_the_run(cells: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    run_ranks(resume_all, tmp_path, cells, world_size=4, timeout_s=120)


def keep_differences(path: Path) -> dict[str, Any]:
    """Of weights: what was decoded last goes to another number of ranks too."""
    model, comm = made("fsdp2-keep", gather="delta4")
    train(model, range(3), backward)
    dcp.save({"comm": comm.distributed_state()}, checkpoint_id=path)
    return comm.state_dict()["weights"]


def load_differences(path: Path) -> dict[str, Any]:
    """The weights as all ranks decode them next, before what has moved since is added."""
    model, comm = made("fsdp2-keep", gather="delta4")
    comm.load_distributed(path)
    with torch.no_grad(), mock.patch.object(Gathers, "_add_differences"):
        model(torch.zeros(1, 32))
    return comm.state_dict()["weights"]


def put_together(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for state in states:
        for name, (shard, values) in state.items():
            target = whole.setdefault(name, torch.full((Shard(*shard).numel,), torch.nan))
            Shard(*shard).of(target).copy_(values.view(Shard(*shard).outer, -1))
    return whole


def test_weights_decoded_last_go_to_other_worlds(tmp_path: Path) -> None:
    kept = put_together(run_ranks(keep_differences, tmp_path, world_size=4))
    found = put_together(run_ranks(load_differences, tmp_path, world_size=2))
    assert kept.keys() == found.keys() == {"0.weight", "3.weight", "5.weight"}
    for name, weight in kept.items():
        assert same_bits(weight, found[name]), name


def refuse(path: Path) -> None:
    _, comm = made("fsdp2")
    dcp.save({"other": comm.distributed_state()}, checkpoint_id=path)
    with pytest.raises(StateError, match=r"checkpoint has no comm\.\*\.rest"):
        comm.load_distributed(path)
    comm.load_distributed(path, key="other")
    dcp.save({"comm": made("fsdp2", hierarchy=2)[1].distributed_state()}, checkpoint_id=path)
    with pytest.raises(StateError, match="has placement="):
        comm.load_state_dict(made("fsdp2", hierarchy=2)[1].state_dict())
    own = comm.state_dict()
    with pytest.raises(StateError, match=r"has placement="):
        made("FULL_SHARD")[1].load_state_dict(own)
    residuals = {n: r for n, r in own["residuals"].items() if n != "5.weight"}
    with pytest.raises(StateError, match=r"missing 5\.weight"):
        comm.load_state_dict(own | {"residuals": residuals})


def test_states_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run_ranks(refuse, tmp_path, world_size=4)


def owe_nothing_twice() -> None:
    """What is carried is sent once: in the next step."""
    model, comm = made("fsdp2")
    train(model, range(3), backward)
    states = states_of_all(comm)
    fresh, again = made("fsdp2", hierarchy=2)
    again.load_state_dict(states)
    before = owed(states)
    assert all(due.any() for due in before.values())
    backward(fresh, 3)
    assert not again.state_dict()["carries"]


def test_a_carry_is_sent_once() -> None:
    run_ranks(owe_nothing_twice, world_size=4)
