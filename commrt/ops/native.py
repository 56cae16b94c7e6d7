"""Loads the native module and registers its kernels with torch.

Every op is a ``torch.ops.commrt`` operator whose default kernel is :mod:`commrt.ops.reference`; on
CPU tensors the native kernel replaces it, and on CUDA tensors where the module was built with nvcc.
The operators take plain integers and tensors, mutate their output in place, and can be traced; on a
GPU they are queued on torch's current stream of the tensor's device.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops import reference
from commrt.ops.format import SCALE_BYTES
from commrt.ops.lists import StepTensor, unflatten

MIN_CAPABILITY = (8, 0)
_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_SCHEMAS = (
    "block_encode(Tensor input, Tensor(a!) payload, int bits, int block, bool mean_levels, "
    "int? seed, int first_block, int num_blocks, int at_block) -> ()",
    "block_decode(Tensor payload, Tensor(a!) output, int bits, int block, int first_block, "
    "int num_blocks, int at_block) -> ()",
    "loco_encode(Tensor grad, Tensor(a!) residual, Tensor(b!) payload, int bits, int block, "
    "bool mean_levels, float beta, int residual_bits, bool stochastic, int seed, int first_block, "
    "int num_blocks, int at_block) -> ()",
    "decode_average(Tensor payloads, Tensor(a!) output, int bits, int block, int first_block, "
    "int num_blocks) -> ()",
    "decode_average_encode(Tensor payloads, Tensor(a!) output, int bits, int block, "
    "int output_bits, bool output_mean_levels, int num_blocks) -> ()",
    "rescale_(Tensor(a!) payload, Tensor ratio, int bits, int block) -> ()",
    *(
        f"{step}(Tensor(a!)[] weights, Tensor(b!)[] extras, Tensor[] grads, Tensor(c!)[] moments, "
        "Tensor(d!)[] scales, Tensor(e!)[] seconds, int[] places, float[] options, "
        "Tensor? grad_factor) -> ()"
        for step in ("adam_mini_", "adamw_", "adan_", "lion_")
    ),
    "square_sums(Tensor[] grads, Tensor(a!)[] sums, int[] places) -> ()",
)


def _load() -> tuple[ModuleType | None, str]:
    """The native module, or None and the reason."""
    if os.environ.get("COMMRT_NATIVE", "1") == "0":
        return None, "COMMRT_NATIVE=0"
    try:
        from commrt import _C
    except ImportError as error:
        return None, f"commrt._C could not be imported ({error})"
    isa = os.environ.get("COMMRT_ISA")
    if isa and not _C.select_isa(isa):
        allowed = ", ".join(_C.available_isas())
        raise ConfigError(f"COMMRT_ISA={isa!r}: this machine and build have {allowed}")
    return _C, ""


native, missing_reason = _load()
if native is None:
    warnings.warn(
        f"commrt runs on its slow torch reference ops: {missing_reason}. "
        "Install a C++ compiler and reinstall commrt to get the native ones.",
        stacklevel=2,
    )


def status(device: torch.device | str = "cpu") -> str:
    """Which kernels serve tensors there, for reports: ``"native avx512"``, or why none do."""
    device = torch.device(device)
    if native is None:
        return f"reference ({missing_reason})"
    if device.type != "cuda":
        return f"native {native.active_isa()}"
    reason = why_no_cuda(device.index or 0)
    return f"reference ({reason})" if reason else "native cuda"


@functools.cache
def why_no_cuda(index: int) -> str:
    """Why the CUDA kernels cannot serve this GPU; empty if they can.

    Asked at the first use of a GPU, not before: the driver does not survive a fork.
    """
    if native is None or native.cuda != "nvcc":
        return "built without CUDA: install with COMMRT_CUDA=ON"
    if native.cuda_device_count() <= index:
        return "the driver is older than the CUDA that the kernels were built with"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability}: must be at least {MIN_CAPABILITY}"
    return ""


_is_through_shim = False


@contextlib.contextmanager
def through_shim() -> Iterator[None]:
    """Serve CPU tensors by the CUDA kernels, in a module built with ``COMMRT_CUDA=SHIM``.

    Raises:
        ConfigError: The module is another one.
    """
    global _is_through_shim
    if native is None or native.cuda != "shim":
        built = missing_reason if native is None else f"COMMRT_CUDA={native.cuda}"
        raise ConfigError(f"the native module has {built}: must be built with COMMRT_CUDA=SHIM")
    _is_through_shim = True
    try:
        yield
    finally:
        _is_through_shim = False


def _register_native(library: torch.library.Library, native: ModuleType) -> None:
    def where(tensor: Tensor) -> object:
        if tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device).cuda_stream
            return native.Queue(stream)
        return native.Queue(0) if _is_through_shim else native.Threads(torch.get_num_threads())

    def window(flat: Tensor, block: int, first_block: int) -> object:
        first = first_block * block
        address = flat.data_ptr() + first * flat.element_size()
        return native.Window(address, _DTYPE_CODE[flat.dtype], flat.numel() - first, first)

    def payload(data: Tensor, bits: int, block: int, at_block: int) -> object:
        block_bytes = block * bits // 8 + SCALE_BYTES
        return native.Payload(data.data_ptr(), data.numel() // block_bytes, at_block)

    def block_encode(
        input: Tensor,
        output: Tensor,
        bits: int,
        block: int,
        mean_levels: bool,
        seed: int | None,
        first_block: int,
        num_blocks: int,
        at_block: int,
    ) -> None:
        native.block_encode(
            window(input, block, first_block),
            payload(output, bits, block, at_block),
            native.BlockFormat(bits, block, mean_levels),
            native.Rounding(seed is not None, seed or 0),
            num_blocks,
            where(input),
        )

    def block_decode(
        data: Tensor,
        output: Tensor,
        bits: int,
        block: int,
        first_block: int,
        num_blocks: int,
        at_block: int,
    ) -> None:
        native.block_decode(
            payload(data, bits, block, at_block),
            window(output, block, first_block),
            native.BlockFormat(bits, block, False),
            num_blocks,
            where(data),
        )

    def loco_encode(
        grad: Tensor,
        residual: Tensor,
        output: Tensor,
        bits: int,
        block: int,
        mean_levels: bool,
        beta: float,
        residual_bits: int,
        stochastic: bool,
        seed: int,
        first_block: int,
        num_blocks: int,
        at_block: int,
    ) -> None:
        native.loco_encode(
            window(grad, block, first_block),
            payload(residual, residual_bits, block, first_block),
            payload(output, bits, block, at_block),
            native.BlockFormat(bits, block, mean_levels),
            native.Rounding(stochastic, seed),
            beta,
            residual_bits,
            num_blocks,
            where(grad),
        )

    def decode_average(
        payloads: Tensor, output: Tensor, bits: int, block: int, first_block: int, num_blocks: int
    ) -> None:
        native.decode_average(
            native.Payload(payloads.data_ptr(), num_blocks, 0),
            payloads.stride(0),
            payloads.shape[0],
            window(output, block, first_block),
            native.BlockFormat(bits, block, False),
            num_blocks,
            where(payloads),
        )

    def decode_average_encode(
        payloads: Tensor,
        output: Tensor,
        bits: int,
        block: int,
        output_bits: int,
        output_mean_levels: bool,
        num_blocks: int,
    ) -> None:
        native.decode_average_encode(
            native.Payload(payloads.data_ptr(), num_blocks, 0),
            payloads.stride(0),
            payloads.shape[0],
            native.BlockFormat(bits, block, False),
            payload(output, output_bits, block, 0),
            native.BlockFormat(output_bits, block, output_mean_levels),
            num_blocks,
            where(payloads),
        )

    def rescale_(data: Tensor, ratio: Tensor, bits: int, block: int) -> None:
        native.rescale(
            payload(data, bits, block, 0),
            ratio.data_ptr(),
            native.BlockFormat(bits, block, False),
            where(data),
        )

    def square_sums(grads: list[Tensor], sums: list[Tensor], places: list[int]) -> None:
        tensors = [
            native.SquaresTensor(
                grad.data_ptr(), _DTYPE_CODE[grad.dtype], *places[3 * i : 3 * i + 2],
                output.data_ptr(), bool(places[3 * i + 2]),
            )
            for i, (grad, output) in enumerate(zip(grads, sums, strict=True))
        ]  # fmt: skip
        native.square_sums(tensors, where(grads[0]))

    def step(name: str) -> Callable[..., None]:
        kernel = getattr(native, name.rstrip("_"))

        def run(weights: list[Tensor], *lists: Any) -> None:
            *rest, options, grad_factor = lists
            address = 0 if grad_factor is None else grad_factor.data_ptr()
            tensors = [native.StepTensor(*step_fields(t)) for t in unflatten(weights, *rest)]
            kernel(tensors, native.StepOptions(options, address), where(weights[0]))

        run.__name__ = name
        return run

    kernels: tuple[Callable[..., None], ...] = (
        *map(step, ("adam_mini_", "adamw_", "adan_", "lion_")),
        square_sums,
        block_encode,
        block_decode,
        loco_encode,
        decode_average,
        decode_average_encode,
        rescale_,
    )
    for kernel in kernels:
        library.impl(kernel.__name__, kernel, "CPU")
        if native.cuda == "nvcc":
            library.impl(kernel.__name__, _on_gpu(kernel), "CUDA")


def step_fields(t: StepTensor) -> tuple[Any, ...]:
    """As csrc/bindings.cpp takes them."""
    first = t.moments[0].dtype
    weight_format = (
        0 if t.weights.dtype == torch.float32
        else 3 if t.extra is None
        else 1 if t.extra.dtype == torch.float32 else 2
    )  # fmt: skip
    return (
        t.grad.data_ptr(),
        _DTYPE_CODE[t.grad.dtype],
        t.weights.data_ptr(),
        _DTYPE_CODE[t.weights.dtype],
        0 if t.extra is None else t.extra.data_ptr(),
        weight_format,
        t.rows,
        t.cols,
        [
            (moment.data_ptr(), scale.data_ptr())
            for moment, scale in zip(t.moments, t.scales, strict=True)
        ],
        {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}[first],
        t.stochastic,
        t.seed,
        t.first_index,
        t.index_stride,
        0 if t.second is None else t.second.data_ptr(),
        int(t.second_from),
        t.block_rows,
    )


def _on_gpu(kernel: Callable[..., None]) -> Callable[..., None]:
    """With the tensors' device as the current one, or by the reference if it is not served."""
    fallback = getattr(reference, kernel.__name__)

    def call(first: Tensor | list[Tensor], *others: Any) -> None:
        tensor = first[0] if isinstance(first, list) else first
        serve = fallback if why_no_cuda(tensor.get_device()) else kernel
        with torch.cuda.device(tensor.device):
            serve(first, *others)

    return call


def _register() -> torch.library.Library:
    library = torch.library.Library("commrt", "DEF")
    for schema in _SCHEMAS:
        name = library.define(schema)
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"commrt::{name}", lambda *args: None, lib=library)
    if native is not None:
        _register_native(library, native)
    return library


_library = _register()
