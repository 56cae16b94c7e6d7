"""The compressed collectives against the reference ops on whole tensors, in one process.

Bit-identical: every output and residual, on every rank, for any world size, sub-group, length and
dtype, with native kernels or without, since blocks neither know of shards nor of ranks. Only an
uncompressed average of three ranks or more may differ from a sum in another order.
"""

import itertools
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commrt
from commrt.codecs import BlockCodec, Codec, LocoCodec, derive_seed, parse, with_block
from commrt.collectives.exchange import exchange_payloads, gather_payloads
from commrt.errors import ConfigError
from commrt.ops import reference
from commrt.testing import run_ranks
from tests.dist.small_training import digest, same_bits

LENGTHS = (0, 1, 5, 1000, 4099)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODECS = ("block8", "loco4", "loco2", "loco1")
RANDOM_CODECS = ("block2:rounding=stochastic,levels=absmax", "loco2:residual=4")
WORLD_SIZES = [1, 2, 3, 4]
# What a dtype changes does not depend on the world size: each has one.
WORLDS = pytest.mark.parametrize(
    ("world_size", "dtype"),
    [(1, torch.float32), (2, torch.bfloat16), (3, torch.float16), (4, torch.float32)],
)


def values(rank: int, numels: Sequence[int], dtype: torch.dtype, step: int = 0) -> list[Tensor]:
    """Tensors of one rank; any rank can make those of any other."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(numel, generator=generator).to(dtype) for numel in numels]


def encoded(codec: Codec, tensor: Tensor, residual: Tensor | None = None, seed: int = 0) -> Tensor:
    """Payload of a whole tensor, by the reference; updates the residual."""
    assert isinstance(codec, BlockCodec)
    fmt = codec.fmt
    num_blocks = fmt.num_blocks(tensor.numel())
    payload = torch.zeros(fmt.payload_bytes(num_blocks), dtype=torch.uint8)
    how = (fmt.bits, fmt.block, fmt.mean_levels)
    where = (0, num_blocks, 0)
    if isinstance(codec, LocoCodec):
        rule = (codec.beta, codec.residual, codec.is_stochastic, seed)
        reference.loco_encode(tensor, residual, payload, *how, *rule, *where)
    else:
        reference.block_encode(tensor, payload, *how, seed if codec.is_stochastic else None, *where)
    return payload


def averaged(payloads: list[Tensor], codec: Codec, numel: int) -> Tensor:
    """fp32 mean of payloads, by the reference."""
    assert isinstance(codec, BlockCodec)
    num_blocks = codec.num_blocks(numel)
    mean = torch.empty(numel)
    reference.decode_average(
        torch.stack(payloads), mean, codec.fmt.bits, codec.block, 0, num_blocks
    )
    return mean


def decoded(payload: Tensor, codec: Codec, numel: int, dtype: torch.dtype) -> Tensor:
    """Values of a payload, by the reference."""
    assert isinstance(codec, BlockCodec)
    output = torch.empty(numel, dtype=dtype)
    num_blocks = codec.num_blocks(numel)
    reference.block_decode(payload, output, codec.fmt.bits, codec.block, 0, num_blocks, 0)
    return output


def returned(payloads: list[Tensor], codec: Codec, gather: Codec, like: Tensor) -> Tensor:
    """What all ranks get back: the mean, coded for the return leg."""
    assert isinstance(codec, BlockCodec)
    if not isinstance(gather, BlockCodec):
        return averaged(payloads, codec, like.numel()).to(like.dtype)
    num_blocks = codec.num_blocks(like.numel())
    coded = torch.zeros(gather.payload_bytes(num_blocks), dtype=torch.uint8)
    reference.decode_average_encode(
        torch.stack(payloads),
        coded,
        codec.fmt.bits,
        codec.block,
        gather.fmt.bits,
        gather.fmt.mean_levels,
        num_blocks,
    )
    return decoded(coded, gather, like.numel(), like.dtype)


def check_all_reduce(
    spec: str, gather_spec: str, dtype: torch.dtype, group: dist.ProcessGroup | None = None
) -> str:
    """Two steps, so that residuals are in use; digest of the outputs.

    Every rank compares its residuals with the reference and rank 0 the outputs, too.
    """
    codec = parse(spec)
    gather = with_block(gather_spec, codec.block)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    peers = range(world_size) if rank == 0 else [rank]
    kept = {peer: commrt.new_residuals(codec, LENGTHS, torch.device("cpu")) for peer in peers}
    residuals = commrt.new_residuals(codec, LENGTHS, torch.device("cpu"))
    outputs: list[Tensor] = []
    for step in range(2):
        inputs = {peer: values(peer, LENGTHS, dtype, step) for peer in peers}
        tensors = [tensor.clone() for tensor in inputs[rank]]
        commrt.all_reduce_(
            tensors, codec=spec, gather=gather_spec, group=group, residuals=residuals, seed=step
        )
        for index, tensor in enumerate(tensors):
            payloads = [
                encoded(
                    codec, inputs[peer][index], kept[peer][index], derive_seed(step, peer, index)
                )
                for peer in peers
            ]
            where = (spec, gather_spec, dtype, step, tensor.numel())
            assert torch.equal(residuals[index], kept[rank][index]), where
            if rank == 0:
                assert same_bits(tensor, returned(payloads, codec, gather, tensor)), where
        outputs += tensors
    return digest(outputs)


def check_all_reduces(codecs: Sequence[str], dtype: torch.dtype) -> list[str]:
    """A digest for each combination."""
    combinations = itertools.product(codecs, ("none", "block8"))
    return [check_all_reduce(*combination, dtype) for combination in combinations]


@pytest.mark.parametrize(
    ("world_size", "dtype"), [(2, torch.bfloat16), (3, torch.float32), (4, torch.float16)]
)
def test_all_reduce_is_the_reference(world_size: int, dtype: torch.dtype) -> None:
    """Outputs and residuals equal the reference's to the bit, and all ranks' outputs agree."""
    digests = run_ranks(check_all_reduces, CODECS, dtype, world_size=world_size)
    assert all(other == digests[0] for other in digests)


def test_random_numbers_do_not_depend_on_shards() -> None:
    """Stochastic rounding of shards equals that of whole tensors, to the bit."""
    digests = run_ranks(check_all_reduces, RANDOM_CODECS, torch.float32, world_size=3)
    assert all(other == digests[0] for other in digests)


def check_sub_groups() -> tuple[str, ...]:
    """Ranks 0 and 2, and 1 and 3, at the same time, then all four."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own = groups[dist.get_rank() % 2]
    pair = check_all_reduce("loco4", "block8", torch.float32, own)
    return pair, check_all_reduce("loco4", "block8", torch.float32)


