"""Checkpoints of the communication, and settings and models that do not fit.

Bit-identical: a run that was saved and loaded half way, and the run that was not. To rounding
in fp32: what a world still owes and what another one does that loads its states.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.errors import ConfigError, PeerMismatchError, StateError
from commrt.testing import run_ranks
from tests.dist.small_training import (
    all_of,
    assert_same_on_all_ranks,
    assert_same_owed,
    backward,
    same_bits,
    small_model,
    train,
    weights,
    wrap,
)

CPU = torch.device("cpu")


def assert_same_state(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Equal to the bit, residuals and all else."""
    assert first.keys() == second.keys()
    residuals = first["residuals"], second["residuals"]
    assert residuals[0].keys() == residuals[1].keys()
    assert all(same_bits(residuals[0][name], residuals[1][name]) for name in residuals[0])
    others = [{key: state[key] for key in state if key != "residuals"} for state in (first, second)]
    assert others[0] == others[1]


def resume(codec: str, directory: Path) -> None:
    """4 + 4 steps against 8, through a file."""
    path = directory / f"{dist.get_rank()}.pt"
    whole = wrap(small_model(), bucket_cap_mb=0.005)
    whole_comm = commrt.attach(whole, codec, seed=3)
    losses = train(whole, range(8))

    model = wrap(small_model(), bucket_cap_mb=0.005)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    comm = commrt.attach(model, codec, seed=3)
    first = train(model, range(4), optimizer)
    parts = {"model": model, "optimizer": optimizer, "comm": comm}
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)

    model = wrap(small_model(seed=1), bucket_cap_mb=0.005)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    comm = commrt.attach(model, codec, seed=3)
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    comm.load_state_dict(state["comm"])
    assert_same_state(comm.state_dict(), state["comm"])
    assert any(residual.any() for residual in state["comm"]["residuals"].values())
    assert first + train(model, range(4, 8), optimizer) == losses
    assert same_bits(weights(model), weights(whole))
    assert_same_state(comm.state_dict(), whole_comm.state_dict())
    assert comm.stats().steps == 4


def lose_state() -> None:
    """So that the above means something: empty residuals change the run."""
    runs = []
    for keep in (True, False):
        model = wrap(small_model())
        comm = commrt.attach(model)
        train(model, range(3))
        if not keep:
            state = comm.state_dict()
            zeros = {name: torch.zeros_like(value) for name, value in state["residuals"].items()}
            comm.load_state_dict(state | {"residuals": zeros})
        train(model, range(3, 6))
        runs.append(weights(model))
    assert not same_bits(*runs)


def resume_all(directory: Path) -> None:
    for codec in ("loco4", "loco2:residual=4,rounding=stochastic", "loco4:reset=5"):
        resume(codec, directory)
    lose_state()


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    """Losses, weights and residuals equal to the bit; stochastic rounding goes on by the step."""
    run_ranks(resume_all, tmp_path, world_size=2)


# -- other worlds ---------------------------------------------------------------------------------


def states_of_all(comm: commrt.Comm) -> list[dict[str, Any]]:
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, comm.state_dict())
    return states


