"""The DDP hook: what it averages, whatever DDP does with its buckets.

Bit-identical: weights of all ranks, always; with codec "none", and for uncompressed parameters, the
gradients of plain DDP of two ranks (with more, sums may run in another order); compressed gradients
for any bucket size and DDP option. What differs from plain DDP: compressed gradients, by less than
BOUND of the largest in the first step.
"""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import commrt
from commrt.testing import run_ranks
from tests.dist.ddp_checks import (
    BOUND,
    assert_bad_in_blocks,
    assert_close,
    assert_nothing_is_lost,
    keep_ledger,
    no_bias,
    poisoned,
)
from tests.dist.small_training import (
    EXEMPT,
    IN,
    OUT,
    all_of,
    assert_same_on_all_ranks,
    backward,
    gradients,
    local_gradients,
    same_bits,
    small_model,
    train,
    weights,
    wrap,
)

# -- codec "none" and what is not compressed ------------------------------------------------------


def none_is_plain_ddp() -> None:
    plain, exact = wrap(small_model()), wrap(small_model())
    comm = commrt.attach(exact, "none")
    assert train(plain, range(6)) == train(exact, range(6))
    assert same_bits(weights(plain), weights(exact))
    assert comm.stats().steps == 6
    assert comm.stats().residual_bytes == 0
    assert comm.stats().ratio == 1.0


def no_sync_accumulates_as_in_plain_ddp() -> None:
    plain, exact, coded = wrap(small_model()), wrap(small_model()), wrap(small_model())
    commrt.attach(exact, "none")
    comm = commrt.attach(coded, "loco4")
    for step in range(0, 6, 2):
        for model in (plain, exact, coded):
            model.zero_grad()
            with model.no_sync():
                backward(model, step)
            backward(model, step + 1)
    for name, gradient in gradients(exact).items():
        assert same_bits(gradient, gradients(plain)[name])
    assert comm.stats().steps == 3


def one_accumulated_step_is_close() -> None:
    model = wrap(small_model())
    commrt.attach(model)

    def two_batches(replica: nn.Module) -> None:
        backward(replica, 0)
        backward(replica, 1)

    with model.no_sync():
        backward(model, 0)
    backward(model, 1)
    assert_close(model, two_batches)


def small_parameters_are_exact() -> None:
    """In the first step, where both have the same weights; and in the second, from new buckets."""
    model = wrap(small_model())
    commrt.attach(model)
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        means, _ = local_gradients(model.module, lambda replica, step=step: backward(replica, step))
        found = gradients(model)
        exact = {name for name, gradient in found.items() if same_bits(gradient, means[name])}
        assert exact == EXEMPT


def detached_is_plain_ddp() -> None:
    model = wrap(small_model())
    comm = commrt.attach(model)
    train(model, range(3))
    before = comm.stats()
    assert before.residual_bytes > 0
    comm.detach()
    plain = wrap(model.module)
    plain.zero_grad()
    assert train(model, range(3, 6)) == train(plain, range(3, 6))
    assert same_bits(weights(model), weights(plain))
    after = comm.stats()
    assert (after.reduce_bytes, after.gather_bytes) == (before.reduce_bytes, before.gather_bytes)
    assert after.exact_bytes > before.exact_bytes
    assert after.residual_bytes == 0
    assert after.steps == 6
    assert "uncompressed all gradients now: detached" in comm.report()


def test_uncompressed_gradients_are_those_of_plain_ddp() -> None:
    """To the bit: codec "none", accumulation, small parameters, after detach()."""
    checks = [
        none_is_plain_ddp,
        no_sync_accumulates_as_in_plain_ddp,
        one_accumulated_step_is_close,
        small_parameters_are_exact,
        detached_is_plain_ddp,
    ]
    run_ranks(all_of, checks, world_size=2)


# -- compressed ----------------------------------------------------------------------------------


