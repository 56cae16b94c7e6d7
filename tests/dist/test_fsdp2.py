"""FSDP2 with commrt on: what its users set, and what it does to weights.

Bit-identical: with codec "none" the weights of plain FSDP2; gathered weights on all ranks. To
tolerance: LoCo's first gradients, by ONE_WAY_BOUND of the largest.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import commrt
from commrt.collectives import ShardReducer
from commrt.errors import ConfigError, PeerMismatchError
from commrt.hooks.gathers import Gathers
from commrt.testing import run_ranks, tcp_bytes_sent
from commrt.training.config import ModelConfig
from commrt.training.model import GPT, next_byte_losses
from commrt.training.parallel import shard_blocks
from tests.dist.sharded_checks import (
    ONE_WAY_BOUND,
    Ledger,
    mesh_of,
    no_bias,
    no_sync,
    shard,
    train,
    whole_gradients,
    whole_weights,
    wrap_as,
)
from tests.dist.small_training import (
    IN,
    all_of,
    assert_same_on_all_ranks,
    backward,
    backward_of_any,
    batch,
    digest,
    same_bits,
    small_model,
)

SHAPE = ModelConfig(dim=32, num_layers=2, num_heads=2, seq_len=16)

Make = Callable[[], nn.Module]
Run = Callable[[nn.Module, int], float]


def assert_near_mean(
    model: nn.Module,
    replica: nn.Module,
    run: Run,
    *,
    bound: float = ONE_WAY_BOUND,
    scale: float = 1,
) -> None:
    """The first gradients, with empty residuals, against ``scale`` times the ranks' mean."""
    run(replica, 0)
    run(model, 0)
    found = whole_gradients(model)
    for name, parameter in replica.named_parameters():
        if parameter.grad is None:
            assert name not in found
            continue
        mean, largest = scale * parameter.grad.float(), scale * parameter.grad.float().abs().max()
        mean /= dist.get_world_size()
        dist.all_reduce(mean)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        error = (found[name].float() - mean).abs().max()
        assert error <= bound * largest + 1e-8, (name, error / largest)
    assert_same_on_all_ranks(*found.values())


def assert_plain(make: Make, replica: nn.Module, run: Run = backward, **checks: Any) -> None:
    """Codec "none" changes no bit; LoCo's first gradients are near the mean."""
    plain, exact, coded = make(), make(), make()
    commrt.attach(exact, "none")
    commrt.attach(coded, min_numel=64)
    assert_near_mean(coded, replica, run, **checks)
    assert train(plain, range(4), run) == train(exact, range(4), run)
    expected = whole_weights(plain)
    for name, weight in whole_weights(exact).items():
        assert same_bits(weight, expected[name]), name
    assert_same_on_all_ranks(*whole_weights(coded).values())


