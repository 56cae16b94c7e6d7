"""What users do to a DDP model, with the hook on it: options, freezing, mixed precision, clipping,
uneven inputs, compilers, warm-up.

Bit-identical: codec "none" and plain DDP of two ranks; weights of all ranks; runs that differ in
the loss scale only; what a frozen parameter is still owed; warm-up and plain DDP. To tolerance:
LoCo's gradients in the first step, by BOUND of the largest, and compiled models.
"""

import contextlib
import copy
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.amp import GradScaler
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.errors import ConfigError
from commrt.testing import run_ranks
from tests.dist.small_training import (
    IN,
    OUT,
    Ledger,
    all_of,
    assert_same_on_all_ranks,
    backward,
    batch,
    gradients,
    local_gradients,
    residual_of,
    same_bits,
    small_model,
    train,
    weights,
    wrap,
)
from tests.dist.test_ddp import assert_close, no_bias, poison, wide

Run = Callable[[nn.Module, int], object]
"""Forward and backward of one step."""


def assert_plain_semantics(run: Run = backward, atol: float = 1e-8, **options: Any) -> None:
    """With codec "none" the weights of plain DDP, to the bit; with LoCo near the mean at first, and
    the same on all ranks.
    """
    plain, exact, coded = (wrap(small_model(), **options) for _ in range(3))
    commrt.attach(exact, "none")
    commrt.attach(coded)
    run(coded, 0)
    assert_close(coded, lambda replica: run(replica, 0), atol)
    for model in (plain, exact, coded):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            run(model, step)
            optimizer.step()
    assert same_bits(weights(plain), weights(exact))
    assert_same_on_all_ranks(weights(coded))
    assert not same_bits(weights(plain), weights(coded))


def residuals_of(comm: commrt.Comm) -> dict[str, Tensor]:
    return comm.state_dict()["residuals"]


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
    ledger = Ledger(model.module, "loco4")
    model.register_comm_hook(None, ledger.hook)
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


# -- mixed precision ------------------------------------------------------------------------------


def autocast(model: nn.Module, step: int, dtype: torch.dtype) -> None:
    inputs, targets = batch(step)
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(inputs)
    assert outputs.dtype == dtype
    nn.functional.mse_loss(outputs.float(), targets).backward()


def autocast_is_as_in_plain_ddp() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert_plain_semantics(partial(autocast, dtype=dtype))


def scaled_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    step: int,
    dtype: torch.dtype | None = None,
) -> None:
    """One step as torch's documentation has it, but for the update of the scale."""
    optimizer.zero_grad()
    inputs, targets = batch(step)
    with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
        outputs = model(inputs)
    loss = nn.functional.mse_loss(outputs.float(), targets)
    scaler.scale(loss).backward()
    scaler.step(optimizer)


def constant_scaler(scale: float) -> GradScaler:
    """Its scale is halved by overflows and never grows."""
    return GradScaler("cpu", init_scale=scale, growth_interval=1 << 30)


SCALES = [2.0**10, 2.0**10, 2.0**13, 2.0**3, 2.0**3, 2.0**16, 1.0, 2.0**-4]


