"""The NCCL path of the hook without a GPU: its streams, in every order that its waits allow.

The hook, averagers, codecs and ops are the real ones, on CPU tensors; streams, events and futures
are those of commrt.testing.streams, and an exchange gives every rank this rank's own payload. What
NCCL and the GPU themselves do is not run.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

import commrt
from commrt.testing import run_ranks
from commrt.testing.streams import Future, Recorder, Stream

SEEDS = range(20)
STEPS = 3
REDUCER = "commrt.collectives.reducer"


def exchange(received: Tensor, send: Tensor, own: int, sizes: Sequence[int], group: Any) -> None:
    part = send.split(list(sizes))[dist.get_rank(group)]
    for slot in received.split(own):
        slot.copy_(part)


def gather(received: Tensor, send: Tensor, group: Any) -> None:
    for slot in received.chunk(dist.get_world_size(group)):
        slot.copy_(send)


def agree(*args: Any) -> None:
    """All ranks have the same settings."""


def all_reduce(tensor: Tensor, group: Any) -> None:
    tensor.mul_(dist.get_world_size(group))


@dataclasses.dataclass
class Training:
    """A few steps of backward and of an optimizer around the hook, as DDP drives it."""

    model: nn.Sequential
    recorder: Recorder
    comm: commrt.Comm

    def results(self) -> list[Tensor]:
        """Weights and residuals: what a wrong order would spoil."""
        residuals = self.comm._residuals
        kept = [*residuals._payloads.values(), *residuals._bases.values()]
        return [*(parameter.data for parameter in self.model.parameters()), *kept]

    def replay(self, seed: int) -> list[Tensor]:
        self.recorder.replay(seed)
        return [result.clone() for result in self.results()]


def train(codec: str, is_on_gpu: bool = True, **settings: Any) -> Training:
    """As if the tensors were on a GPU, or by the threads of the CPU."""
    recorder = Recorder()
    torch.manual_seed(0)
    # As many blocks for every rank, so that the payload of one can stand for that of another.
    layers = nn.Linear(48, 256), nn.Linear(256, 32, bias=False), nn.Linear(32, 8, bias=False)
    model = nn.Sequential(*layers)
    gradients = [[torch.randn_like(p) for p in model.parameters()] for _ in range(STEPS)]
    gradients[1][0].zero_()  # as a parameter that was not used
    buckets = [[p for p in layer.parameters()] for layer in model]
    comm = commrt.Comm(codec, min_numel=64, **settings)
    comm.bind(model.named_parameters())
    with exchanged(), recorder if is_on_gpu else contextlib.nullcontext(), torch.no_grad():
        comm.start(torch.device("cpu"))
        buffers = [torch.zeros(sum(p.numel() for p in bucket)) for bucket in buckets]
        for gradient in gradients:
            futures = []
            by_parameter = dict(zip(model.parameters(), gradient, strict=True))
            for index, (bucket, buffer) in enumerate(zip(buckets, buffers, strict=True)):
                views = buffer.split([p.numel() for p in bucket])
                for parameter, view in zip(bucket, views, strict=True):
                    view.copy_(by_parameter[parameter].view(-1))
                parts = list(zip(bucket, views, strict=True))
                futures.append(comm.average(buffer, parts, index == len(buckets) - 1))
            for bucket, future in zip(buckets, futures, strict=True):
                means = future.wait().split([p.numel() for p in bucket])
                for parameter, mean in zip(bucket, means, strict=True):
                    parameter.sub_(mean.view_as(parameter))
            if scaler := settings.get("grad_scaler"):
                scaler.update(new_scale=scaler._scale / 2)
    return Training(model, recorder, comm)


@contextlib.contextmanager
def exchanged() -> Iterator[None]:
    """Nothing is sent: what a rank receives is its own."""
    with (
        mock.patch(f"{REDUCER}.exchange_payloads", exchange),
        mock.patch(f"{REDUCER}.gather_payloads", gather),
        mock.patch("commrt.collectives.hierarchy.gather_payloads", gather),
        mock.patch("commrt.hooks.comm.check_agreement", agree),
        mock.patch("commrt.collectives.groups.check_agreement", agree),
        mock.patch.object(dist, "all_reduce", all_reduce),
    ):
        yield


def orders_do_not_matter(codec: str, settings: dict[str, Any]) -> None:
    training = train(codec, **settings)
    expected = [result.clone() for result in training.results()]
    for seed in SEEDS:
        for found, wanted in zip(training.replay(seed), expected, strict=True):
            assert torch.equal(found, wanted)
    assert training.recorder.strays() == [], training.recorder.strays()
    on_threads = train(codec, is_on_gpu=False, **settings).results()
    assert all(map(torch.equal, on_threads, expected))


@pytest.mark.parametrize(
    ("codec", "settings"),
    [
        ("loco4", {}),
        ("loco4", {"warmup": 1}),
        ("loco2/block2", {}),
        ("block8", {}),
        ("loco4", {"hierarchy": 2, "intra": "block8"}),
        ("loco8:rounding=stochastic", {}),
        ("loco4:reset=2", {}),
        ("loco4", {"small": "block8"}),
        ("lowrank2", {}),
        ("none", {}),
    ],
    ids=str,
)
def test_no_order_that_the_waits_allow_changes_a_bit(codec: str, settings: dict[str, Any]) -> None:
    """Weights and residuals, bit-identical, also with those of the threads for gloo; and the host
    never waits for the device.
    """
    codec, _, gather_codec = codec.partition("/")
    settings = dict(settings, gather=gather_codec or None)
    world_size = 4 if "hierarchy" in settings else 2
    run_ranks(orders_do_not_matter, codec, settings, world_size=world_size)


def buckets_in_runs() -> None:
    with mock.patch("commrt.hooks.legs.MAX_RUN", 1):
        orders_do_not_matter("loco4", {})


def test_buckets_in_several_runs() -> None:
    run_ranks(buckets_in_runs, world_size=2)


def memory_that_is_not_recorded_shows() -> None:
    """A bucket's is the main stream's; the side stream has to say that it uses it."""
    recorder = train("loco4").recorder
    assert recorder.strays() == []
    recorder.forget_kept()
    assert recorder.strays()


def scaled(codec: str) -> Training:
    scaler = GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))  # makes its tensors, outside of what is recorded
    return train(codec, grad_scaler=scaler)


def a_change_of_the_loss_scale_is_ordered() -> None:
    """Its ratio is memory of the main stream which the side stream reads."""
    training = scaled("loco4")
    expected = [result.clone() for result in training.results()]
    for seed in SEEDS:
        assert all(map(torch.equal, training.replay(seed), expected))
    assert training.recorder.strays() == [], training.recorder.strays()
    training.recorder.forget_kept()
    assert training.recorder.strays()


def a_removed_wait_shows() -> None:
    """Of the side stream for backward, and of the optimizer for the side stream."""
    for owner, name in ((Stream, "wait_stream"), (Future, "wait")):
        kept = getattr(owner, name)

        def waits_for_nobody(self: Any, *args: Any, kept: Any = kept) -> Any:
            with mock.patch.object(Stream, "wait_event"):
                return kept(self, *args)

        with mock.patch.object(owner, name, waits_for_nobody):
            training = train("loco4")
        expected = [result.clone() for result in training.results()]
        found = [all(map(torch.equal, training.replay(seed), expected)) for seed in SEEDS]
        assert not all(found), f"{owner.__name__}.{name}"


@pytest.mark.parametrize(
    "check",
    [
        a_change_of_the_loss_scale_is_ordered,
        a_removed_wait_shows,
        memory_that_is_not_recorded_shows,
    ],
)
def test_waits(check: Any) -> None:
    run_ranks(check, world_size=2)