def test_sub_groups_average_among_themselves() -> None:
    """Both pairs have the inputs of group ranks 0 and 1, and so the same bits."""
    pairs, everyone = zip(*run_ranks(check_sub_groups, world_size=4), strict=True)
    assert len(set(pairs)) == 1
    assert len(set(everyone)) == 1
    assert pairs[0] != everyone[0]


def check_exact_all_reduce() -> None:
    world_size = dist.get_world_size()
    for dtype in DTYPES:
        inputs = [values(peer, LENGTHS, dtype) for peer in range(world_size)]
        tensors = [tensor.clone() for tensor in inputs[dist.get_rank()]]
        expected = [tensor / world_size for tensor in tensors]
        commrt.all_reduce_(tensors, codec="none")
        for index, (tensor, part) in enumerate(zip(tensors, expected, strict=True)):
            dist.all_reduce(part)
            assert same_bits(tensor, part)
            mean = sum(peer[index].double() for peer in inputs) / world_size
            assert torch.allclose(tensor.double(), mean, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_codec_none_is_a_plain_all_reduce(world_size: int) -> None:
    """Bit-equal to dividing by W and then summing with torch's own all-reduce."""
    run_ranks(check_exact_all_reduce, world_size=world_size)


def check_one_tensor() -> str:
    """A tensor and a list of it give the same; nothing to reduce is no error."""
    alone = values(dist.get_rank(), [4099], torch.float32)[0]
    listed = alone.clone()
    traffic = commrt.all_reduce_(alone, codec="block4")
    commrt.all_reduce_([listed], codec="block4")
    assert same_bits(alone, listed)
    assert (traffic.wire_bytes > 0) == (dist.get_world_size() > 1)
    for nothing in ([], [torch.empty(0)], torch.empty(0)):
        assert commrt.all_reduce_(nothing, codec="block4").wire_bytes == 0
    return digest([alone])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_reduce_of_one_tensor_and_of_none(world_size: int) -> None:
    assert len(set(run_ranks(check_one_tensor, world_size=world_size))) == 1


def check_alone() -> None:
    before = values(0, LENGTHS, torch.float32)
    after = [tensor.clone() for tensor in before]
    traffic = commrt.all_reduce_(after, codec="block2")
    assert all(same_bits(*pair) for pair in zip(before, after, strict=True))
    assert traffic.wire_bytes == 0


def test_the_mean_over_one_rank_is_left_alone() -> None:
    """World size 1: nothing is sent, so nothing is compressed."""
    run_ranks(check_alone, world_size=1)


def splits(numel: int) -> list[list[int] | None]:
    """The default, all for one rank, and something uneven with a zero."""
    world_size = dist.get_world_size()
    last = [0] * (world_size - 1) + [numel]
    uneven = [numel // 3] * (world_size > 1) + [0] * (world_size - 2)
    return [None, last, [*uneven, numel - sum(uneven)]]


def default_split(numel: int) -> list[int]:
    quotient, rest = divmod(numel, dist.get_world_size())
    return [quotient + (rank < rest) for rank in range(dist.get_world_size())]


def check_reduce_scatter(spec: str, dtype: torch.dtype, numel: int) -> None:
    codec = parse(spec)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    inputs = [values(peer, [numel], dtype)[0] for peer in range(world_size)]
    for given in splits(numel):
        numels = default_split(numel) if given is None else given
        kept = commrt.new_residuals(codec, numels, torch.device("cpu"))
        residual = torch.cat(kept) if isinstance(codec, LocoCodec) else None
        own = inputs[rank].clone()
        output = commrt.reduce_scatter(own, codec=spec, shard_numels=given, residual=residual)
        assert same_bits(own, inputs[rank])
        payloads = []
        for peer in range(world_size):
            shard = inputs[peer].split(numels)[rank]
            empty = torch.zeros(codec.residual_bytes(numels[rank]), dtype=torch.uint8)
            payloads.append(encoded(codec, shard, empty))
        assert same_bits(output, averaged(payloads, codec, numels[rank]))
        if residual is not None:
            for shard, updated in zip(own.split(numels), kept, strict=True):
                encoded(codec, shard, updated)
            assert torch.equal(residual, torch.cat(kept))


def check_reduce_scatters(dtype: torch.dtype) -> None:
    for spec, numel in itertools.product(CODECS, LENGTHS):
        check_reduce_scatter(spec, dtype, numel)


@WORLDS
def test_reduce_scatter_is_the_reference(world_size: int, dtype: torch.dtype) -> None:
    """Bit-equal, the residuals too, with uneven shards and empty ones."""
    run_ranks(check_reduce_scatters, dtype, world_size=world_size)


def check_exact_reduce_scatters(dtype: torch.dtype) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for numel in LENGTHS:
        inputs = [values(peer, [numel], dtype)[0] for peer in range(world_size)]
        for given in splits(numel):
            output = commrt.reduce_scatter(inputs[rank], codec="none", shard_numels=given)
            mean = sum(tensor.double() for tensor in inputs) / world_size
            expected = mean.split(given or default_split(numel))[rank]
            assert output.dtype == torch.float32
            assert output.shape == expected.shape
            assert torch.allclose(output.double(), expected, rtol=1e-6, atol=1e-6)


@WORLDS
def test_reduce_scatter_without_a_codec_is_the_mean(world_size: int, dtype: torch.dtype) -> None:
    """To the rounding of an fp32 sum, with uneven shards and empty ones."""
    run_ranks(check_exact_reduce_scatters, dtype, world_size=world_size)


def check_all_gathers(dtype: torch.dtype) -> str:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    outputs = []
    for spec, numel in itertools.product(("none", "block8", "block2"), LENGTHS):
        codec = parse(spec)
        for given in [None, *splits(numel)[1:]]:
            numels = [numel] * world_size if given is None else given
            shards = [values(peer, [size], dtype)[0] for peer, size in enumerate(numels)]
            output = commrt.all_gather(shards[rank], codec=spec, shard_numels=given)
            if isinstance(codec, BlockCodec) and rank == 0:
                shards = [decoded(encoded(codec, x), codec, x.numel(), dtype) for x in shards]
            if spec == "none" or rank == 0:
                assert same_bits(output, torch.cat(shards)), (spec, numels)
            outputs.append(output)
    return digest(outputs)


@WORLDS
def test_all_gather_is_the_reference(world_size: int, dtype: torch.dtype) -> None:
    """Bit-equal on every rank, the own shard too; codec "none" returns the input's bits."""
    assert len(set(run_ranks(check_all_gathers, dtype, world_size=world_size))) == 1


def raises(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def check_mistakes() -> None:
    """Only rank 0 calls: what does not raise before it communicates would wait for rank 1."""
    if dist.get_rank() == 1:
        return
    x, matrix = torch.zeros(100), torch.zeros(10, 10)
    raises("3 bits", lambda: commrt.all_reduce_(x, codec="block3"))
    raises("residuals=None", lambda: commrt.all_reduce_(x, codec="loco4"))
    raises("residuals=0: ", lambda: commrt.all_reduce_(x, codec="loco4", residuals=[]))
    short = [torch.zeros(3, dtype=torch.uint8)]
    raises("residual has 3 bytes", lambda: commrt.all_reduce_(x, codec="loco4", residuals=short))
    raises("must be 1-D", lambda: commrt.all_reduce_(matrix, codec="block4"))
    raises("must be 1-D and contiguous", lambda: commrt.all_reduce_(x[::2], codec="block4"))
    raises("float64", lambda: commrt.all_reduce_(x.double(), codec="block4"))
    raises("gather has block=64", lambda: commrt.all_reduce_(x, codec="block4", gather=block64()))
    raises("gather='loco8", lambda: commrt.all_reduce_(x, codec="block4", gather="loco8"))
    for bad in ([100], [50, 49], [-1, 101]):
        raises(
            r"must be 2 sizes that sum to 100",
            lambda bad=bad: commrt.reduce_scatter(x, codec="block4", shard_numels=bad),
        )
    raises("residuals=None", lambda: commrt.reduce_scatter(x, codec="loco4"))
    raises("float64", lambda: commrt.reduce_scatter(x.double(), codec="block4"))
    raises("an all-gather has no residual", lambda: commrt.all_gather(x, codec="loco4"))
    for bad in ([100], [99, 100]):
        raises(
            "must have 2 entries, entry 0 being the 100 elements",
            lambda bad=bad: commrt.all_gather(x, codec="block8", shard_numels=bad),
        )


def block64() -> Codec:
    return parse("block8:block=64")


def test_mistakes_raise_before_any_communication() -> None:
    run_ranks(check_mistakes, world_size=2, timeout_s=30)


def check_shapes_of_reduce_scatter() -> None:
    """As check_mistakes, for what torch itself would refuse in other words."""
    if dist.get_rank() == 1:
        return
    x = torch.zeros(100)
    wrong = torch.zeros(3, dtype=torch.uint8)
    raises("residual has 3 bytes", lambda: commrt.reduce_scatter(x, codec="loco4", residual=wrong))
    raises("must be 1-D", lambda: commrt.reduce_scatter(x.view(10, 10), codec="block4"))
    raises("must be 1-D", lambda: commrt.all_gather(x.view(10, 10), codec="none"))


def test_wrong_shapes_are_config_errors() -> None:
    run_ranks(check_shapes_of_reduce_scatter, world_size=2, timeout_s=30)


def payloads_arrive(sizes: list[int], in_turn_bytes: int) -> None:
    """Byte j that rank r sends to rank s is r + 10 s + j."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(world_size)))

    def payload(source: int, target: int) -> Tensor:
        return ((torch.arange(sizes[target]) + source + 10 * target) % 256).to(torch.uint8)

    send = torch.cat([payload(rank, target) for target in range(world_size)])
    received = torch.full((world_size * sizes[rank],), 77, dtype=torch.uint8)
    with mock.patch("commrt.collectives.exchange.IN_TURN_BYTES", in_turn_bytes):
        exchange_payloads(received, send, sizes[rank], sizes, group)
    expected = torch.cat([payload(source, rank) for source in range(world_size)])
    assert torch.equal(received, expected)


def payloads_are_gathered(num_bytes: int) -> None:
    """Byte j of rank r is r + j."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    expected = (torch.arange(num_bytes) + torch.arange(world_size)[:, None]) % 256
    received = torch.full((world_size * num_bytes,), 77, dtype=torch.uint8)
    gather_payloads(received, expected[rank].to(torch.uint8), dist.new_group())
    assert torch.equal(received.view(world_size, -1), expected)


def all_payloads_arrive() -> None:
    world_size = dist.get_world_size()
    for sizes in ([200_000] * 4, [0, 70_000, 16, 1], [5, 0, 0, 300_000], [0] * 4):
        for in_turn_bytes in (1, 64 << 10, 1 << 30):
            payloads_arrive(sizes[:world_size], in_turn_bytes)
    for num_bytes in (16, 1_000_000):
        payloads_are_gathered(num_bytes)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_payloads_arrive_in_turn_or_all_at_once(world_size: int) -> None:
    """Any sizes, none among them."""
    run_ranks(all_payloads_arrive, world_size=world_size)
