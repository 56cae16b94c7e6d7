"""What the hook leaves alone, or sends in another way: warm-up, noop, parameters that DDP keeps to
itself, sparse gradients, small parameters.

Bit-identical: what is not compressed, and plain DDP of two ranks.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.errors import ConfigError
from commrt.testing import run_ranks
from tests.dist.ddp_checks import assert_close, residuals_of
from tests.dist.small_training import (
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