def loco_trains_like_fp32() -> None:
    plain, coded = wrap(small_model()), wrap(small_model())
    commrt.attach(coded)
    backward(coded, 0)
    assert_close(coded, lambda replica: backward(replica, 0))
    before = sum(train(plain, range(40))[-5:])
    after = sum(train(coded, range(40))[-5:])
    assert_same_on_all_ranks(weights(coded))
    assert after == pytest.approx(before, rel=0.05)
    assert not same_bits(weights(plain), weights(coded))


def test_loco_keeps_ranks_identical_and_close_to_fp32() -> None:
    """Weights of the ranks agree to the bit; losses are within 5 % of plain DDP's."""
    run_ranks(loco_trains_like_fp32, world_size=3)


CODECS = ["loco4", "loco2:residual=4,rounding=stochastic"]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"bucket_cap_mb": 0.0001},
    {"bucket_cap_mb": 0.005},
    {"gradient_as_bucket_view": True},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.005},
    {"find_unused_parameters": True},
    {"static_graph": True, "bucket_cap_mb": 0.005},
]


def results_of(codec: str, options: dict[str, Any]) -> Tensor:
    """Weights, residuals and the uncompressed bytes, in one tensor."""
    model = wrap(small_model(), **options)
    comm = commrt.attach(model, codec)
    train(model, range(5))
    residuals = comm.state_dict()["residuals"]
    exact_bytes = torch.tensor([float(comm.stats().exact_bytes)])
    parts = [residuals[name].float() for name in sorted(residuals)]
    return torch.cat([weights(model), exact_bytes, *parts])


def buckets_do_not_matter() -> None:
    for codec in CODECS:
        first, *others = [results_of(codec, options) for options in VARIANTS]
        for options, other in zip(VARIANTS[1:], others, strict=True):
            assert same_bits(first, other), (codec, options)
        with mock.patch("commrt.hooks.legs.MAX_RUN", 1):
            assert same_bits(first, results_of(codec, {})), codec


def test_results_do_not_depend_on_buckets() -> None:
    """Weights and residuals equal to the bit for any bucket size and DDP option, and however many
    elements are coded at a time.
    """
    run_ranks(buckets_do_not_matter, world_size=2)