def fifty_steps() -> None:
    """Of the main job's model, gradients clipped: losses and weights of plain FSDP2."""
    models = [shard_blocks(GPT(SHAPE), mesh_of("fsdp2")) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    commrt.attach(models[1], "none")

    def run(model: nn.Module, step: int) -> float:
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        tokens = (torch.randint(0, 8, (2, 1), generator=generator) + torch.arange(17)) % 8
        loss = next_byte_losses(model(tokens[:, :-1]), tokens[:, 1:]).mean()
        loss.backward()
        return loss.item()

    losses = [train(model, range(50), run, largest=1.0) for model in models]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    for first, second in zip(*(whole_weights(model).values() for model in models), strict=True):
        assert same_bits(first, second)


def offloaded() -> None:
    assert_plain(
        lambda: shard(small_model(), offload_policy=CPUOffloadPolicy(pin_memory=False)),
        small_model(),
    )


def half_precision() -> None:
    """fp16 is divided before and after it is reduced."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float16)
    assert_plain(
        lambda: shard(small_model(), mp_policy=policy),
        small_model(),
        bound=ONE_WAY_BOUND + 2 / 1024,
    )


def forced_sums() -> None:
    def make() -> nn.Module:
        model = shard(small_model())
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    assert_plain(make, small_model())


def other_factors() -> None:
    """gloo cannot do what plain FSDP2 asks for here; commrt can, whenever the factor is set."""
    for factor in (1.0, 3.0):
        for is_before in (True, False):
            model = shard(small_model())
            if is_before:
                divide_by(model, factor)
            commrt.attach(model, min_numel=64)
            divide_by(model, factor)
            world_size = dist.get_world_size()
            assert_near_mean(model, small_model(), backward, scale=world_size / factor)


def divide_by(model: nn.Module, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(factor)


def compiled() -> None:
    def make() -> nn.Module:
        model = small_model()
        for index in (0, 3):
            model[index].compile(backend="aot_eager")
        return shard(model)

    assert_plain(make, small_model())


def prefetched() -> None:
    def make() -> nn.Module:
        model = shard(small_model())
        model[0].set_modules_to_forward_prefetch([model[3], model[5]])
        model[5].set_modules_to_backward_prefetch([model[3], model[0]])
        return model

    assert_plain(make, small_model())


def on_inner_dimensions() -> None:
    def replica() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(IN, 64, bias=False), nn.Tanh(), nn.Linear(64, 32, bias=False)
        return nn.Sequential(*layers)

    def make() -> nn.Module:
        return shard(replica(), shard_placement_fn=lambda parameter: Shard(1))

    assert_plain(make, replica(), backward_of_any)
    model, inner = make(), replica()
    ledger = Ledger(commrt.attach(model, "loco4:block=32", min_numel=1))
    for step in range(8):
        model.zero_grad()
        ledger.take(model, inner, lambda part, step=step: backward_of_any(part, step))
    ledger.check(tolerance=0.001)


class Tied(nn.Module):
    """Shared weights, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(IN, 32, bias=False)
        self.again = nn.Linear(IN, 32, bias=False)
        self.again.weight = self.inner.weight
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.out = nn.Linear(32, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.frozen(self.again(self.inner(inputs).tanh())))


def shared_and_frozen() -> None:
    def make() -> nn.Module:
        model = Tied()
        fully_shard(model.frozen)
        fully_shard(model.out)
        return fully_shard(model)

    assert_plain(make, Tied())
    model = Tied()
    model.out.bias.requires_grad_(False)  # one unit of both kinds
    comm = commrt.attach(fully_shard(model), "loco4:block=32", min_numel=64)
    train(model, range(2), backward)
    before = comm.state_dict()["residuals"].keys()
    assert before == {"inner.weight", "out.weight"}
    model.frozen.weight.requires_grad_(True)
    train(model, range(2, 4), backward)
    assert comm.state_dict()["residuals"].keys() == before | {"frozen.weight"}
    model.inner.weight.requires_grad_(False)
    train(model, range(4, 6), backward)
    assert comm.residual_norm() > 0


def before_backward_ends() -> None:
    """Hooks that look at gradients in backward find them final; so do those that accumulate."""
    model = shard(small_model())
    commrt.attach(model, min_numel=64)
    seen: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.update({name: p.grad.to_local().clone()})
        )
    with delayed(0.05):
        backward(model, 0)
    for name, parameter in model.named_parameters():
        assert torch.equal(seen[name], parameter.grad.to_local()), name
    model = shard(small_model())
    commrt.attach(model, min_numel=64)
    backward(model, 0)
    first = whole_gradients(model)
    with delayed(0.05):
        backward(model, 0)
    for name, gradient in whole_gradients(model).items():
        assert (gradient - 2 * first[name]).abs().max() <= 0.3 * first[name].abs().max() + 1e-8


@contextmanager
def delayed(seconds: float) -> Iterator[list[float]]:
    """Every reduce-scatter takes that much longer; yields one entry for each that began."""
    reduce_scatter = ShardReducer.reduce_scatter
    delays: list[float] = []

    def slow(*args: Any) -> list[Tensor]:
        delays.append(seconds)
        time.sleep(seconds)
        return reduce_scatter(*args)

    with mock.patch.object(ShardReducer, "reduce_scatter", slow):
        yield delays


def backward_waits() -> None:
    """Gradients that are reduced beside backward are there when it ends."""
    models = [shard(small_model()) for _ in range(2)]
    for model in models:
        commrt.attach(model, min_numel=64)
    for step in range(3):
        backward(models[0], step)
        with delayed(0.05) as delays:
            backward(models[1], step)
        assert delays
        assert_same_on_all_ranks(*whole_gradients(models[1]).values())
        for first, second in zip(
            whole_gradients(models[0]).values(), whole_gradients(models[1]).values(), strict=True
        ):
            assert torch.equal(first, second)


