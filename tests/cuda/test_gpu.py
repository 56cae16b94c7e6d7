"""On a real GPU: kernels, streams and NCCL. Skipped without one, and never yet run.

Bit-identical: payloads, residuals and means with the CPU's kernels; weights and residuals of a DDP
run over NCCL with the same run over gloo, but for the sum that DDP itself makes of small tensors,
which both send in fp32.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import FLOAT_DTYPES, BlockFormat
from commrt.ops.dither import LATTICES
from commrt.ops.native import native
from commrt.ops.polar import PATHS
from commrt.ops.rans import LANES, RANS_SEGMENT
from commrt.testing import run_ranks
from tests.native import cases, steps, test_coset, test_dither, test_patch, test_polar, test_rans

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("fmt", cases.formats(), ids=cases.format_id)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_kernels_give_the_bits_of_the_cpu(fmt: BlockFormat, dtype: torch.dtype) -> None:
    assert native.cuda == "nvcc", "build with COMMRT_CUDA=ON"
    for index, numel in enumerate([*cases.sizes(fmt.block)[1:], 1 << 20]):
        flat = cases.sample(numel, fmt.block, dtype, seed=index)
        expected, found = (every_op(flat.to(device), fmt) for device in ("cpu", "cuda"))
        for wanted, got in zip(expected, found, strict=True):
            cases.assert_same_bits(got.cpu(), wanted)


def every_op(flat: Tensor, fmt: BlockFormat) -> list[Tensor]:
    """All that the ops write."""
    blocks = fmt.num_blocks(flat.numel())
    back = BlockFormat(bits=8, block=fmt.block)

    def zeros(of: BlockFormat) -> Tensor:
        return torch.zeros(of.payload_bytes(blocks), dtype=torch.uint8, device=flat.device)

    payload, sent, residual, returned = zeros(fmt), zeros(fmt), zeros(back), zeros(back)
    output, mean = torch.zeros_like(flat), torch.zeros_like(flat)
    ops.block_encode(flat, payload, fmt, seed=None if fmt.bits == 1 else 5)
    for _ in range(2):
        ops.loco_encode(flat, residual, sent, fmt)
    ops.block_decode(payload, output, fmt)
    stack = torch.stack((payload, sent, payload))
    ops.decode_average(stack, mean, fmt)
    ops.decode_average_encode(stack, returned, fmt, back)
    written = [payload, sent, residual.clone(), output, mean, returned]
    ops.rescale_(residual, torch.tensor(0.3, device=flat.device), back)
    return [*written, residual]


@pytest.mark.parametrize("name", steps.SIGNED)
@pytest.mark.parametrize(("weights", "grad", "moments"), steps.FORMATS, ids=str)
def test_steps_give_the_bits_of_the_cpu(name, weights, grad, moments) -> None:
    formats = steps.Formats(*weights, grad, moments)
    tensors = [
        steps.make(
            64, cols, steps.SIGNED[name], formats, stochastic=True, seed=cols,
            **steps.OTHERS.get(name, {}),
        )
        for cols in (1, 300, 4096)
    ]  # fmt: skip
    on_gpu = [steps.copy(tensor, "cuda") for tensor in tensors]
    getattr(ops, name)(tensors, steps.OPTIONS)
    getattr(ops, name)(on_gpu, steps.OPTIONS)
    for expected, found in zip(tensors, on_gpu, strict=True):
        for (_, wanted), (_, got) in zip(
            steps.tensors_of(expected), steps.tensors_of(found), strict=True
        ):
            cases.assert_same_bits(got.cpu(), wanted)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
def test_patches_arrive_to_the_bit(dtype: torch.dtype, share: float) -> None:
    for numel in (1, 1023, 1025, 1 << 20):
        old = test_patch.random_bits(numel, dtype, seed=numel)
        new = test_patch.changed(old, share, seed=1)
        patch = test_patch.encoded(new, old).cuda()
        aligned, shifted = old.cuda(), test_patch.as_int(torch.cat((old[:1], old)).cuda())[1:]
        ops.patch_apply_(aligned, patch)
        ops.patch_apply_(shifted.view(dtype), patch)
        for weights in (aligned, shifted.view(dtype)):
            assert torch.equal(test_patch.as_int(weights.cpu()), test_patch.as_int(new))
    with pytest.raises(ConfigError, match="patches are encoded on the CPU only"):
        ops.patch_encode(old.cuda(), old.cuda(), patch)


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("first_index", [0, 8, 2**40 + 8])
def test_dithers_give_the_bits_of_the_cpu(lattice: str, first_index: int) -> None:
    for index, numel in enumerate([*test_dither.sizes(lattice), 1 << 20]):
        expected, found = (
            every_op_of_a_dither(index, numel, lattice, first_index, device)
            for device in ("cpu", "cuda")
        )
        for wanted, got in zip(expected, found, strict=True):
            cases.assert_same_bits(got.cpu(), wanted)


def every_op_of_a_dither(
    seed: int, numel: int, lattice: str, first_index: int, device: str
) -> list[Tensor]:
    """Codes, values and rows, and a sum of three."""
    values = test_dither.hostile(numel, seed).to(device)
    predicted = test_dither.normal(numel, seed + 1).to(device)
    codes, rows = (
        test_dither.empty_codes(numel).to(device),
        test_dither.empty_codes(numel).to(device),
    )
    output, total = torch.zeros_like(values), torch.zeros_like(values)
    first_rows = torch.arange(0, 2 * 64 * 16, 16, dtype=torch.int16, device=device).view(2, 64)
    ends = torch.tensor([values.numel() // 3, values.numel()], device=device)
    contexts = torch.zeros_like(rows)
    options = {"first_index": first_index, "lattice": lattice}
    ops.dither_quantise(values, predicted, codes, 0.3, seed, **options)
    ops.dither_dequantise(codes, predicted, output, 0.3, seed, **options)
    energies, options["base"] = values * values, 230
    ops.scale_rows(energies, first_rows, ends, rows, seed, contexts=contexts, **options)
    stack = torch.stack((predicted, predicted.flip(0), predicted.sqrt()))
    ops.lmmse_combine(stack, torch.tensor([0.5, -3.0, 1e-3], device=device), total)
    return [codes, output, contexts, rows, total]


@pytest.mark.parametrize("lanes", LANES)
def test_streams_are_the_words_of_the_cpu(lanes: int) -> None:
    """And what is decoded of them, also where they are damaged."""
    for numel in (1, 33, 1000, 3 * RANS_SEGMENT // 2):
        codes, rows = test_rans.sample(numel, seed=numel)
        streams = test_rans.encoded(codes, rows, lanes)
        assert test_rans.encoded(codes.cuda(), rows.cuda(), lanes) == streams
        assert test_rans.decoded(streams, rows.cuda(), lanes) == test_rans.whole(codes, streams)
        far = torch.where(torch.arange(numel) % 7 == 0, 1000, codes).short(), rows % 8
        expected = test_rans.escaping(*far, lanes)
        assert test_rans.escaping(far[0].cuda(), far[1].cuda(), lanes) == expected
        streams[0][-1] ^= 1
        expected = test_rans.decoded(streams, rows, lanes)
        assert test_rans.decoded(streams, rows.cuda(), lanes) == expected


@pytest.mark.parametrize("paths", PATHS)
def test_polar_codes_give_the_bits_of_the_cpu(paths: int) -> None:
    for log2_size in (8, 12, 14, 16):
        _, llr = test_polar.sample(log2_size, 5, 1.0, seed=log2_size)
        known = test_polar.code(log2_size, 9 << log2_size - 4)
        values = test_polar.random_bits(5, 1 << log2_size, seed=1)
        ops.polar_transform_(values)
        expected = test_polar.decoded(llr, known, values, paths)
        found = test_polar.decoded(llr.cuda(), known.cuda(), values.cuda(), paths)
        assert torch.equal(found.cpu(), expected)
        ops.polar_transform_(expected)
        ops.polar_transform_(found)
        assert torch.equal(found.cpu(), expected)


def test_cosets_give_the_bits_of_the_cpu() -> None:
    position, known = test_coset.positions(1 << 20, 0), test_coset.integers(1 << 20, 1)
    llr, codes = torch.zeros_like(position), torch.zeros_like(known)
    expected, found = (
        [tensor.to(device) for tensor in (position, known, test_coset.TABLE, llr, codes)]
        for device in ("cpu", "cuda")
    )
    for near, residues, table, llr_of, codes_of in (expected, found):
        ops.coset_llr(near, residues, 3, table, llr_of)
        ops.coset_decode(near, residues, 10, codes_of)
    for wanted, got in zip(expected, found, strict=True):
        cases.assert_same_bits(got.cpu(), wanted)


def trained(device_type: str) -> list[Tensor]:
    """Weights and residuals after a few steps of a model whose gradients are its inputs."""
    device = torch.device(device_type, dist.get_rank() if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    generator = torch.Generator().manual_seed(dist.get_rank())
    model = DistributedDataParallel(Sum().to(device), bucket_cap_mb=1)
    comm = commrt.attach(model)
    for _ in range(4):
        inputs = [torch.randn(w.shape, generator=generator) for w in model.module.weights]
        model.zero_grad()
        model([values.to(device) for values in inputs]).backward()
        with torch.no_grad():
            for weight in model.module.weights:
                weight.sub_(weight.grad)
    kept = comm.state_dict()["residuals"]
    return [value.cpu() for value in (*model.module.weights, *kept.values())]


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(700, 600) for _ in range(6))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return sum((w * x).sum() for w, x in zip(self.weights, inputs, strict=True))


def test_nccl_trains_like_gloo() -> None:
    world_size = torch.cuda.device_count()
    if world_size < 2:
        pytest.skip("not run: one GPU only")
    over_gloo = run_ranks(trained, "cpu", world_size=world_size)
    over_nccl = run_ranks(trained, "cuda", world_size=world_size, backend="nccl")
    for expected, found in zip(over_gloo, over_nccl, strict=True):
        for wanted, got in zip(expected, found, strict=True):
            cases.assert_same_bits(got, wanted)


def test_the_host_does_not_wait_for_the_gpu() -> None:
    """Nor allocate: every op is captured in a CUDA graph, and replayed."""
    fmt, back = BlockFormat(bits=4, block=128), BlockFormat(bits=8, block=128)
    grad = torch.randn(100_000, device="cuda")
    blocks = fmt.num_blocks(grad.numel())
    payload = torch.zeros(fmt.payload_bytes(blocks), dtype=torch.uint8, device="cuda")
    residual = torch.zeros(back.payload_bytes(blocks), dtype=torch.uint8, device="cuda")
    expected = payload.clone(), residual.clone()
    for _ in range(2):
        ops.loco_encode(grad, expected[1], expected[0], fmt)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.loco_encode(grad, residual, payload, fmt)
    residual.zero_()
    for _ in range(2):
        graph.replay()
    assert torch.equal(payload, expected[0])
    assert torch.equal(residual, expected[1])
