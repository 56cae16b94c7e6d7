"""An offloaded step without a GPU: its streams, in every order that their waits allow.

The host's thread is a stream here, too, so that the orders of both are drawn.
"""

import contextlib
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from commrt.optim import AdamMini, offload
from commrt.optim.offloading import lanes, plan
from commrt.optim.offloading import offload as offloading
from commrt.testing import streams
from commrt.testing.streams import Recorder

SEEDS = range(30)
STEPS = 3
AS_NUMPY, AS_LIST = Tensor.numpy, Tensor.tolist
RATES = plan.Rates(up=1.0, down=1.0, device=1.0, host=1.0)
SHAPES = ((40, 64), (30, 64), (50, 64), (2000,), (60, 64))


@contextlib.contextmanager
def unpinned():
    """Memory is pinned by a driver."""

    def without(function):
        return lambda *args, pin_memory=False, **options: function(*args, **options)

    with (
        mock.patch.object(torch, "empty", without(torch.empty)),
        mock.patch.object(torch, "zeros", without(torch.zeros)),
    ):
        yield


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(STEPS)]


def expected() -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momenta of a run without streams."""
    own = parameters()
    optimizer = AdamMini(own, lr=1e-2, max_grad_norm=1.0)
    for of_step in gradients():
        for parameter, grad in zip(own, of_step, strict=True):
            parameter.grad = grad
        optimizer.step()
    return [p.detach() for p in own], [optimizer.state[p]["exp_avg"] for p in own]


class Run:
    """Steps with gradients that are written into the memory of those before."""

    def __init__(self, mode: str, **options: object) -> None:
        self.recorder = Recorder()
        self.weights = parameters()
        optimizer = AdamMini(self.weights, lr=1e-2, max_grad_norm=1.0)
        given = gradients()
        with (
            unpinned(),
            mock.patch.object(plan, "measure", return_value=RATES),
            mock.patch.object(offloading, "_lanes", lambda device: (lanes.StreamLane(device),) * 2),
            mock.patch.object(streams, "HOST_READS", set()),  # numbers of steps are the host's
            self.recorder,
            mock.patch.multiple(Tensor, numpy=AS_NUMPY, tolist=AS_LIST),  # the host's own
            torch.no_grad(),
        ):
            offload(optimizer, mode, chunk_bytes=6000, **options)
            for parameter in self.weights:
                parameter.grad = torch.zeros_like(parameter)
            for of_step in given:
                for parameter, grad in zip(self.weights, of_step, strict=True):
                    parameter.grad.copy_(grad)
                optimizer.step()
                self.recorder.main.wait_stream(self.recorder.main)
        self.momenta = [optimizer.state[p]["exp_avg"] for p in self.weights]

    def is_right(self, seed: int) -> bool:
        self.recorder.replay(seed)
        weights, momenta = expected()
        return all(
            torch.equal(found, wanted)
            for found, wanted in zip(
                [*self.weights, *self.momenta], [*weights, *momenta], strict=True
            )
        )


@pytest.mark.parametrize("mode", ["stream", "cpu"])
def test_every_order_is_right(mode):
    run = Run(mode)
    assert all(run.is_right(seed) for seed in SEEDS)
    kept = {address for address, _ in run.recorder._kept}
    assert kept >= {p.grad.untyped_storage().data_ptr() for p in run.weights}


@pytest.mark.parametrize(
    ("mode", "dropped"), [("stream", 0), ("stream", 1), ("cpu", 0), ("stream", -1), ("cpu", -1)]
)
def test_a_missing_wait_shows(mode, dropped):
    """Of a step for what it needs, of a slot for what was in it, of training for its weights."""
    run_of = lanes.StreamLane.run

    def without(lane, job, after=()):
        after = tuple(after)
        return run_of(lane, job, after[:dropped] + after[dropped + 1 :])

    with contextlib.ExitStack() as patches:
        if dropped >= 0:
            patches.enter_context(mock.patch.object(lanes.StreamLane, "run", without))
        else:
            patches.enter_context(mock.patch.object(lanes._OfStream, "wait"))
        run = Run(mode)
    assert not all(run.is_right(seed) for seed in SEEDS)