def partial_sums() -> None:
    """HSDP's gradients may be added up inside the shard groups before they are all-reduced."""
    models = [shard(small_model(), "hsdp") for _ in range(3)]
    commrt.attach(models[1], "none")
    comm = commrt.attach(models[2], min_numel=64)
    for model in models:
        for step in range(2):
            model.set_requires_all_reduce(False)
            backward(model, 10 + step)
        assert model is not models[2] or comm.stats().reduce_bytes == 0
        model.set_requires_all_reduce(True)
        backward(model, 12)
    plain, exact, coded = map(whole_gradients, models)
    for name, gradient in plain.items():
        torch.testing.assert_close(exact[name], gradient, rtol=1e-6, atol=1e-8)
        assert (coded[name] - gradient).abs().max() <= 0.2 * gradient.abs().max()


@pytest.mark.parametrize(
    "checks",
    [
        [fifty_steps, offloaded, half_precision, forced_sums, other_factors],
        [compiled, prefetched, on_inner_dimensions],
        [shared_and_frozen, before_backward_ends, backward_waits, partial_sums],
    ],
)
def test_what_users_set_stays_as_it_is(checks: list[Callable[[], None]]) -> None:
    run_ranks(all_of, checks, world_size=4, timeout_s=120)


def of_two_groups() -> None:
    """Data parallel over one dimension of a mesh; the other could be tensor parallel."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(mesh.get_local_rank("tp"))
    model = small_model(seed=mesh.get_local_rank("tp"))
    replica = small_model(seed=mesh.get_local_rank("tp"))
    comm = commrt.attach(shard(model, mesh=mesh["dp"]), min_numel=64)
    backward(model, 0)
    backward(replica, 0)
    group = mesh.get_group("dp")
    for name, gradient in whole_gradients(model).items():
        mean = dict(replica.named_parameters())[name].grad / 2
        largest = mean.abs().max()
        dist.all_reduce(mean, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        assert (gradient - mean).abs().max() <= 2 * ONE_WAY_BOUND * largest + 1e-8
        assert_same_on_all_ranks(gradient, group=group)
    assert comm.state_dict()["world_size"] == 2


def of_layers_on_other_meshes() -> None:
    """Experts, say, are shared by fewer ranks than the rest."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model = small_model()
    fully_shard(model[0], mesh=mesh["b"])
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    comm = commrt.attach(model, "loco4", "block8", min_numel=64)
    losses = train(model, range(6), backward)
    assert losses[-1] < losses[0]
    assert_same_on_all_ranks(*(whole_weights(model)[name] for name in ("3.weight", "5.weight")))
    assert_same_on_all_ranks(whole_weights(model)["0.weight"], group=mesh.get_group("b"))
    assert comm.state_dict()["world_size"] == 4


def test_meshes() -> None:
    run_ranks(all_of, [of_two_groups, of_layers_on_other_meshes], world_size=4)


