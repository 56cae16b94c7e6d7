"""Two levels: full precision or 8 bits inside a node, low bits between nodes.

Bit-identical: weights of all ranks; a hierarchy of one rank a node and no hierarchy; runs whose
buckets differ. To tolerance: the mean, by BOUND of the largest gradient in the first step and, with
8 bits inside the nodes, half a step of those more. Bytes are compared with what goes into the
process groups.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import commrt
from commrt.collectives import torch_names
from commrt.errors import ConfigError
from commrt.testing import run_ranks
from tests.dist.ddp_checks import (
    BOUND,
    assert_bad_in_blocks,
    assert_close,
    assert_nothing_is_lost,
    keep_ledger,
    no_bias,
    poisoned,
    residuals_of,
)
from tests.dist.small_training import (
    IN,
    OUT,
    all_of,
    assert_same_on_all_ranks,
    backward,
    gradients,
    residual_of,
    same_bits,
    small_model,
    train,
    weights,
    wrap,
)

HALF_8_BIT = 1 / 254 * (1 + 1 / 128)
INTRA_BOUND = BOUND * (1 + HALF_8_BIT) + HALF_8_BIT

CASES: list[tuple[Any, str, float]] = [
    (2, "none", BOUND),
    (2, "block8", INTRA_BOUND),
    ([[0, 2], [1, 3]], "block8", INTRA_BOUND),
    ([[3, 1], [0, 2]], "none", BOUND),
]
"""The nodes, the codec inside them, and how far the mean may be off."""


def uneven() -> nn.Sequential:
    """Matrices of 16 blocks of 128, of one, of two, of a part of one, and of a single element; and
    vectors, which travel uncompressed.
    """
    torch.manual_seed(0)
    sizes = [IN, 64, 2, 65, 1, 1, OUT]
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def weights_and_residuals(model: nn.Module, comm: commrt.Comm) -> Tensor:
    """Weights and this rank's residuals in one tensor."""
    return torch.cat([weights(model), *(part.float() for part in residuals_of(comm).values())])


# -- the mean -------------------------------------------------------------------------------------


def the_mean_is_that_of_plain_ddp() -> None:
    for hierarchy, intra, bound in CASES:
        model = wrap(uneven(), bucket_cap_mb=0.005)
        comm = commrt.attach(model, hierarchy=hierarchy, intra=intra, min_numel=1)
        backward(model, 0)
        assert_close(model, lambda replica: backward(replica, 0), bound=bound + 1e-6)
        train(model, range(1, 4))
        assert_same_on_all_ranks(weights(model))
        assert comm.residual_norm() > 0.0


def intra_is_used() -> None:
    """8 bits inside the nodes are not full precision, nor the same as 4."""
    found = []
    for intra in ("none", "block8", "block4"):
        model = wrap(small_model())
        comm = commrt.attach(model, hierarchy=2, intra=intra)
        train(model, range(3))
        found.append((weights(model), comm.stats().node_bytes))
        assert f"2 nodes of 2 ranks, intra {comm.codecs.intra.spec}" in comm.report()
    assert not same_bits(found[0][0], found[1][0])
    assert not same_bits(found[1][0], found[2][0])
    assert found[0][1] > found[1][1] > found[2][1] > 0


