"""Autocast and the loss scale, with the hook on a DDP model.

Bit-identical: codec "none" and plain DDP of two ranks; weights of all ranks; runs that differ in
the loss scale only, where it is a power of two.
"""

import contextlib
import copy
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

import commrt
from commrt.testing import run_ranks
from tests.dist.ddp_checks import (
    assert_plain_semantics,
    no_bias,
    poisoned,
    residuals_of,
)
from tests.dist.small_training import (
    all_of,
    assert_same_on_all_ranks,
    backward,
    batch,
    residual_of,
    same_bits,
    small_model,
    train,
    weights,
    wrap,
)


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


def an_overflow_skips_the_step_on_every_rank() -> None:
    model = wrap(no_bias())
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
        with poisoned({model.module[0].weight: {130: torch.inf}}):
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