@contextmanager
def gathered(model: nn.Module, found: list[dict[str, Tensor]]) -> Iterator[None]:
    """Note the weights that every forward computes with."""
    handles = [
        module.register_forward_pre_hook(
            lambda m, *_, prefix=prefix: found.append(
                {f"{prefix}.{n}": p.detach().clone() for n, p in m.named_parameters(recurse=False)}
            )
        )
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    yield
    for handle in handles:
        handle.remove()


def weights_at_8_bits() -> None:
    """All ranks compute with the same; the optimizer has the full-precision ones."""
    for kind in ("fsdp2", "fsdp2-keep", "fsdp2-2", "hsdp"):
        for dtype in (None, torch.bfloat16):
            model = small_model().bfloat16() if dtype else small_model()
            model = shard(model, kind)
            comm = commrt.attach(model, "loco4", "block8", min_numel=64)
            found: list[dict[str, Tensor]] = []
            before = whole_weights(model)
            with gathered(model, found):
                inputs, _ = batch(0)
                model(inputs.to(dtype or torch.float32)).float().sum().backward()
            used = {name: weight for layer in found for name, weight in layer.items()}
            assert_same_on_all_ranks(*used.values())
            for name, weight in used.items():
                exact = before[name]
                is_coded = name in comm._gathers.registry.compressed
                assert same_bits(weight, exact) != is_coded, name
                half_a_step = exact.float().abs().max() / 254 * (1 + 1 / 128)
                rounding = 0.51 if dtype is None else 1.0  # of bfloat16
                error = (weight.float() - exact.float()).abs().max()
                assert error <= (0.5 + rounding) * half_a_step, name
            for name, weight in whole_weights(model).items():
                assert same_bits(weight, before[name]), name
            assert comm.stats().weight_bytes + comm.stats().node_bytes > 0
            assert "weights as they are: 233 elements" in comm.report()


def backward_computes_with_the_same() -> None:
    """Whatever is gathered again in backward has the bits of forward."""
    for kind in ("fsdp2", "hsdp"):
        model = shard(small_model(), kind)
        commrt.attach(model, "loco4", "block8", min_numel=64)
        found: dict[str, list[str]] = {}
        gather = Gathers.gather

        def noted(
            self: Any, unit: Any, *args: Any, gather: Any = gather, found: Any = found
        ) -> Any:
            output = gather(self, unit, *args)
            found.setdefault(unit.name, []).append(digest([output]))
            return output

        with mock.patch.object(Gathers, "gather", noted):
            backward(model, 0)
        for name in ("0", "5"):  # whose buffers have no padding
            assert len(found[name]) == 2, kind
            assert len(set(found[name])) == 1, kind


def differences_at_4_bits() -> None:
    """Gathered weights follow the optimizer's, and what a gather leaves out the next one sends."""
    model = shard(small_model(), "fsdp2-keep")
    comm = commrt.attach(model, "loco4", "delta4:block=32", min_numel=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    last: dict[str, Tensor] = {}
    for step in range(6):
        found: list[dict[str, Tensor]] = []
        exact = whole_weights(model)
        with gathered(model, found):
            train(model, [step], backward, optimizer)
        used = {name: weight for layer in found for name, weight in layer.items()}
        assert_same_on_all_ranks(*used.values())
        for name in comm._gathers.registry.compressed:
            if step == 0:
                assert same_bits(used[name], exact[name])
                continue
            moved = (exact[name] - last[name]).abs().max()
            assert 0 < (used[name] - exact[name]).abs().max() <= 1.01 * ONE_WAY_BOUND * moved
        last = used
    exact, gaps = whole_weights(model), []
    with torch.no_grad():
        for _ in range(3):
            found = []
            with gathered(model, found):
                model(torch.zeros(1, IN))
            model.reshard()
            for layer in (model[0], model[3], model[5]):
                layer.reshard()
            gaps.append(
                max((w - exact[n]).abs().max() for layer in found for n, w in layer.items())
            )
    assert gaps[1] < 0.1 * gaps[0]
    assert gaps[2] <= 0.1 * gaps[1]
    comm.forget_weights()
    found = []
    with torch.no_grad(), gathered(model, found):
        model(torch.zeros(1, IN))
    assert all(same_bits(w, exact[n]) for layer in found for n, w in layer.items())


def differences_that_were_not_finite() -> None:
    """Weights that were NaN once and are mended by the user do not stay NaN."""
    model = shard(small_model(), "fsdp2-keep")
    commrt.attach(model, "loco4", "delta4", min_numel=64)
    train(model, range(2), backward)
    weight = model[0].weight.to_local()
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        model(torch.zeros(1, IN))
        for layer in (model[0], model[3], model[5], model):
            layer.reshard()
        weight.copy_(kept)
        assert model(torch.zeros(1, IN)).isfinite().all()


def test_gathered_weights() -> None:
    checks = [
        *(weights_at_8_bits, backward_computes_with_the_same),
        *(differences_at_4_bits, differences_that_were_not_finite),
    ]
    run_ranks(all_of, checks, world_size=4, timeout_s=120)


def bad_gradients_stay_in_their_block() -> None:
    model = shard(small_model())
    comm = commrt.attach(model, "loco4:block=64", min_numel=64)
    backward(model, 0)
    model.zero_grad()
    states = comm.state_dict()["residuals"]
    handles = []

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[130], gradient.view(-1)[1700] = torch.nan, torch.inf
        return gradient

    def poison(module: nn.Module, *_: Any) -> None:
        handles.append(module.weight.register_hook(spoil))

    if dist.get_rank() == 1:
        handles.append(model[0].register_forward_pre_hook(poison))
    backward(model, 1)
    for handle in handles:
        handle.remove()
    expected = torch.zeros(64 * IN, dtype=torch.bool)
    expected[128:192] = expected[1664:1728] = True
    found = whole_gradients(model)
    assert torch.equal(found.pop("0.weight").flatten().isnan(), expected)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert torch.tensor(comm.residual_norm()).isfinite()
    assert comm.state_dict()["residuals"].keys() == states.keys()
    model.zero_grad()
    backward(model, 2)
    assert all(gradient.isfinite().all() for gradient in whole_gradients(model).values())


def bytes_are_counted() -> None:
    """Of every leg, exactly but for gloo's headers."""
    for codec, gather in (("loco4", None), ("loco4", "block8"), ("none", None)):
        model = shard(nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))))
        comm = commrt.attach(model, codec, gather)
        inputs = torch.randn(2, 512)
        model(inputs).sum().backward()
        dist.barrier()
        counted, sent = comm.stats().wire_bytes, tcp_bytes_sent()
        model(inputs).sum().backward()
        dist.barrier()
        sent = tcp_bytes_sent() - sent
        counted = comm.stats().wire_bytes - counted
        assert counted <= sent <= 1.01 * counted + 8192, (codec, gather, counted, sent)
    stats = comm.stats()
    assert stats.weight_bytes > 0
    assert stats.reduce_bytes == 0
    assert stats.ratio < 1.0  # gloo's reduce-scatter sends what an all-reduce does


