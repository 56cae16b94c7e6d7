"""What tests of the ops share: every path at once, awkward tensors, payloads read bit by bit."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from commrt import _C, ops
from commrt.ops import BlockFormat, reference
from commrt.ops.format import BLOCKS
from commrt.ops.native import through_shim

OPS = (
    *("block_encode", "block_decode", "loco_encode", "decode_average", "decode_average_encode"),
    *("rescale_", "patch_encode", "patch_apply_"),
    *("dither_quantise", "dither_dequantise", "scale_rows", "lmmse_combine"),
    *("rans_encode", "rans_decode", "rans_count_"),
    *("source_energies", "source_prediction", "source_products", "source_history"),
    *("update_products", "update_rows", "update_codes", "update_values", "update_add_"),
    *("polar_transform_", "polar_decode", "coset_llr", "coset_decode"),
)
KINDS = ((1, "mean"), (2, "absmax"), (2, "mean"), (4, "absmax"), (8, "absmax"))
FILL = 0xA5  # what payloads hold before an op writes to them


def formats(blocks: tuple[int, ...] = BLOCKS) -> list[BlockFormat]:
    """Every legal format with these block sizes."""
    return [BlockFormat(bits=b, block=k, levels=levels) for b, levels in KINDS for k in blocks]


def format_id(fmt: BlockFormat) -> str:
    return f"{fmt.bits}bit-{fmt.levels}-{fmt.block}"


def sizes(block: int) -> list[int]:
    return sorted({0, 1, 31, 33, block - 1, block + 1, 3001, 9 * block + 5})


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    before = _C.active_isa()
    assert _C.select_isa(name), name
    try:
        yield
    finally:
        _C.select_isa(before)


@contextmanager
def using_cuda(seed: int) -> Iterator[None]:
    """Inside it the CUDA kernels run through the shim, in an order drawn from the seed."""
    with through_shim(), mock.patch.dict(os.environ, COMMRT_SHIM_SEED=str(seed)):
        yield


def paths() -> dict[str, AbstractContextManager[None]]:
    """Every way to run an op, by its name."""
    cuda = {f"cuda, order {seed}": using_cuda(seed) for seed in (0, 1)}
    return {isa: using_isa(isa) for isa in _C.available_isas()} | cuda


@contextmanager
def using_specification() -> Iterator[None]:
    """Inside it the ops run on commrt.ops.reference."""
    with mock.patch.multiple(torch.ops.commrt, **{op: getattr(reference, op) for op in OPS}):
        yield


def run_everywhere(op: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run an op by its specification, and assert that every path leaves the same bits.

    Compared is all memory behind every tensor given, so a write outside of a window, or to an
    input, is a difference too. NaNs are equal to each other, whatever their payload bits.
    """
    results = []
    for path, use in paths().items():
        copied_args = [_copy(value) for value in args]
        copied_kwargs = {key: _copy(value) for key, value in kwargs.items()}
        with use:
            op(*copied_args, **copied_kwargs)
        results.append((path, [*copied_args, *copied_kwargs.values()]))
    with using_specification():
        op(*args, **kwargs)
    wanted = _tensors([*args, *kwargs.values()])
    for path, copies in results:
        for copy, expected in zip(_tensors(copies), wanted, strict=True):
            assert_same_bits(_memory(copy), _memory(expected), path)


