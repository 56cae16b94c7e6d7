"""What users do to a DDP model, with the hook on it: options, freezing, clipping, uneven inputs,
compilers.

Bit-identical: codec "none" and plain DDP of two ranks; weights of all ranks; what a frozen
parameter is still owed. To tolerance: LoCo's gradients in the first step, by BOUND of the largest,
and compiled models.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.testing import run_ranks
from tests.dist.ddp_checks import assert_plain_semantics, keep_ledger, no_bias, residuals_of
from tests.dist.small_training import (
    all_of,
    assert_same_on_all_ranks,
    backward,
    same_bits,
    small_model,
    train,
    weights,
    wrap,
)

# -- options and freezing -------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"static_graph": True, "gradient_as_bucket_view": True},
    {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    {"find_unused_parameters": True, "static_graph": True},
]


def options_of_ddp() -> None:
    for options in OPTIONS:
        assert_plain_semantics(**options, bucket_cap_mb=0.005)


FROZEN_STEPS = range(2, 5)


def freezing_steps(model: DistributedDataParallel, layer: int) -> Iterator[int]:
    """Eight steps of SGD, each yielded after its backward; a layer is frozen in some of them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(8):
        model.module[layer].requires_grad_(step not in FROZEN_STEPS)
        optimizer.zero_grad()
        backward(model, step)
        yield step
        optimizer.step()


def assert_held_while_frozen(residuals: Sequence[Tensor]) -> None:
    """Changed in each step but those."""
    is_held = [same_bits(*pair) for pair in itertools.pairwise(residuals)]
    assert is_held == [step in FROZEN_STEPS for step in range(1, 8)]


def freezing_is_as_in_plain_ddp() -> None:
    for options in ({}, {"gradient_as_bucket_view": True}):
        models = [wrap(small_model(), find_unused_parameters=True, **options) for _ in range(3)]
        plain, exact, coded = models
        commrt.attach(exact, "none")
        comm = commrt.attach(coded)
        for model in (plain, exact):
            list(freezing_steps(model, 3))
        residuals = [residuals_of(comm)["3.weight"] for _ in freezing_steps(coded, 3)]
        assert_held_while_frozen(residuals)
        assert same_bits(weights(plain), weights(exact))
        assert_same_on_all_ranks(weights(coded))


def what_a_frozen_parameter_is_owed_waits() -> None:
    """And is sent afterwards: nothing is lost."""
    model = wrap(no_bias(), find_unused_parameters=True, bucket_cap_mb=0.005)
    ledger = keep_ledger(model, "loco4")
    residuals = []
    for step in freezing_steps(model, 2):
        ledger.end_step()
        assert (model.module[2].weight.grad is None) == (step in FROZEN_STEPS)
        residuals.append(residuals_of(ledger.comm)["2.weight"])
    assert_held_while_frozen(residuals)
    for name in ledger.given:
        ledger.check(name)


def freezing_and_wrapping_anew() -> None:
    """The usual way, without find_unused_parameters."""
    models, comms = [small_model() for _ in range(3)], []
    for freeze in (True, False):
        for module, codec in zip(models, (None, "none", "loco4"), strict=True):
            module[3].requires_grad_(not freeze)
            model = DistributedDataParallel(module)
            comms += [commrt.attach(model, codec)] if codec else []
            train(model, range(3))
    assert same_bits(weights(models[0]), weights(models[1]))
    assert_same_on_all_ranks(weights(models[2]))
    frozen, whole = comms[1], comms[3]
    assert residuals_of(frozen).keys() == {"0.weight"}
    assert residuals_of(whole).keys() == {"0.weight", "3.weight"}
    assert "compressed   2,048 elements" in frozen.report()


def test_options_and_freezing_are_those_of_plain_ddp() -> None:
    """To the bit with codec "none". A frozen parameter keeps its residual to the bit, and what was
    sent, received and owed adds up.
    """
    checks = [
        options_of_ddp,
        freezing_is_as_in_plain_ddp,
        what_a_frozen_parameter_is_owed_waits,
        freezing_and_wrapping_anew,
    ]
    run_ranks(all_of, checks, world_size=2)


# -- clipping and uneven inputs -------------------------------------------------------------------


def clipping_is_as_in_plain_ddp() -> None:
    found = []
    for codec in (None, "none", "loco4"):
        model = wrap(small_model())
        if codec:
            commrt.attach(model, codec)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        norms = []
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
            optimizer.step()
        found.append((weights(model), torch.stack(norms)))
    plain, exact, coded = found
    assert all(same_bits(*pair) for pair in zip(plain, exact, strict=True))
    assert_same_on_all_ranks(*coded)
    assert coded[1].min() > 0.05, "nothing would be clipped"
    torch.testing.assert_close(coded[1][0], plain[1][0], rtol=0.1, atol=0.0)