def test_bytes_and_bad_gradients() -> None:
    run_ranks(all_of, [bad_gradients_stay_in_their_block, bytes_are_counted], world_size=4)


def steps_are_counted() -> None:
    """Of warm-up, of accumulation, and of backwards that reduce nothing."""
    model = shard(small_model())
    comm = commrt.attach(model, warmup=2, min_numel=64)
    for step in range(2):
        assert "warm-up: compressed from step 2 on" in comm.report()
        train(model, [step], backward)
        assert comm.stats().reduce_bytes == 0
    with no_sync(model):
        backward(model, 2)
    assert comm.stats().steps == 2
    backward(model, 3)
    assert comm.stats().steps == 3
    assert comm.stats().reduce_bytes > 0
    comm.detach()
    sent = comm.stats().reduce_bytes
    train(model, [4], backward)
    assert comm.stats().reduce_bytes == sent
    assert comm.stats().residual_bytes == 0
    assert "uncompressed all gradients now: detached" in comm.report()
    comm.close()
    sent = comm.stats().wire_bytes
    backward(model, 5)  # as without commrt
    assert comm.stats().wire_bytes == sent


def noop_sends_nothing() -> None:
    model = shard(small_model())
    comm = commrt.attach(model, "noop")
    before = tcp_bytes_sent()
    backward(model, 0)
    assert tcp_bytes_sent() - before < 4096
    assert comm.stats().wire_bytes == 0


def reports() -> None:
    comm = commrt.attach(shard(small_model()), gather="block8")
    lines = comm.report(verbose=True)
    assert "(FSDP2)" in lines
    assert "uncompressed 264 elements in 1 parameters: fewer than 1024 elements (5.weight)" in lines
    for name in ("0.bias", "1.weight", "1.bias", "3.bias", "5.bias"):
        assert name in lines
    assert "0.weight" not in lines
    assert "weights as they are: 264 elements" in lines