def buckets_of_matrices_do_not_matter() -> None:
    found = []
    for options in VARIANTS[:3]:
        model = wrap(no_bias(), **options)
        comm = commrt.attach(model, "loco4", min_numel=0)
        train(model, range(5))
        assert comm.stats().exact_bytes == 0
        found.append(weights(model))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def pair_of_ranks() -> None:
    """Two models at once, one on ranks 0 and 2, one on 1 and 3."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own = groups[dist.get_rank() % 2]
    model = wrap(small_model(), process_group=own)
    comm = commrt.attach(model)
    train(model, range(3))
    assert_same_on_all_ranks(weights(model), group=own)
    digests: list[Any] = [None] * 4
    dist.all_gather_object(digests, weights(model).double().sum().item())
    assert digests[0] != digests[1]
    assert "commrt: 2 ranks" in comm.report()


def test_four_ranks() -> None:
    """With compressed parameters only, bucket sizes change no bit at W=4 either; sub-groups."""
    run_ranks(all_of, [buckets_of_matrices_do_not_matter, pair_of_ranks], world_size=4)


def lightning_style_is_attach() -> None:
    """Parameters are named as they come; the codec does not care."""
    attached, registered = wrap(small_model()), wrap(small_model())
    commrt.attach(attached)
    comm = commrt.Comm("loco4")
    registered.register_comm_hook(comm, commrt.ddp_hook)
    train(attached, range(4))
    train(registered, range(4))
    assert same_bits(weights(attached), weights(registered))
    assert comm.stats().residual_bytes > 0
    assert "fewer than 2 dimensions (parameter." in comm.report()


def a_reset_every_step_is_no_compensation() -> None:
    """An empty residual sends what the plain block codec sends; a full one does not."""
    plain = weights_of("block4")
    assert same_bits(weights_of("loco4:reset=1"), plain)
    assert not same_bits(weights_of("loco4"), plain)
    assert not same_bits(weights_of("loco4:reset=3"), plain)


def weights_of(codec: str) -> Tensor:
    model = wrap(small_model())
    commrt.attach(model, codec)
    train(model, range(4))
    return weights(model)


def mixed_dtypes() -> nn.Sequential:
    class ToBfloat16(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.bfloat16()

    torch.manual_seed(0)
    low = nn.Sequential(nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, OUT)).bfloat16()
    return nn.Sequential(nn.Linear(IN, 64), ToBfloat16(), *low)


def mixed_dtypes_are_compressed() -> None:
    plain, exact, coded = wrap(mixed_dtypes()), wrap(mixed_dtypes()), wrap(mixed_dtypes())
    commrt.attach(exact, "none")
    comm = commrt.attach(coded, "loco4")
    backward(coded, 0)
    # bf16 means are rounded to 8 bits of mantissa, here and in the plain average.
    largest = max(float(gradient.abs().max()) for gradient in gradients(coded).values())
    assert_close(coded, lambda replica: backward(replica, 0), atol=largest / 128)
    assert set(comm.state_dict()["residuals"]) == {"0.weight", "2.weight"}
    train(plain, range(3))
    train(exact, range(3))
    train(coded, range(3))
    assert same_bits(weights(plain), weights(exact))
    assert_same_on_all_ranks(weights(coded))


def convolution() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.LazyLinear(OUT)
    model = nn.Sequential(*layers)
    model(torch.zeros(1, 3, 8, 8))
    return model


def channels_last_is_compressed() -> None:
    def run(replica: nn.Module) -> None:
        generator = torch.Generator().manual_seed(dist.get_rank())
        inputs = torch.randn(4, 3, 8, 8, generator=generator)
        replica(inputs.to(memory_format=torch.channels_last)).square().mean().backward()

    for options in ({}, {"gradient_as_bucket_view": True}):
        model = wrap(convolution().to(memory_format=torch.channels_last), **options)
        assert not model.module[2].weight.is_contiguous()
        commrt.attach(model)
        run(model)
        assert_close(model, run)


class TwoBranches(nn.Module):
    """Each rank takes a branch of its own in even steps, and all take the first in odd ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(IN, OUT * 8, bias=False) for _ in range(3))
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        branch = 0 if self.step % 2 else dist.get_rank()
        return self.branches[branch](x)[:, :OUT]


def unused_parameters_are_zeros() -> None:
    """A branch that one rank uses counts as zero on the others; one nobody uses has no gradient."""
    plain = wrap(TwoBranches(), find_unused_parameters=True)
    exact = wrap(TwoBranches(), find_unused_parameters=True)
    coded = wrap(TwoBranches(), find_unused_parameters=True)
    commrt.attach(exact, "none")
    commrt.attach(coded, "loco4")
    backward(coded, 0)
    backward(plain, 0)
    assert gradients(coded).keys() == {"branches.0.weight", "branches.1.weight"}
    for name, gradient in gradients(coded).items():
        mean = gradients(plain)[name]
        assert (gradient - mean).abs().max() <= BOUND * 2 * mean.abs().max()
    for step in range(4):
        for model in (plain, exact, coded):
            model.module.step = step
            train(model, [step])
    assert same_bits(weights(plain), weights(exact))
    assert_same_on_all_ranks(weights(coded))