def weights_under(scales: list[float], codec: str, *, is_told: bool) -> Tensor:
    """Weights after a step at each scale."""
    model = wrap(small_model(), bucket_cap_mb=0.005)
    scaler = constant_scaler(scales[0])
    comm = commrt.attach(model, codec, grad_scaler=scaler if is_told else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step, scale in enumerate(scales):
        if step:
            scaler.update(scale)
        scaled_step(model, optimizer, scaler, step)
    assert comm.state_dict()["loss_scale"] == (scales[-1] if is_told else 1.0)
    return weights(model)


def the_loss_scale_changes_nothing() -> None:
    for codec in ("loco4", "loco2:residual=4,rounding=stochastic"):
        model = wrap(small_model(), bucket_cap_mb=0.005)
        commrt.attach(model, codec)
        train(model, range(len(SCALES)))
        assert same_bits(weights(model), weights_under(SCALES, codec, is_told=True))
        assert not same_bits(weights(model), weights_under(SCALES, codec, is_told=False))


@contextlib.contextmanager
def infinite_on_rank_1(weight: Tensor) -> Iterator[None]:
    """One element of its gradient is."""
    handle = None
    if dist.get_rank() == 1:
        handle = weight.register_hook(poison({130: torch.inf}))
    yield
    if handle is not None:
        handle.remove()


def an_overflow_skips_the_step_on_every_rank() -> None:
    model = wrap(wide())
    scaler = constant_scaler(1024.0)
    comm = commrt.attach(model, "loco4:block=64", grad_scaler=scaler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def take(step: int) -> tuple[Tensor, Tensor]:
        """Weights and the residual of the first matrix, after a step."""
        scaled_step(model, optimizer, scaler, step)
        scaler.update()
        assert_same_on_all_ranks(weights(model))
        assert torch.isfinite(torch.tensor(comm.residual_norm()))
        return weights(model), residual_of(comm.codec, comm.state_dict(), "0.weight")

    take(0)
    before, residual = take(1)
    for step, scale in ((2, 512.0), (3, 256.0)):
        with infinite_on_rank_1(model.module[0].weight):
            after, other = take(step)
        assert same_bits(before, after)
        assert scaler.get_scale() == scale
        if dist.get_rank() == 1:
            # The second overflow has the scale that the first one left, so the residual too.
            assert same_bits(other[128:192], residual[128:192] * (scale / 512.0))
            assert residual[128:192].any()
            assert not same_bits(other[:128], residual[:128])
    after, other = take(4)
    assert not same_bits(before, after)
    assert scaler.get_scale() == 256.0
    assert after.isfinite().all()


def overflows_of_fp16_are_as_in_plain_ddp() -> None:
    """A scale that starts too high comes down by itself."""
    found = []
    for codec in (None, "none", "loco4"):
        model = wrap(small_model())
        scaler = GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
        comm = commrt.attach(model, codec, grad_scaler=scaler) if codec else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scales = []
        for step in range(12):
            scaled_step(model, optimizer, scaler, step, torch.float16)
            scaler.update()
            scales.append(scaler.get_scale())
        assert min(scales) < 2.0**22 < max(scales) * 16
        assert weights(model).isfinite().all()
        found.append((weights(model), scales))
    assert same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert_same_on_all_ranks(found[2][0], torch.tensor(found[2][1]))
    assert comm is not None
    assert 0 < comm.residual_norm() < float("inf")


def the_loss_scale_survives_a_checkpoint() -> None:
    """Saved after 4 of 8 steps; the scale changes with the first step afterwards."""
    whole = weights_under(SCALES, "loco4", is_told=True)
    model = wrap(small_model(), bucket_cap_mb=0.005)
    scaler = constant_scaler(SCALES[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    comm = commrt.attach(model, "loco4", grad_scaler=scaler)
    for step, scale in enumerate(SCALES):
        if step == 5:
            state = comm.state_dict()
            assert state["loss_scale"] == SCALES[4] != SCALES[5]
            model = wrap(model.module, bucket_cap_mb=0.005)
            groups = optimizer.state_dict()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            optimizer.load_state_dict(groups)
            comm = commrt.attach(model, "loco4", grad_scaler=scaler)
            comm.load_state_dict(state)
            assert comm.state_dict()["loss_scale"] == SCALES[4]
        if step:
            scaler.update(scale)
        scaled_step(model, optimizer, scaler, step)
    assert same_bits(weights(model), whole)


def a_step_taken_back_is_rescaled_as_well() -> None:
    """The last step is undone and taken again at another scale, or taken there at once."""
    found = []
    for is_taken_back in (True, False):
        model = wrap(small_model())
        scaler = constant_scaler(1024.0)
        comm = commrt.attach(model, grad_scaler=scaler)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(3):
            scaled_step(model, optimizer, scaler, step)
            scaler.update(1024.0)
        if is_taken_back:
            before, state = copy.deepcopy(model.state_dict()), comm.state_dict()
            scaled_step(model, optimizer, scaler, 3)
            model.load_state_dict(before)
            comm.load_state_dict(state)
        scaler.update(512.0)
        scaled_step(model, optimizer, scaler, 3)
        found.append(torch.cat([weights(model), *residuals_of(comm).values()]))
    assert same_bits(*found)


def a_change_of_scale_waits_for_compression() -> None:
    """Residuals that are not used, here in a longer warm-up, keep the scale that they have."""
    model = wrap(small_model())
    first = commrt.attach(model, grad_scaler=constant_scaler(1024.0))
    backward(model, 0)
    model, scaler = wrap(small_model()), constant_scaler(512.0)
    comm = commrt.attach(model, grad_scaler=scaler, warmup=3)
    comm.load_state_dict(first.state_dict())
    owed = first.residual_norm() / first.state_dict()["loss_scale"]
    assert owed > 0
    for step in range(1, 3):
        backward(model, step)
        assert comm.residual_norm() / comm.state_dict()["loss_scale"] == owed
    assert comm.state_dict()["loss_scale"] == 1024.0
    backward(model, 3)
    assert comm.state_dict()["loss_scale"] == 512.0


def test_mixed_precision_is_that_of_plain_ddp() -> None:
    """Weights do not depend on the loss scale, to the bit, where scales are powers of two. An
    overflow on one rank skips the step on all; the residual of its block is only rescaled.
    """
    checks = [
        autocast_is_as_in_plain_ddp,
        the_loss_scale_changes_nothing,
        an_overflow_skips_the_step_on_every_rank,
        overflows_of_fp16_are_as_in_plain_ddp,
        the_loss_scale_survives_a_checkpoint,
        a_step_taken_back_is_rescaled_as_well,
        a_change_of_scale_waits_for_compression,
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
        ledger = Ledger(model.module, "loco2")
        ledger.comm.may_have_unused = may_have_unused
        model.register_comm_hook(None, ledger.hook)
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


# -- warm-up, noop, parameters that DDP keeps to itself -------------------------------------------


def warm_up_is_plain_ddp() -> None:
    plain, warm, cold = (wrap(small_model(), bucket_cap_mb=0.005) for _ in range(3))
    comm, other = commrt.attach(warm, warmup=3), commrt.attach(cold)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (plain, warm)]
    for step in range(3):
        train(plain, [step], optimizers[0])
        assert "uncompressed all gradients now: warm-up: compressed from step 3 on" in comm.report()
        train(warm, [step], optimizers[1])
        assert same_bits(weights(plain), weights(warm))
        assert comm.residual_norm() == 0.0
    stats = comm.stats()
    assert stats.reduce_bytes == stats.gather_bytes == 0
    assert stats.exact_bytes == stats.dense_bytes > 0
    assert "warm-up" not in comm.report()
    train(plain, [3], optimizers[0])
    train(warm, [3], optimizers[1])
    assert not same_bits(weights(plain), weights(warm))
    assert comm.residual_norm() > 0.0
    train(cold, [0])
    assert comm.stats().reduce_bytes == other.stats().reduce_bytes > 0


def warm_up_goes_on_after_a_checkpoint() -> None:
    """Saved in its middle and after it."""

    def run(saves: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        model = wrap(small_model())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        comm = commrt.attach(model, warmup=3)
        for step in range(6):
            if step in saves:
                state = comm.state_dict()
                model = wrap(model.module)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
                comm = commrt.attach(model, warmup=3)
                comm.load_state_dict(state)
            train(model, [step], optimizer)
            assert (comm.residual_norm() > 0.0) == (step >= 3)
        return weights(model), torch.cat(list(residuals_of(comm).values()))

    expected = run(saves=())
    found = run(saves=(2, 4))
    assert all(same_bits(*pair) for pair in zip(expected, found, strict=True))


def noop_sends_nothing() -> None:
    model = wrap(small_model(), bucket_cap_mb=0.005)
    comm = commrt.attach(model, "noop")
    backward(model, 0)
    local = wrap(
        small_model(),
        process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True),
    )
    backward(local, 0)
    for name, gradient in gradients(model).items():
        assert same_bits(gradient, gradients(local)[name])
    stats = comm.stats()
    assert stats.steps == 1
    assert stats.wire_bytes == stats.residual_bytes == 0
    assert "codec is noop" in comm.report()


def delayed_parameters_are_not_ours() -> None:
    """DDP averages them itself, asynchronously, in a buffer that their gradients are not in unless
    all are delayed: so only who is responsible is compared.
    """
    module = small_model()
    delayed = [(name, dict(module.named_parameters())[name]) for name in ("0.weight", "0.bias")]
    model = DistributedDataParallel(
        module, delay_all_reduce_named_params=delayed, param_to_hook_all_reduce=module[3].weight
    )
    comm = commrt.attach(model)
    backward(model, 0)
    found = gradients(model)
    whole = wrap(small_model())
    other = commrt.attach(whole)
    backward(whole, 0)
    for name in ("3.weight", "5.weight", "1.bias"):
        assert same_bits(found[name], gradients(whole)[name])
    assert residuals_of(comm).keys() == {"3.weight"}
    assert comm.stats().wire_bytes < other.stats().wire_bytes
    said = "uncompressed 2,112 elements in 2 parameters: DDP does not hand it to the hook (0.weig"
    assert said in comm.report()


def a_model_without_buckets_is_refused() -> None:
    """DDP makes none where all that is trained is delayed, so there is nothing to hook."""
    module = small_model()
    module[3].requires_grad_(False)
    delayed = [pair for pair in module.named_parameters() if pair[1].requires_grad]
    model = DistributedDataParallel(
        module, delay_all_reduce_named_params=delayed, param_to_hook_all_reduce=module[0].weight
    )
    with pytest.raises(ConfigError, match="delay"):
        commrt.attach(model)


def ignored_parameters_are_not_ours() -> None:
    module = small_model()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["3.weight"])
    model = DistributedDataParallel(module)
    comm = commrt.attach(model)
    backward(model, 0)
    assert residuals_of(comm).keys() == {"0.weight"}
    assert "1,056 elements" not in comm.report().split("DDP does not")[0].split("compressed")[1]
    assert "1 parameters: DDP does not hand it to the hook (3.weight)" in comm.report()


def test_warm_up_and_what_is_not_sent() -> None:
    """Warm-up to the bit as plain DDP, also over checkpoints; noop leaves every rank its own."""
    checks = [
        warm_up_is_plain_ddp,
        warm_up_goes_on_after_a_checkpoint,
        noop_sends_nothing,
        delayed_parameters_are_not_ours,
        ignored_parameters_are_not_ours,
        a_model_without_buckets_is_refused,
    ]
    run_ranks(all_of, checks, world_size=2)


# -- what is not compressed like the rest ---------------------------------------------------------


class Words(nn.Module):
    """An embedding whose gradient is sparse, before a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(100, 64, sparse=True)
        self.layer = nn.Linear(64, 64)

    def forward(self, words: Tensor) -> Tensor:
        return self.layer(self.embedding(words))


def sparse_gradients_are_averaged_as_in_plain_ddp() -> None:
    """And beside them the others are compressed."""
    found = []
    for codec in (None, "none", "loco4", "noop"):
        model = wrap(Words())
        comm = commrt.attach(model, codec) if codec else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            words = torch.arange(10) + 5 * dist.get_rank() + step
            model(words).square().sum().backward()
            assert model.module.embedding.weight.grad.is_sparse
            if step == 0:
                found.append(model.module.embedding.weight.grad.to_dense())
            optimizer.step()
        if codec != "noop":
            assert_same_on_all_ranks(weights(model))
        assert comm is None or comm.stats().steps == 3
        if codec == "loco4":
            assert residuals_of(comm).keys() == {"layer.weight"}
            assert "sparse gradient" in comm.report()
            commrt.attach(wrap(Words())).load_state_dict(comm.state_dict())
        found.append(weights(model))
    assert all(same_bits(*pair) for pair in zip(found[0:2], found[2:4], strict=True))
    assert same_bits(found[0], found[4])
    assert not same_bits(found[1], found[5])


class Double(nn.Module):
    """A layer in fp64, which no codec takes, behind one in fp32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(IN, 64)
        self.second = nn.Linear(64, OUT).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).double())


def small_parameters_are_coded_where_said() -> None:
    """Close, as the step of 8 bits is; other dtypes still travel as they are."""
    for module in (small_model(), Double()):
        model = wrap(module, bucket_cap_mb=0.005)
        comm = commrt.attach(model, small="block8")
        backward(model, 0)
        assert_close(model, lambda replica: backward(replica, 0))
        means, largest = local_gradients(model.module, lambda replica: backward(replica, 0))
        for name, gradient in gradients(model).items():
            if name in residuals_of(comm):
                continue
            error = (gradient - means[name]).abs().max()
            assert error <= 2.02 / 254 * largest[name] + 1e-8
            assert (error == 0) == (gradient.dtype == torch.float64)
        train(model, range(3))
        assert_same_on_all_ranks(weights(model))
        assert (comm.stats().exact_bytes > 0) == isinstance(module, Double)


def skipping_of_unused_parameters_is_refused() -> None:
    """Its buckets come or do not come, so that steps could not be told apart."""
    model = wrap(small_model(), find_unused_parameters=True, skip_all_reduce_unused_params=True)
    with pytest.raises(ConfigError, match="skip_all_reduce_unused_params=True: must be False"):
        commrt.attach(model)


def test_what_is_not_compressed_like_the_rest() -> None:
    """Sparse gradients to the bit as in plain DDP, small parameters at 8 bits."""
    checks = [
        sparse_gradients_are_averaged_as_in_plain_ddp,
        small_parameters_are_coded_where_said,
        skipping_of_unused_parameters_is_refused,
    ]
    run_ranks(all_of, checks, world_size=2)


# -- worlds, groups and several models ------------------------------------------------------------


def worlds() -> None:
    """Close to plain DDP, which may sum in another order."""
    plain, exact, coded = (wrap(small_model(), bucket_cap_mb=0.005) for _ in range(3))
    commrt.attach(exact, "none")
    comm = commrt.attach(coded)
    backward(coded, 0)
    assert_close(coded, lambda replica: backward(replica, 0))
    for model in (plain, exact, coded):
        train(model, range(3))
    torch.testing.assert_close(weights(plain), weights(exact), rtol=1e-5, atol=1e-7)
    assert_same_on_all_ranks(weights(coded))
    assert f"commrt: {dist.get_world_size()} ranks" in comm.report()
    assert comm.stats().steps == 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_world_sizes(world_size: int) -> None:
    """LoCo near the mean in the first step, the same bits on all ranks."""
    run_ranks(worlds, world_size=world_size)


def groups_of_three_and_one() -> None:
    """At the same time; what they send differs, so what one does cannot have reached the other."""
    members = [0, 2, 3] if dist.get_rank() != 1 else [1]
    own = dist.new_group(members, use_local_synchronization=True)
    model = wrap(small_model(), process_group=own, bucket_cap_mb=0.005)
    comm = commrt.attach(model)
    train(model, range(3))
    assert_same_on_all_ranks(weights(model), group=own)
    assert (comm.stats().wire_bytes > 0) == (len(members) > 1)
    assert f"commrt: {len(members)} ranks" in comm.report()


def test_groups_of_different_sizes() -> None:
    run_ranks(groups_of_three_and_one, world_size=4)


def adversaries(codecs: tuple[str, str] | None) -> tuple[Tensor, list[commrt.Comm]]:
    """Four steps of a generator and a discriminator. The generator's backward goes through both, so
    that buckets of both are on their way at once.
    """
    torch.manual_seed(0)
    generator = wrap(nn.Sequential(nn.Linear(OUT, 64), nn.Tanh(), nn.Linear(64, IN)))
    judge = wrap(nn.Sequential(nn.Linear(IN, 64), nn.Tanh(), nn.Linear(64, 1)))
    models = generator, judge
    comms = [commrt.attach(*pair) for pair in zip(models, codecs, strict=True)] if codecs else []
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for step in range(4):
        real, noise = batch(step)
        for turn, optimizer in enumerate(optimizers):
            fake = generator(noise)
            # One forward for both: DDP allows one before each backward.
            scores = judge(torch.cat([real, fake if turn == 0 else fake.detach()]))
            sign = 1.0 if turn else -1.0
            generator.zero_grad()
            judge.zero_grad()
            (sign * (scores[16:].mean() - scores[:16].mean())).backward()
            optimizer.step()
    return torch.cat([weights(model) for model in models]), comms


def two_models_in_one_backward() -> None:
    plain, _ = adversaries(None)
    exact, _ = adversaries(("none", "none"))
    assert same_bits(plain, exact)
    coded, comms = adversaries(("loco4", "loco2"))
    again, _ = adversaries(("loco4", "loco2"))
    assert_same_on_all_ranks(coded)
    assert same_bits(coded, again)
    assert not same_bits(coded, plain)
    assert not same_bits(coded, adversaries(("loco4", "loco4"))[0])
    assert [comm.stats().steps for comm in comms] == [4, 8]


def ranks_round_independently() -> None:
    """The same gradient on both, so that only the draws can differ."""
    model = wrap(small_model())
    comm = commrt.attach(model, "loco4:rounding=stochastic")
    model(torch.ones(1, IN)).sum().backward()
    residuals: list[Any] = [None] * 2
    dist.all_gather_object(residuals, residuals_of(comm)["0.weight"])
    assert not same_bits(*residuals)


def num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_names)


def train_and_close(settings: dict[str, Any]) -> None:
    before = num_groups()
    model = wrap(small_model())
    comm = commrt.attach(model, **settings)
    train(model, range(2))
    assert num_groups() > before
    comm.close()
    comm.close()
    assert num_groups() == before
    assert comm.stats().steps == 2
    with pytest.raises(RuntimeError, match="closed"):
        backward(model, 2)


def closed_comms_leave_nothing() -> None:
    """Sockets of models that are wrapped anew do not pile up."""
    num_files = []
    for settings in ({}, {"hierarchy": 1}, {"hierarchy": 2}, {}):
        train_and_close(settings)
        gc.collect()
        num_files.append(len(list(Path("/proc/self/fd").iterdir())))
    assert max(num_files) == num_files[0]
    commrt.Comm().close()


def test_several_models() -> None:
    """Trained by turns, each with groups, threads and residuals of its own; nothing left behind."""
    checks = [two_models_in_one_backward, ranks_round_independently, closed_comms_leave_nothing]
    run_ranks(all_of, checks, world_size=2)
