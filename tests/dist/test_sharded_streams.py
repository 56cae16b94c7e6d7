"""A sharded model's communication without a GPU: its streams, in every order that waits allow.

As test_stream_hook, for what FSDP2 calls on streams of its own: gradients on one, weights on
another, and residuals that come from host memory on a third.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

from commrt.hooks.lender import Lender
from commrt.hooks.residuals import Shard
from commrt.hooks.sharded import ShardedComm
from commrt.hooks.units import Parameter, Part, Unit, UnitLayout
from commrt.testing import run_ranks
from commrt.testing.streams import Recorder, Stream
from tests.dist.test_stream_hook import exchanged

SEEDS = range(40)
STEPS = 3
ROWS, COLUMNS = 8, 64
CPU = torch.device("cpu")


class Training:
    """Two units, each with a matrix and a bias, through steps of gathering, reducing, updating."""

    def __init__(self, is_on_gpu: bool, settings: dict[str, Any]) -> None:
        self.recorder = Recorder()
        world_size = dist.get_world_size()
        generator = torch.Generator().manual_seed(0)
        numel = ROWS * COLUMNS
        chunk = (numel + ROWS) // world_size
        assert dist.group.WORLD is not None
        units, self.shards, gradients = [], [], []
        for name in ("first", "second"):
            of_matrix, of_bias = numel // world_size, ROWS // world_size
            parts = []
            for owner in range(world_size):
                cut = Shard(owner * of_matrix, (owner + 1) * of_matrix, numel)
                parts.append(Part(f"{name}.weight", cut, owner, 0))
                cut = Shard(owner * of_bias, (owner + 1) * of_bias, ROWS)
                parts.append(Part(f"{name}.bias", cut, owner, of_matrix))
            parameters = {
                f"{name}.weight": Parameter(torch.empty(ROWS, COLUMNS, device="meta"), True),
                f"{name}.bias": Parameter(torch.empty(ROWS, device="meta"), True),
            }
            layout = UnitLayout(tuple(parts), chunk, world_size)
            units.append(Unit(name, parameters, layout, dist.group.WORLD, None, CPU))
            self.shards.append(torch.randn(chunk, generator=generator))
            gradients.append(torch.randn(STEPS, world_size * chunk, generator=generator))
        self.seen = [torch.zeros(gradient.shape[1]) for gradient in gradients]
        defaults = {
            **{"codec": "loco4:block=32", "gather": None, "hierarchy": None, "intra": "none"},
            **{"small": "none", "residuals": "device", "min_numel": 64, "seed": 0, "warmup": 0},
            **{"returns": None, "grad_scaler": None, "group": dist.group.WORLD},
        }
        recorded = self.recorder if is_on_gpu else contextlib.nullcontext()
        # FSDP keeps its buffers as long as they are in use: they are there before the recording.
        buffers = [torch.zeros_like(seen) for seen in self.seen]
        whole = [torch.zeros_like(seen) for seen in self.seen]
        outputs = [torch.zeros_like(shard) for shard in self.shards]
        self.comm = ShardedComm("FSDP2", units, **defaults | settings)
        with exchanged(), in_backward(), recorded, torch.no_grad():
            self.comm.start()
            self._train(units, gradients, buffers, whole, outputs)

    def _train(
        self,
        units: list[Unit],
        gradients: list[Tensor],
        buffers: list[Tensor],
        whole: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        reducing, gathering = torch.cuda.Stream(), torch.cuda.Stream()
        for step in range(STEPS):
            for index, unit in enumerate(units):
                gathering.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(gathering):
                    shard = self.shards[index]
                    work = self.comm.all_gather(
                        unit, whole[index], shard, unit.shards, is_async=False
                    )
                    assert work is None
                torch.cuda.current_stream().wait_stream(gathering)
                self.seen[index].add_(whole[index], alpha=step + 1)
            for index, unit in reversed(list(enumerate(units))):
                buffers[index].copy_(gradients[index][step])
                reducing.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(reducing):
                    self.comm.reduce_scatter(
                        unit, lambda unit=unit: unit.layout, outputs[index], buffers[index],
                        scale=1.0, plain=lambda group: None, may_defer=False,
                    )  # fmt: skip
            torch.cuda.current_stream().wait_stream(reducing)
            for shard, output in zip(self.shards, outputs, strict=True):
                shard.sub_(output, alpha=0.1)

    def results(self) -> list[Tensor]:
        """Weights, what was computed with, and residuals: what a wrong order would spoil."""
        return [*self.shards, *self.seen, *self.comm._residuals._payloads.values()]


def gather(output: Tensor, input: Tensor, group: Any) -> None:
    output.view(dist.get_world_size(group), -1).copy_(input.expand(dist.get_world_size(group), -1))


@contextlib.contextmanager
def in_backward() -> Iterator[None]:
    """As if in a backward, whose end is told by hand; without a GPU streams do nothing."""
    with (
        mock.patch("commrt.hooks.gathers.all_gather_single", gather),
        mock.patch("commrt.hooks.sharded.check_agreement"),
        mock.patch.object(torch._C, "_current_graph_task_id", return_value=0),
        mock.patch.object(Variable, "_execution_engine"),
        mock.patch.object(torch.cuda, "Stream", return_value=Quiet()),
        mock.patch.object(torch.cuda, "current_stream", return_value=Quiet()),
        mock.patch.object(torch.cuda, "stream", return_value=contextlib.nullcontext()),
    ):
        yield


class Quiet:
    """A stream where everything happens at once."""

    def wait_stream(self, other: object) -> None:
        """It has."""


def orders_do_not_matter(settings: dict[str, Any]) -> None:
    training = Training(True, settings)
    expected = [result.clone() for result in training.results()]
    for seed in SEEDS:
        training.recorder.replay(seed)
        assert all(map(torch.equal, training.results(), expected)), seed
    assert training.recorder.strays() == [], training.recorder.strays()
    assert all(map(torch.equal, Training(False, settings).results(), expected))


def all_orders(cells: list[dict[str, Any]]) -> None:
    for settings in cells:
        orders_do_not_matter(settings)


def test_no_order_that_the_waits_allow_changes_a_bit() -> None:
    """Bit-identical, also with the threads of the CPU; and the host never waits for the device."""
    cells = [
        *({}, {"gather": "block8"}, {"gather": "delta4"}, {"residuals": "host"}),
        {"residuals": "host", "gather": "block8", "codec": "loco4:block=32,residual=4"},
    ]
    run_ranks(all_orders, cells, world_size=2, timeout_s=120)
    run_ranks(all_orders, [{"hierarchy": 2, "residuals": "host"}], world_size=4, timeout_s=120)


def a_removed_wait_shows() -> None:
    """FSDP's stream waits for residuals on their way in, and theirs for what goes back."""
    for method in ("take", "give_back"):
        kept = getattr(Lender, method)

        def waits_for_nobody(*args: Any, kept: Any = kept) -> Any:
            with mock.patch.object(Stream, "wait_event"):
                return kept(*args)

        with mock.patch.object(Lender, method, waits_for_nobody):
            training = Training(True, {"residuals": "host"})
        expected = [result.clone() for result in training.results()]
        found = []
        for seed in SEEDS:
            training.recorder.replay(seed)
            found.append(all(map(torch.equal, training.results(), expected)))
        assert not all(found), method


def memory_that_is_not_recorded_shows() -> None:
    recorder = Training(True, {"residuals": "host"}).recorder
    assert recorder.strays() == []
    recorder.forget_kept()
    assert recorder.strays()


@pytest.mark.parametrize("check", [a_removed_wait_shows, memory_that_is_not_recorded_shows])
def test_waits(check: Any) -> None:
    run_ranks(check, world_size=2)