class EmptyMatrix(nn.Module):
    """A matrix without elements, as a layer of no inputs has, beside a real one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(IN, OUT)
        self.empty = nn.Parameter(torch.zeros(4, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.empty.sum()


def empty_parameters_are_averaged() -> None:
    for options in ({}, {"find_unused_parameters": True}):
        model = wrap(EmptyMatrix(), **options)
        commrt.attach(model, min_numel=0)
        backward(model, 0)
        assert model.module.empty.grad.shape == (4, 0)
        means, largest = local_gradients(model.module, lambda replica: backward(replica, 0))
        error = (model.module.layer.weight.grad - means["layer.weight"]).abs().max()
        assert error <= BOUND * largest["layer.weight"]


def test_parameters_may_be_empty() -> None:
    run_ranks(empty_parameters_are_averaged, world_size=2)


def test_kinds_of_models_and_hooks() -> None:
    """Close to the plain mean in the first step; all ranks the same; codec "none" as plain DDP."""
    checks = [
        lightning_style_is_attach,
        a_reset_every_step_is_no_compensation,
        mixed_dtypes_are_compressed,
        channels_last_is_compressed,
        unused_parameters_are_zeros,
    ]
    run_ranks(all_of, checks, world_size=2)


# -- invariants ----------------------------------------------------------------------------------


def nothing_is_lost() -> None:
    for codec in ("loco4", "loco2", "loco4:beta=0", "loco8:beta=0.5"):
        assert_nothing_is_lost(range(30), codec)


def nothing_is_lost_of_unused_parameters() -> None:
    model = wrap(TwoBranches(), find_unused_parameters=True)
    ledger = keep_ledger(model, "loco4")
    for step in range(20):
        model.module.step = step
        model.zero_grad()
        backward(model, step)
        ledger.end_step()
    ledger.check("branches.0.weight")
    ledger.check("branches.1.weight")


def test_nothing_is_lost_of_unused_parameters() -> None:
    """What the residual of a parameter holds survives steps in which no rank uses it."""
    run_ranks(nothing_is_lost_of_unused_parameters, world_size=2)


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, 64), nn.Tanh(), nn.Linear(64, OUT))


def bad_gradients_stay_in_their_block() -> None:
    model = wrap(wide())
    comm = commrt.attach(model, "loco4:block=64")
    weight, bias = model.module[0].weight, model.module[0].bias
    backward(model, 0)
    before = comm.state_dict()["residuals"]["0.weight"]
    model.zero_grad()
    values = {130: torch.nan, 700: torch.inf, 701: -torch.inf}
    with poisoned({weight: values, bias: {3: torch.nan, 5: torch.inf}}):
        backward(model, 1)
    expected = torch.zeros(weight.numel(), dtype=torch.bool)
    expected[128:192] = expected[640:704] = True
    assert_bad_in_blocks(model, weight, expected)
    assert bias.grad.isnan().nonzero().flatten().tolist() == [3]
    assert bias.grad.isinf().nonzero().flatten().tolist() == [5]
    assert torch.isfinite(torch.tensor(comm.residual_norm()))
    if dist.get_rank() == 1:
        assert_blocks_kept(before, comm.state_dict()["residuals"]["0.weight"], expected)
    model.zero_grad()
    backward(model, 2)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def assert_blocks_kept(before: Tensor, after: Tensor, kept: Tensor) -> None:
    """The residual of the bad blocks is as it was; others have changed."""
    codes = slice(0, kept.numel())
    is_same = before[codes] == after[codes]
    assert is_same[kept].all()
    assert not is_same[~kept].all()


def test_nothing_is_lost_and_bad_gradients_stay_where_they_were() -> None:
    """Sent, received and still owed add up, within the rounding of the residuals in storage.
    NaN or Inf on rank 1: NaN in its block on every rank, as it is in a 1-D parameter, and all
    finite again in the next step.
    """
    run_ranks(all_of, [nothing_is_lost, bad_gradients_stay_in_their_block], world_size=2)


def one_rank_sends_nothing() -> None:
    model = wrap(small_model())
    comm = commrt.attach(model)
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        means, _ = local_gradients(model.module, lambda replica, step=step: backward(replica, step))
        for name, gradient in gradients(model).items():
            assert same_bits(gradient, means[name])
    assert comm.stats().wire_bytes == 0
    assert comm.stats().steps == 2
    assert "world size 1: nothing is sent and nothing is compressed" in comm.report()


def test_one_rank_sends_nothing() -> None:
    """World size 1: the gradients themselves, to the bit."""
    run_ranks(one_rank_sends_nothing, world_size=1)