def train_on(
    before: list[dict[str, Any]] | None, **settings: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Load the states of a world, then train; those of this world before and after."""
    model = wrap(small_model(), bucket_cap_mb=0.005)
    comm = commrt.attach(model, min_numel=1, **settings)
    if before is not None:
        comm.load_state_dict(before)
    loaded = states_of_all(comm)
    train(model, range(3))
    assert_same_on_all_ranks(weights(model))
    trained = states_of_all(comm)
    assert trained[0]["steps"] == loaded[0]["steps"] + 3
    residuals = [states[0]["residuals"]["0.weight"] for states in (loaded, trained)]
    # What a single rank or node owes has to wait: it averages with nobody.
    assert same_bits(*residuals) == (settings.get("hierarchy") == 4 or dist.get_world_size() == 1)
    return loaded, trained


def worlds_of_four() -> list[dict[str, Any]]:
    """Flat, then two ways of two nodes, one node, and flat again; in the end states of the last."""
    _, before = train_on(None)
    for hierarchy in (2, [[0, 2], [1, 3]], [[0, 3], [1, 2]], 4, None):
        loaded, trained = train_on(before, hierarchy=hierarchy)
        assert_same_owed(before, loaded)
        before = trained
    return before


def the_same_world_takes_its_own() -> None:
    """From a list in any order, to the bit."""
    for hierarchy in (None, 2):
        _, before = train_on(None, hierarchy=hierarchy)
        loaded, _ = train_on(before[::-1], hierarchy=hierarchy)
        for pair in zip(before, loaded, strict=True):
            assert_same_state(*pair)


def test_another_grouping_of_the_ranks_keeps_what_is_owed() -> None:
    run_ranks(all_of, [worlds_of_four, the_same_world_takes_its_own], world_size=4)


def join_worlds(before: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], ...]:
    loaded, trained = train_on(before)
    if before is not None:
        assert_same_owed(before, loaded)
        residuals = [state["residuals"]["0.weight"] for state in loaded]
        # Each rank rounds its own way, so that roundings do not add up.
        assert not any(same_bits(residuals[0], other) for other in residuals[1:])
    return loaded, trained


def test_another_world_size_keeps_what_is_owed() -> None:
    """4, 3, 1 and 2 ranks: the sum of residuals over ranks, to the rounding of 8 bits."""
    _, states = run_ranks(join_worlds, None, world_size=4)[0]
    for world_size in (3, 1, 2):
        _, states = run_ranks(join_worlds, states, world_size=world_size)[0]


def refuse_lists() -> None:
    """Each mistake by its name, nothing changed."""
    comm = bound()
    states = states_of_all(bound())
    first, *others = states
    for wrong, message in (
        ([], "no state dicts: must be those of all ranks"),
        (others, r"are of ranks \[1, 2\]: must be all 3, once"),
        ([first, first, first], r"are of ranks \[0, 0, 0\]: must be all 3, once"),
        ([*states, first], r"are of ranks \[0, 0, 1, 2\]: must be all 3, once"),
        ([first | {"steps": 5}, *others], r"state dicts differ in steps: \[5, 0, 0\]"),
        ([first | {"loss_scale": 2.0}, *others], "state dicts differ in loss_scale: .2.0, 1.0"),
        ([first | {"world_size": 4}, *others], "state dicts differ in world_size: .4, 3, 3"),
        ([*others, without(first, "shards")], "has no 'shards'"),
        ([{}, {}, {}], "has no 'version'"),
        (["0.pt", "1.pt", "2.pt"], "state dict"),
        (None, "state dict"),
    ):
        refuses(comm, wrong, message)
    refuses(bound("loco2"), states, "has codec='loco4:.*: must be 'loco2:")
    refuses(bound(width=128), states, "residual of '0.weight' is of 2048 elements: must be 4096")
    refuses(bound(hierarchy=3), states[dist.get_rank()], "has placement=")
    comm.load_state_dict(states)


def test_lists_that_are_no_world_are_refused() -> None:
    run_ranks(refuse_lists, world_size=3)


def freezing_and_wrapping_anew() -> None:
    """A layer is frozen, and trained again later; each time the state of the time before is loaded,
    whose other residuals go on.
    """
    module, states = small_model(), []
    for is_trained, missing, unexpected in (
        (True, [], []),
        (False, [], ["3.weight"]),
        (True, ["3.weight"], []),
    ):
        module[3].requires_grad_(is_trained)
        model = DistributedDataParallel(module)
        comm = commrt.attach(model)
        if states:
            refuses(comm, states[-1], "missing (none|3.weight), unexpected (none|3.weight)$")
            assert comm.load_state_dict(states[-1], strict=False) == (missing, unexpected)
            assert_residuals(comm, states[-1], empty=missing)
        train(model, range(3))
        states.append(comm.state_dict())
    assert [state["steps"] for state in states] == [3, 6, 9]
    assert comm.load_state_dict(states[1], strict=False) == (["3.weight"], [])
    assert_residuals(comm, states[1], empty=["3.weight"])


def assert_residuals(comm: commrt.Comm, state: Mapping[str, Any], empty: list[str]) -> None:
    """Those of the state, to the bit, but for the empty ones."""
    for name, payload in comm.state_dict()["residuals"].items():
        if name in empty:
            assert not payload.any()
        else:
            assert payload.any()
            assert same_bits(payload, state["residuals"][name])


def test_states_of_other_parameters_are_taken_where_said() -> None:
    run_ranks(freezing_and_wrapping_anew, world_size=2)


# -- mistakes -------------------------------------------------------------------------------------


def bound(codec: str = "loco4", width: int = 64, **settings: Any) -> commrt.Comm:
    """A Comm that knows a model, without DDP."""
    comm = commrt.Comm(codec, **settings)
    comm.bind(nn.Sequential(nn.Linear(32, width), nn.Linear(width, 33)).named_parameters())
    return comm


def state_with_ones() -> dict[str, Any]:
    """A state of this rank that would change residuals and step count."""
    state = bound().state_dict()
    ones = {name: torch.ones_like(payload) for name, payload in state["residuals"].items()}
    return state | {"residuals": ones, "steps": 7}


def refuses(comm: commrt.Comm, state: Mapping[str, Any], message: str) -> None:
    """Loading raises StateError, which is a ValueError, and changes nothing."""
    before = copy.deepcopy(comm.state_dict())
    with pytest.raises(StateError, match=message) as error:
        comm.load_state_dict(state)
    assert isinstance(error.value, ValueError)
    assert_same_state(comm.state_dict(), before)


def without(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != name}


def refuse_states() -> None:
    comm, state, rank = bound(), state_with_ones(), dist.get_rank()
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    refuses(comm, states[1 - rank], f"has rank={1 - rank}: must be {rank} here")
    refuses(comm, state | {"version": 99}, "has version=99: must be 3 here")
    refuses(comm, without(state, "codec"), "has no 'codec': it is not one of commrt's")
    refuses(comm, {}, "has no 'version'")
    residuals = state["residuals"]
    fewer, more = without(residuals, "1.weight"), residuals | {"2.weight": residuals["1.weight"]}
    refuses(comm, state | {"residuals": fewer}, "missing 1.weight, unexpected none")
    refuses(comm, state | {"residuals": more}, "missing none, unexpected 2.weight")
    wider = bound(width=128)
    refuses(wider, state, "residual of '0.weight' is of 2048 elements: must be 4096")
    for codec in ("loco2", "loco4:beta=0.5", "loco4:block=64", "block4", "none"):
        refuses(bound(codec), state, "has codec='loco4:.*: must be '(loco|block|none)")
    alone = dist.new_group([rank], use_local_synchronization=True)
    if rank == 0:
        refuses(bound(group=alone), state, "has world_size=2: must be 1 here")
    comm.load_state_dict(state)
    assert_same_state(comm.state_dict(), state)


def test_a_state_of_something_else_is_refused() -> None:
    """Every mistake by its name, and nothing changed; then the right state is still taken."""
    run_ranks(refuse_states, world_size=2)


@pytest.mark.parametrize("key", ["steps", "residuals"])
def test_an_incomplete_state_is_refused(key: str) -> None:
    run_ranks(refuse_incomplete, key, world_size=1)


def refuse_incomplete(key: str) -> None:
    refuses(bound(), without(state_with_ones(), key), f"has no '{key}'")


def free_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Somebody else's."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def attach_by_mistake() -> None:
    """Only rank 0 attaches: what does not raise before it communicates would wait for the rest."""
    attached, hooked = wrap(small_model()), wrap(small_model())
    commrt.attach(attached)
    hooked.register_comm_hook(None, free_hook)
    if dist.get_rank() != 0:
        return
    for taken in (attached, hooked):
        with pytest.raises(ConfigError, match="model has a communication hook already"):
            commrt.attach(taken)


def attach_again_rightly() -> None:
    """A refused model is as it was. Each rank by itself, in a group of its own."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = wrap(small_model(), process_group=alone)
    for settings, message in (
        ({"codec": "loco3"}, "3 bits"),
        ({"codec": "loco4:block=100"}, "block=100"),
        ({"gather": "loco8"}, "gather='loco8"),
        ({"gather": "block8:block=32"}, "gather has block=32: must be the codec's 128"),
        ({"min_numel": -1}, "min_numel=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            commrt.attach(model, **settings)
    assert "world size 1" in commrt.attach(model).report()


def attach_differently() -> None:
    """Every rank attaches a codec of its own choice."""
    with pytest.raises(PeerMismatchError, match=r"rank 1: 'loco2:.* rank 2: 'loco4"):
        commrt.attach(wrap(small_model()), ["loco4", "loco2", "loco4"][dist.get_rank()])


def back_differently() -> None:
    """Without attach, the first backward compares."""
    model = wrap(small_model())
    comm = commrt.Comm(["loco4", "loco2", "loco4"][dist.get_rank()])
    model.register_comm_hook(comm, commrt.ddp_hook)
    with pytest.raises(PeerMismatchError, match=r"rank 1: 'loco2:.* rank 2: 'loco4"):
        backward(model, 0)


def test_mistakes_of_attach() -> None:
    """Before any communication; ranks that disagree all raise; nobody hangs."""
    checks = [attach_by_mistake, attach_again_rightly, attach_differently, back_differently]
    run_ranks(all_of, checks, world_size=3, timeout_s=40)


def disagree() -> list[str]:
    """The message of each disagreement, as this rank sees it."""
    rank = dist.get_rank()
    comms = [
        bound(["loco4", "loco2", "loco4"][rank]),
        bound(gather=["block8", "none", "block8"][rank]),
        bound(min_numel=[1024, 1024, 7][rank]),
        bound(width=[64, 65, 64][rank]),
        bound(hierarchy=[None, 1, [[0, 2, 1]]][rank]),
        bound(intra=["none", "block8", "none"][rank]),
        bound(warmup=[0, 5, 0][rank]),
        bound(small=["none", "none", "block8"][rank]),
        bound(grad_scaler=[None, GradScaler("cpu"), None][rank]),
    ]
    messages = []
    for comm in comms:
        with pytest.raises(PeerMismatchError) as error:
            comm.start(CPU)
        assert isinstance(error.value, ValueError)
        messages.append(str(error.value))
    return messages


def test_ranks_that_disagree_all_raise() -> None:
    """The same message on every rank, with every rank's value."""
    first, *others = run_ranks(disagree, world_size=3, timeout_s=30)
    assert all(other == first for other in others)
    codec, gather, min_numel, layout, hierarchy, intra, warmup, small, grad_scaler = first
    assert codec.startswith("ranks disagree on codec: rank 0: 'loco4:")
    assert ", rank 1: 'loco2:" in codec
    assert ", rank 2: 'loco4:" in codec
    assert gather.startswith("ranks disagree on gather: rank 0: 'block8:")
    assert ", rank 1: 'none'" in gather
    assert min_numel == "ranks disagree on min_numel: rank 0: 1024, rank 1: 1024, rank 2: 7"
    assert layout.startswith("ranks disagree on layout: rank 0: ")
    assert hierarchy == (
        "ranks disagree on hierarchy: rank 0: 'none', rank 1: '[(0,), (1,), (2,)]', "
        "rank 2: '[(0, 1, 2)]'"
    )
    assert intra.startswith("ranks disagree on intra: rank 0: 'none', rank 1: 'block8:")
    assert warmup == "ranks disagree on warmup: rank 0: 0, rank 1: 5, rank 2: 0"
    assert small.startswith("ranks disagree on small: rank 0: 'none', rank 1: 'none', rank 2: 'bl")
    assert grad_scaler == (
        "ranks disagree on grad_scaler: rank 0: False, rank 1: True, rank 2: False"
    )


def belong_to_other_groups() -> None:
    """Rank 2 is in one group fewer than the others, then rank 0 in one more than rank 1."""
    pair = dist.new_group([0, 1])
    bound().start(CPU)
    dist.new_group([0])
    if dist.get_rank() < 2:
        with pytest.raises(PeerMismatchError, match="number of process groups"):
            bound(group=pair).start(CPU)


def test_ranks_may_belong_to_other_groups() -> None:
    """However many groups each rank is in, starting does not hang: over all ranks it works, over
    some it raises where torch could not name new groups alike.
    """
    run_ranks(belong_to_other_groups, world_size=3, timeout_s=15)