def hierarchies_train_like_plain_ddp() -> None:
    losses = []
    for settings in (None, {"hierarchy": [[0, 3], [1, 2]], "intra": "block8"}):
        model = wrap(small_model())
        if settings:
            commrt.attach(model, **settings)
        losses.append(sum(train(model, range(40))[-5:]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def one_rank_a_node_is_no_hierarchy() -> None:
    for codec in ("loco4", "loco2:residual=4,rounding=stochastic"):
        found = []
        for settings in ({}, {"hierarchy": 1}, {"hierarchy": [[2], [0], [3], [1]]}):
            model = wrap(uneven())
            comm = commrt.attach(model, codec, min_numel=1, **settings)
            train(model, range(3))
            found.append((weights_and_residuals(model, comm), comm.stats()))
        flat, *others = found
        for other, stats in others:
            assert same_bits(flat[0], other)
            assert stats.reduce_bytes == flat[1].reduce_bytes
            assert stats.gather_bytes == flat[1].gather_bytes
            assert stats.dense_bytes == flat[1].dense_bytes
            assert stats.node_bytes == 0


def one_node_is_plain_ddp() -> None:
    for hierarchy in (4, [[3, 1, 2, 0]]):
        plain, model = wrap(small_model()), wrap(small_model())
        comm = commrt.attach(model, hierarchy=hierarchy)
        for each in (plain, model):
            train(each, range(3))
        torch.testing.assert_close(weights(plain), weights(model), rtol=1e-5, atol=1e-7)
        assert_same_on_all_ranks(weights(model))
        assert comm.residual_norm() == 0.0
        assert "uncompressed all gradients now: one node" in comm.report()


def buckets_do_not_matter() -> None:
    """Compressed parameters only: gloo's own sums of four ranks depend on their place."""
    for codec, intra in (("loco4", "none"), ("loco2:residual=4,rounding=stochastic", "block8")):
        found = []
        for max_run, options in (
            (1 << 23, {}),
            (1 << 23, {"bucket_cap_mb": 0.0001}),
            (1 << 23, {"bucket_cap_mb": 0.005, "gradient_as_bucket_view": True}),
            (1, {}),
        ):
            model = wrap(no_bias(), **options)
            comm = commrt.attach(model, codec, hierarchy=2, intra=intra, min_numel=1)
            with mock.patch("commrt.hooks.legs.MAX_RUN", max_run):
                train(model, range(3))
            assert comm.stats().exact_bytes == 0
            found.append(weights_and_residuals(model, comm))
        assert all(same_bits(found[0], other) for other in found[1:])


def test_the_mean_over_two_levels() -> None:
    """Near the mean of all ranks, the same bits on all of them; flat and one rank a node to the
    bit; buckets do not matter.
    """
    checks = [
        the_mean_is_that_of_plain_ddp,
        intra_is_used,
        hierarchies_train_like_plain_ddp,
        one_rank_a_node_is_no_hierarchy,
        one_node_is_plain_ddp,
        buckets_do_not_matter,
    ]
    run_ranks(all_of, checks, world_size=4)


# -- bytes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def recording_sends(sent: Counter[tuple[int, ...]]) -> Iterator[None]:
    """Add up what this rank gives to other ranks, by the ranks of the process group."""
    to_all, to_one = dist.all_to_all_single, dist.send
    gather = torch_names.all_gather_single

    def record_to_all(
        output: Tensor, input: Tensor, received: list[int], sizes: list[int], *, group: Any
    ) -> Any:
        ranks = tuple(dist.get_process_group_ranks(group))
        assert input.dtype == torch.uint8
        assert sum(sizes) == input.numel()
        sent[ranks] += sum(sizes) - sizes[dist.get_rank(group)]
        return to_all(output, input, received, sizes, group=group)

    def record_to_one(input: Tensor, *, group: Any, group_dst: int) -> None:
        assert input.dtype == torch.uint8
        sent[tuple(dist.get_process_group_ranks(group))] += input.numel()
        to_one(input, group=group, group_dst=group_dst)

    def record_gather(output: Tensor, input: Tensor, *, group: Any) -> Any:
        ranks = tuple(dist.get_process_group_ranks(group))
        assert input.dtype == torch.uint8
        sent[ranks] += input.numel() * (len(ranks) - 1)
        return gather(output, input, group=group)

    with (
        mock.patch.object(dist, "all_to_all_single", record_to_all),
        mock.patch.object(dist, "send", record_to_one),
        mock.patch("commrt.collectives.exchange.all_gather_single", record_gather),
    ):
        yield


def squares() -> nn.Sequential:
    """Matrices of 512 blocks of 128."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))


def bytes_of(hierarchy: Any, intra: str = "none") -> tuple[commrt.CommStats, Counter[Any]]:
    """Of one step in several buckets."""
    model = wrap(squares(), bucket_cap_mb=0.3)
    comm = commrt.attach(model, hierarchy=hierarchy, intra=intra)
    inputs = torch.randn(2, 256)
    model(inputs).sum().backward()  # DDP rebuilds its buckets
    before, sent = comm.stats(), Counter()
    with recording_sends(sent):
        model(inputs).sum().backward()
    after = comm.stats()
    counts = {
        name: getattr(after, name) - getattr(before, name)
        for name in (
            *("steps", "reduce_bytes", "gather_bytes"),
            *("weight_bytes", "node_bytes", "exact_bytes"),
        )
    }
    kept = {name: getattr(after, name) for name in ("residual_bytes", "codec_s", "network_s")}
    dense_bytes = after.dense_bytes - before.dense_bytes
    return commrt.CommStats(**counts, **kept, dense_bytes=dense_bytes), sent


def bytes_are_those_of_the_groups() -> None:
    rank = dist.get_rank()
    flat, sent = bytes_of(None)
    assert sent == {(0, 1, 2, 3): flat.reduce_bytes + flat.gather_bytes}
    elements = sum(parameter.numel() for parameter in squares().parameters())
    for hierarchy, node, peers in (
        (2, [(0, 1), (2, 3)], [(0, 2), (1, 3)]),
        ([[0, 2], [1, 3]], [(0, 2), (1, 3)], [(0, 1), (2, 3)]),
    ):
        own_node, own_peers = (
            next(ranks for ranks in groups if rank in ranks) for groups in (node, peers)
        )
        for intra, bits in (("none", 32), ("block8", 8.125)):
            stats, sent = bytes_of(hierarchy, intra)
            assert sent == {
                own_peers: stats.reduce_bytes + stats.gather_bytes,
                own_node: stats.node_bytes,
            }
            # There: half of the elements. Back: the payloads of this share, of both owners.
            inside = (elements / 2 * bits + elements / 2 * 8.125) / 8
            assert stats.node_bytes == pytest.approx(inside, rel=0.01)
            assert stats.reduce_bytes == pytest.approx(flat.reduce_bytes / 3, rel=0.01)
            assert stats.gather_bytes == pytest.approx(flat.gather_bytes / 3, rel=0.01)
            assert stats.dense_bytes == pytest.approx(elements * 4 / 2, rel=0.01)
            assert stats.wire_bytes == stats.reduce_bytes + stats.gather_bytes
            assert 5.0 < stats.ratio < 5.4


def residuals_take_a_share_of_the_memory() -> None:
    flat, *others = (
        commrt.attach(wrap(uneven()), hierarchy=hierarchy, min_numel=1)
        for hierarchy in (None, 2, [[0, 1, 2, 3]])
    )
    for comm, local_ranks in zip(others, (2, 4), strict=True):
        own = comm.stats().residual_bytes
        total = torch.tensor(own)
        dist.all_reduce(total)
        assert total == flat.stats().residual_bytes * 4 // local_ranks
        blocks = len(residuals_of(comm)) * 130
        assert abs(own - flat.stats().residual_bytes / local_ranks) <= blocks


def test_bytes_between_nodes_and_inside() -> None:
    """Counted by stats() as they go into the groups; a third of those of one level, where each of
    four ranks sends to three. Residuals of a node's ranks together are those of one rank without.
    """
    checks = [bytes_are_those_of_the_groups, residuals_take_a_share_of_the_memory]
    run_ranks(all_of, checks, world_size=4)


# -- invariants -----------------------------------------------------------------------------------


class OneUser(nn.Module):
    """Its second branch is used by rank 2 only, in steps that are not in ``rests`` even."""

    rests = range(6, 10)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(IN, OUT * 8, bias=False) for _ in range(2))
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        is_user = dist.get_rank() == 2 and self.step not in self.rests
        return self.branches[int(is_user)](x)[:, :OUT]


def nothing_is_lost() -> None:
    for hierarchy in (2, [[0, 2], [1, 3]]):
        assert_nothing_is_lost(range(20), "loco2", hierarchy=hierarchy)


def nothing_is_lost_of_what_one_rank_uses() -> None:
    """Its node sends for it, the other node holds back what it owes, and so do both later."""
    model = wrap(OneUser(), find_unused_parameters=True)
    ledger = keep_ledger(model, "loco4", hierarchy=2)
    name, residuals = "branches.1.weight", []
    for step in range(14):
        model.module.step = step
        model.zero_grad()
        backward(model, step)
        ledger.end_step()
        assert (model.module.branches[1].weight.grad is None) == (step in OneUser.rests)
        residuals.append(residuals_of(ledger.comm)[name])
    is_held = [same_bits(*pair) for pair in itertools.pairwise(residuals)]
    if dist.get_rank() == 2:
        assert is_held == [step in OneUser.rests for step in range(1, 14)]
    else:  # of the other node, or of a share whose gradient is zero
        assert not residuals[-1].any()
    for each in ledger.given:
        ledger.check(each)


def what_one_rank_uses_is_in_the_mean() -> None:
    plain = wrap(OneUser(), find_unused_parameters=True)
    model = wrap(OneUser(), find_unused_parameters=True)
    commrt.attach(model, hierarchy=2)
    for each in (plain, model):
        backward(each, 0)
    for name, mean in gradients(plain).items():
        # A rank's gradient is at most four times the mean over ranks of which it is the only one.
        assert (gradients(model)[name] - mean).abs().max() <= BOUND * 4 * mean.abs().max()
    assert_same_on_all_ranks(*gradients(model).values())


def bad_gradients_stay_in_their_block() -> None:
    for intra in ("none", "block8"):
        model = wrap(no_bias())
        comm = commrt.attach(model, "loco4:block=64", hierarchy=2, intra=intra)
        weight = model.module[0].weight
        backward(model, 0)
        before = residual_of(comm.codec, comm.state_dict(), "0.weight")
        model.zero_grad()
        with poisoned({weight: {130: torch.nan, 1700: torch.inf, 1701: -torch.inf}}):
            backward(model, 1)
        expected = torch.zeros(weight.numel(), dtype=torch.bool)
        expected[128:192] = expected[1664:1728] = True
        assert_bad_in_blocks(model, weight, expected)
        assert torch.isfinite(torch.tensor(comm.residual_norm()))
        after = residual_of(comm.codec, comm.state_dict(), "0.weight")
        ((begin, end, *_),) = comm.state_dict()["shards"]["0.weight"]
        is_same = (before == after)[begin:end]
        if dist.get_rank() < 2:
            assert is_same[expected[begin:end]].all()
        assert not is_same[~expected[begin:end]].all()
        model.zero_grad()
        backward(model, 2)
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_nothing_is_lost_and_bad_gradients_stay_where_they_were() -> None:
    """With residuals of node means, by the rank that owns the share."""
    checks = [
        nothing_is_lost,
        nothing_is_lost_of_what_one_rank_uses,
        what_one_rank_uses_is_in_the_mean,
        bad_gradients_stay_in_their_block,
    ]
    run_ranks(all_of, checks, world_size=4)


# -- mistakes -------------------------------------------------------------------------------------


def nodes_that_do_not_fit() -> None:
    """Are refused by name, and the model is as it was."""
    model = wrap(small_model())
    for hierarchy, message in (
        (2, "hierarchy=2 ranks a node: must divide the 3 ranks"),
        (4, "hierarchy=4 ranks a node: must divide the 3 ranks"),
        (0, "hierarchy=0"),
        (-1, "hierarchy=-1"),
        ([], r"hierarchy=\[\]"),
        (1.5, "hierarchy=1.5"),
        ([0, 1, 2], r"hierarchy=\[0, 1, 2\]"),
        ([[0, 1, 2], [3, 4, 5]], r"must name each of the ranks \[0, 1, 2\] once"),
        ([[0], [1]], r"must name each of the ranks \[0, 1, 2\] once"),
        ([[0], [1], [1], [2]], r"must name each of the ranks \[0, 1, 2\] once"),
        ([[0, 1], [2]], "nodes must have equally many ranks"),
    ):
        for codec in ("loco4", "none"):
            with pytest.raises(ConfigError, match=message):
                commrt.attach(model, codec, hierarchy=hierarchy)
    comm = commrt.attach(model, hierarchy=3)
    train(model, range(2))
    assert comm.stats().steps == 2


def a_group_has_nodes_of_its_own() -> None:
    """Ranks are global ones."""
    pair = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return
    model = wrap(small_model(), process_group=pair)
    with pytest.raises(ConfigError, match=r"must name each of the ranks \[0, 2\] once"):
        commrt.attach(model, hierarchy=[[0], [1]])
    comm = commrt.attach(model, hierarchy=[[2], [0]])
    train(model, range(2))
    assert_same_on_all_ranks(weights(model), group=pair)
    assert comm.stats().reduce_bytes > 0


def test_mistakes_in_hierarchies() -> None:
    """Each is named before any communication."""
    checks = [nodes_that_do_not_fit, a_group_has_nodes_of_its_own]
    run_ranks(all_of, checks, world_size=3, timeout_s=30)