def assert_same_bits(actual: Tensor, expected: Tensor, where: str = "") -> None:
    """Equal to the bit, the sign of zero included; NaNs are equal to each other."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan()), where
        as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
        is_number = ~expected.isnan()
        actual, expected = actual[is_number].view(as_int), expected[is_number].view(as_int)
    assert torch.equal(actual, expected), where


def _copy(value: Any) -> Any:
    """A tensor with storage of its own, as aligned and as strided as the original; so in lists."""
    if isinstance(value, list):
        return [_copy(each) for each in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().clone()
    return value.new_empty(0).set_(storage, value.storage_offset(), value.shape, value.stride())


def _tensors(values: list[Any]) -> list[Tensor]:
    """Those in a list, and in lists in it."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, list):
            found += _tensors(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def _memory(value: Tensor) -> Tensor:
    count = value.untyped_storage().nbytes() // value.element_size()
    return value.new_empty(0).set_(value.untyped_storage(), 0, (count,), (1,))


def unaligned(value: Tensor) -> Tensor:
    """The same 1-D values one element after an aligned address, one spare element behind."""
    spare = value.new_full((value.numel() + 2,), FILL)
    spare[1:-1] = value
    return spare[1:-1]


@functools.cache
def sample(numel: int, block: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Blocks that take turns in being awkward; ``seed`` says with which kind they begin.

    The tensor is shared by all who ask for the same one: not to be written to.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-numel // block)
    value_BK = torch.randn(num_blocks, block, generator=generator)
    info = torch.finfo(dtype)
    for index, row in enumerate(value_BK):
        kind = (index + seed) % 10
        somewhere = (7 * index + seed) % min(block, numel)
        if kind == 1:
            row.mul_(info.max / row.abs().max())
        elif kind == 2:
            row.mul_(info.smallest_normal)
        elif kind == 3:
            row.mul_(0.5).ceil_().mul_(3 * info.smallest_normal * info.eps)  # subnormal
        elif kind == 4:
            row.zero_()
        elif kind == 5:
            row.mul_(8).round_().mul_(0.5)  # ties
        elif kind == 6:
            row[somewhere] = (torch.nan, torch.inf, -torch.inf)[index % 3]
        elif kind == 7:
            row.mul_(torch.rand(block, generator=generator) < 0.1)  # sparse
        elif kind == 8:
            row.neg_().abs_().neg_()
    return value_BK.reshape(-1)[:numel].to(dtype)


def floats(*, max_size: int = 100, finite: bool = False) -> st.SearchStrategy[Tensor]:
    """Any fp32 tensor: empty, huge, subnormal, zeros, and NaN and infinities unless ``finite``."""
    any_float = st.floats(width=32, allow_nan=not finite, allow_infinity=not finite)
    ordinary = st.floats(-10, 10, width=32)
    element = st.one_of(ordinary, ordinary, any_float, st.just(0.0))
    return st.lists(element, max_size=max_size).map(torch.tensor)


def empty_payload(fmt: BlockFormat, num_blocks: int) -> Tensor:
    return torch.full((fmt.payload_bytes(num_blocks),), FILL, dtype=torch.uint8)


def empty_residual(bits: int, block: int, numel: int) -> Tensor:
    fmt = BlockFormat(bits=bits, block=block)
    return torch.zeros(fmt.payload_bytes(fmt.num_blocks(numel)), dtype=torch.uint8)


def encode(flat: Tensor, fmt: BlockFormat, seed: int | None = None) -> Tensor:
    """The payload of a whole tensor."""
    payload = empty_payload(fmt, fmt.num_blocks(flat.numel()))
    ops.block_encode(flat, payload, fmt, seed=seed)
    return payload


def encode_everywhere(flat: Tensor, fmt: BlockFormat, seed: int | None = None) -> Tensor:
    """The payload of a whole tensor, the same from every path."""
    payload = empty_payload(fmt, fmt.num_blocks(flat.numel()))
    run_everywhere(ops.block_encode, flat, payload, fmt, seed=seed)
    return payload


def decode(
    payload: Tensor, fmt: BlockFormat, numel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The tensor of a whole payload."""
    output = torch.full((numel,), 42.0, dtype=dtype)
    ops.block_decode(payload, output, fmt)
    return output


def decode_everywhere(
    payload: Tensor, fmt: BlockFormat, numel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The tensor of a whole payload, the same from every path."""
    output = torch.full((numel,), 42.0, dtype=dtype)
    run_everywhere(ops.block_decode, payload, output, fmt)
    return output


def unpack(payload: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes (B, K) and fp32 scales (B), read by the layout in commrt/ops/format.py alone."""
    num_blocks = payload.numel() // fmt.block_bytes
    raw = payload.numpy()
    codes, scales = np.split(raw, [num_blocks * fmt.code_bytes])
    stream = np.unpackbits(codes, bitorder="little")
    if fmt.bits == 4:  # element j of 32 shares its byte with element j + 16
        stream = stream.reshape(-1, 16, 2, 4).transpose(0, 2, 1, 3).reshape(-1)
    bits = stream.reshape(num_blocks, fmt.block, fmt.bits)
    if fmt.bits == 1:
        values = 1 - 2 * bits[..., 0].astype(np.int64)
    else:
        place = 1 << np.arange(fmt.bits, dtype=np.int64)
        place[-1] = -place[-1]  # two's complement
        values = (bits * place).sum(axis=-1)
    scale = scales.copy().view("<u2").astype(np.uint32) << 16
    return torch.from_numpy(values), torch.from_numpy(scale.view(np.float32))


def blocks(flat: Tensor, block: int) -> Tensor:
    """(B, K), the last block padded with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
