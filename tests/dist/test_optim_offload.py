"""Offloaded optimizers in several ranks: the run without, to the bit, in every kind of sharing."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from commrt.optim import AdamMini, MoFO, offload
from commrt.testing import run_ranks
from tests.dist.test_optim_sharded import INT8, losses_of, wrap

CLIPPED = {"lr": 3e-3, "max_grad_norm": 0.5}
CHUNK = 20_000


def run(
    kind: str, make: Any, options: dict[str, Any], mode: str | None, **others: Any
) -> tuple[list[float], list[torch.Tensor], dict[str, Any]]:
    """Losses, this rank's weights, and its state."""
    model = wrap(kind)
    optimizer = make(model, **options)
    if mode is not None:
        offload(optimizer, mode, model=model, chunk_bytes=CHUNK, **others)
    losses = losses_of(model, optimizer, 6)
    if optimizer.offloaded is not None:
        optimizer.offloaded.wait()
    weights = [local(parameter).clone() for parameter in model.parameters()]
    return losses, weights, copy.deepcopy(optimizer.state_dict())


def local(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value.detach()


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert type(one) is type(other)
        assert torch.equal(local(one), local(other))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def the_same_as_without(kind: str, folder: str) -> None:
    for make, options in ((AdamMini, CLIPPED), (AdamMini, INT8), (MoFO, CLIPPED)):
        expected = run(kind, make, options, None)
        modes = [("cpu", {}), ("cpu", {"weights": "changed"})]
        if make is not MoFO:
            modes += [("stream", {}), ("stream", {"folder": folder})]
        for mode, others in modes[:: 1 if options is CLIPPED else 2]:
            found = run(kind, make, options, mode, **others)
            assert_same(found, expected)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp1-flat", "fsdp2"])
def test_the_same_as_without(kind, tmp_path):
    run_ranks(the_same_as_without, kind, str(tmp_path), world_size=2, timeout_s=100)


def hybrid_and_prefetching() -> None:
    expected = run("hsdp", AdamMini, CLIPPED, None)
    for mode in ("cpu", "stream"):
        assert_same(run("hsdp", AdamMini, CLIPPED, mode), expected)
        model = wrap("fsdp2")
        model.set_modules_to_forward_prefetch([model.layers[0]])
        optimizer = offload(AdamMini(model, **CLIPPED), mode, model=model, chunk_bytes=CHUNK)
        losses = losses_of(model, optimizer, 6)
        assert losses == run("fsdp2", AdamMini, CLIPPED, None)[0]


def test_hybrid_and_prefetching():
    run_ranks(hybrid_and_prefetching, world_size=4, timeout_s=100)


def through_a_codec() -> None:
    """Each rank owes its own shard's; norm and block sums are of the gradients as they were."""
    exact = run("fsdp2", AdamMini, CLIPPED, None)[0]
    for kind in ("ddp", "fsdp1", "fsdp2"):
        found, _, state = run(kind, AdamMini, CLIPPED, "cpu", grads="loco4")
        assert found[-1] == pytest.approx(exact[-1], abs=0.05 * (exact[0] - exact[-1]))
        assert any("grad_residual" in own for own in state["state"].values())


def test_through_a_codec():
    run_ranks(through_a_codec, world_size=2, timeout_s=100)


def clipping_from_outside() -> None:
    """By torch, of DTensors, which leaves its trace elsewhere than with plain gradients."""

    def train(mode: str | None) -> list[float]:
        model = wrap("fsdp2")
        optimizer = AdamMini(model, lr=3e-3)
        if mode is not None:
            offload(optimizer, mode, model=model, chunk_bytes=CHUNK)

        class Clipping:
            def step(self) -> None:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()

            zero_grad = staticmethod(optimizer.zero_grad)

        return losses_of(model, Clipping(), 5)

    expected = train(None)
    for mode in ("cpu", "stream"):
        assert train(mode) == expected


def test_clipping_from_outside():
    run_ranks(clipping_from_outside, world_size=2, timeout_s=60)


def checkpoints(folder: str) -> None:
    """By torch.distributed.checkpoint, from an offloaded run to one in another mode, and back."""
    modes = [None, "stream", "cpu", None, "auto"]
    for kind in ("fsdp2", "fsdp1"):
        expected = losses_of(*plain(kind), 2 * len(modes))
        found: list[float] = []
        for i, mode in enumerate(modes):
            model, optimizer = plain(kind)
            if mode is not None:
                offload(optimizer, mode, model=model, chunk_bytes=CHUNK)
            if i:
                load(model, optimizer, f"{folder}/{kind}{i}")
            found += losses_of(model, optimizer, 2, 2 * i)
            weights, state = get_state_dict(model, optimizer)
            dcp.save(
                {"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{kind}{i + 1}"
            )
        rel = 0 if kind == "fsdp2" else 1e-5  # of FSDP1 in the form of AdamW's
        assert found == pytest.approx(expected, rel=rel)


def plain(kind: str) -> tuple[nn.Module, Any]:
    model = wrap(kind)
    return model, AdamMini(model, **CLIPPED)


def load(model: nn.Module, optimizer: Any, folder: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for group in optimizer.param_groups:
        group["betas"] = tuple(group["betas"])


def test_checkpoints(tmp_path):
    run_ranks(checkpoints, str(tmp_path), world_size=2, timeout_s=100)