def num_batches() -> int:
    """Other ones on every rank."""
    return 3 + 2 * dist.get_rank()


def train_unevenly(model: DistributedDataParallel, **options: Any) -> Tensor:
    """Until the last rank has no more batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Join([model], **options):
        train(model, range(num_batches()), optimizer)
    assert_same_on_all_ranks(weights(model))
    return weights(model)


def uneven_inputs_are_as_in_plain_ddp() -> None:
    for options in ({}, {"find_unused_parameters": True}):
        plain, exact, coded = (wrap(small_model(), **options) for _ in range(3))
        commrt.attach(exact, "none")
        comm = commrt.attach(coded)
        assert same_bits(train_unevenly(plain), train_unevenly(exact))
        train_unevenly(coded)
        assert comm.stats().steps == 3 + 2 * (dist.get_world_size() - 1)
        assert comm.may_have_unused == bool(options)


def hooks_divide_by_all_ranks() -> None:
    """``divide_by_initial_world_size=False`` says nothing to torch's own hooks, nor to this one."""
    theirs, ours = wrap(small_model()), wrap(small_model())
    theirs.register_comm_hook(None, allreduce_hook)
    commrt.attach(ours, "none")
    options = {"divide_by_initial_world_size": False}
    assert same_bits(train_unevenly(theirs, **options), train_unevenly(ours, **options))


def nothing_is_lost_of_uneven_inputs() -> None:
    """A rank without batches sends zeros and what its residuals hold, which is held back only where
    zeros may mean that a parameter is unused.
    """
    last = dist.get_world_size() - 1
    missed = 2 * (last - dist.get_rank())
    for may_have_unused in (False, True):
        model = wrap(no_bias())
        ledger = keep_ledger(model, "loco2")
        ledger.comm.may_have_unused = may_have_unused
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Join([model]):
            for step in range(num_batches()):
                optimizer.zero_grad()
                backward(model, step)
                ledger.end_step()
                optimizer.step()
            joined = residuals_of(ledger.comm)
            optimizer.zero_grad()
            for _ in range(missed):  # the residuals only shrink from now on: a bound of rounding
                ledger.end_step()
        for name, received in ledger.received.items():
            is_held = same_bits(joined[name], residuals_of(ledger.comm)[name])
            assert is_held == (may_have_unused or missed == 0)
            dist.broadcast(received, src=last)
            ledger.check(name)


def test_clipping_and_uneven_inputs_are_those_of_plain_ddp() -> None:
    """To the bit with codec "none". Nobody hangs, all ranks agree, nothing is lost."""
    checks = [
        clipping_is_as_in_plain_ddp,
        uneven_inputs_are_as_in_plain_ddp,
        hooks_divide_by_all_ranks,
        nothing_is_lost_of_uneven_inputs,
    ]
    run_ranks(all_of, checks, world_size=2)


# -- compilers ------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """torch.compile leaves alone what is no code of the user's, as nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small_model()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def compiled_models_train(backend: str) -> None:
    """A compiled DDP model and a compiled module under DDP, against neither."""
    graphs: list[nn.Module] = []

    def compile_with(graph: nn.Module, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    def run(model: nn.Module, ddp: DistributedDataParallel) -> tuple[Tensor, list[float], Any]:
        comm = commrt.attach(ddp)
        losses = train(model, range(3))
        assert_same_on_all_ranks(weights(model))
        stats = comm.stats()
        return weights(model), losses, (stats.steps, stats.reduce_bytes, stats.gather_bytes)

    eager, inner = wrap(Mlp()), wrap(Mlp())
    outer = DistributedDataParallel(torch.compile(Mlp(), backend=compile_with))
    expected_weights, expected_losses, expected_sent = run(eager, eager)
    for model, ddp in ((torch.compile(inner, backend=compile_with), inner), (outer, outer)):
        torch._dynamo.reset()  # or the code that the other model has left is used again
        graphs.clear()
        found, losses, sent = run(model, ddp)
        assert graphs
        assert sent == expected_sent
        assert losses == pytest.approx(expected_losses, rel=1e-3)
        # Where the last bit of a gradient decides a code, Adam makes much of it.
        assert (found - expected_weights).abs().mean() < 1e-4


def test_compiled_models_are_near_eager_ones() -> None:
    """Same bytes as eager, losses within 0.1 %."""
    run_ranks(compiled_models_train, "aot_eager", world_size=2)


@pytest.mark.slow
def test_inductor_is_near_eager() -> None:
    """Needs a C++ compiler, as inductor on CPU does."""
    run_ranks(compiled_models_train, "inductor", world_size=2, timeout_s=110)