def alone() -> None:
    """One rank of a mesh: nothing to send."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))
    model = shard(small_model(), mesh=mesh["b"])
    comm = commrt.attach(model, gather="block8")
    assert train(model, range(2), backward) == train(small_model(), range(2), backward)
    assert comm.stats().wire_bytes == 0
    assert "world size 1" in comm.report()


def test_steps_and_reports() -> None:
    checks = [steps_are_counted, noop_sends_nothing, reports, alone]
    run_ranks(all_of, checks, world_size=2)


def refuses(model: nn.Module, message: str, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        commrt.attach(model, **settings)


def refusals() -> None:
    refuses(small_model(), "model is a Sequential: must be a DistributedDataParallel, a Fully")
    refuses(
        shard(small_model()), "reshard_after_forward of module '.*': must be False", gather="delta4"
    )
    refuses(shard(small_model()), "no rank of a sharded model has matrices", codec="lowrank4")
    refuses(shard(small_model()), "must be 'device' or 'host'", residuals="disk")
    refuses(shard(small_model()), "gather.*loco4.*must be 'none' or a block codec", gather="loco4")
    refuses(shard(small_model()), "only gather= of a sharded model", codec="delta4")
    refuses(shard(small_model()), "must divide the 4 ranks", hierarchy=3)
    refuses(shard(small_model(), "hsdp"), "None where shards have replicas", hierarchy=2)
    scaler = torch.amp.GradScaler("cpu")
    refuses(shard(small_model()), "must be 'device'", residuals="host", grad_scaler=scaler)
    refuses(wrap_as("ddp"), "must be None with DDP", returns="block8")
    refuses(wrap_as("ddp"), "must be 'device' with DDP", residuals="host")
    refuses(wrap_as("ddp"), "gather=.*delta4", gather="delta4")
    refuses(wrap_as("FULL_SHARD"), "FSDP1 has no hook for its weights", gather="block8")
    model = wrap_as("FULL_SHARD")
    commrt.attach(model)
    refuses(model, "has a communication hook already")
    model = shard(small_model())
    with pytest.raises(PeerMismatchError, match="ranks disagree on min_numel: rank 0: 64"):
        commrt.attach(model, min_numel=64 if dist.get_rank() == 0 else 65)


class OneOfTwo(nn.Module):
    """One unit, of which one layer is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(IN, 64), nn.Linear(IN, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


def layouts_that_change() -> None:
    """To turn off what keeps buffers in one layout is found out, on every rank."""
    model = fully_shard(OneOfTwo())
    comm = commrt.attach(model)
    backward_of_any(model, 0)
    assert not whole_gradients(model)["unused.weight"].any()
    assert comm.residual_norm() > 0
    model.set_reduce_scatter_unused_params(False)
    with pytest.raises(Exception, match="leave set_reduce_scatter_unused_params"):
        backward_of_any(model, 1)


def test_refusals() -> None:
    run_ranks(all_of, [refusals, layouts_that_change], world_size=4)


def fail_in_backward() -> str:
    """An error on the thread of one rank reaches its training loop, and the others' too."""
    model = shard(small_model())
    commrt.attach(model, min_numel=64)
    backward(model, 0)

    def fail(*args: Any) -> None:
        raise RuntimeError("the cable is out")

    target = mock.patch.object(ShardReducer, "reduce_scatter", fail)
    try:
        with target if dist.get_rank() == 1 else mock.patch.object(dist, "unused", create=True):
            backward(model, 1)
            backward(model, 2)
    except RuntimeError as error:
        return str(error)
    return ""


def test_an_error_reaches_the_training_loop() -> None:
    with pytest.raises(commrt.testing.RankError) as error:
        run_ranks(fail_and_leave, world_size=2, timeout_s=30)
    assert "the cable is out" in error.value.failures[1]


def fail_and_leave() -> None:
    message = fail_in_backward()
    if message:
        raise RuntimeError(message)


def weights_stay_the_same() -> None:
    """Matrices only: what ranks gather has one digest."""
    model = shard(no_bias())
    commrt.attach(model, "loco2", "block4", min_numel=1)
    train(model, range(3), backward_of_any)
    digests: list[Any] = [None] * dist.get_world_size()
    found: list[dict[str, Tensor]] = []
    with torch.no_grad(), gathered(model, found):
        model(torch.ones(1, IN))
    dist.all_gather_object(digests, digest([w for layer in found for w in layer.values()]))
    assert len(set(digests)) == 1


def test_low_bits_both_ways() -> None:
    run_ranks(weights_stay_the_same, world_size=3)


class Recomputed(nn.Module):
    """Layers whose activations are computed again in backward."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = small_model()
        self.use_reentrant = use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_()
        hidden = checkpoint(self.inner[:3], inputs, use_reentrant=self.use_reentrant)
        return checkpoint(self.inner[3:], hidden, use_reentrant=self.use_reentrant)


def recomputed() -> None:
    """One backward inside the other, or not: each step is one step, and is waited for."""
    for use_reentrant in (False, True):

        def make(use_reentrant: bool = use_reentrant) -> nn.Module:
            model = Recomputed(use_reentrant=use_reentrant)
            for index in (0, 3, 5):
                fully_shard(model.inner[index])
            return fully_shard(model)

        assert_plain(make, Recomputed(use_reentrant=use_reentrant))
        model = make()
        comm = commrt.attach(model, min_numel=64)
        with delayed(0.02):
            train(model, range(3), backward)
        assert comm.stats().steps == 3


def test_activation_checkpointing() -> None:
    run_ranks(recomputed, world_size=2)
