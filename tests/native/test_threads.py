"""Payloads, residuals and outputs are bit-identical for any number of threads, and after a fork."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from commrt import _C, ops
from commrt.ops import BlockFormat
from tests.native import cases
from tests.native.isolated import run_python

NUMEL = 300_001  # ten pieces of work, see kGrainElements in csrc/bindings.cpp
BLOCK4 = BlockFormat(bits=4, block=128)
BLOCK8 = BlockFormat(bits=8, block=128)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_all(seed: int = 3) -> list[Tensor]:
    """What every op writes, each from the one before."""
    grad = torch.linspace(-3, 5, NUMEL)
    num_blocks = BLOCK4.num_blocks(NUMEL)
    residual = cases.empty_residual(4, 128, NUMEL)
    payloads = torch.stack([cases.empty_payload(BLOCK4, num_blocks)] * 2)
    ops.block_encode(grad, payloads[0], BLOCK4, seed=seed)
    ops.loco_encode(
        grad, residual, payloads[1], BLOCK4, residual_bits=4, stochastic=True, seed=seed
    )
    output, mean = torch.empty(NUMEL, dtype=torch.bfloat16), torch.empty(NUMEL)
    recoded = cases.empty_payload(BLOCK8, num_blocks)
    ops.block_decode(payloads[0], output, BLOCK4)
    ops.decode_average(payloads, mean, BLOCK4)
    ops.decode_average_encode(payloads, recoded, BLOCK4, BLOCK8)
    return [payloads, residual, output, mean, recoded]


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("count", [2, 3, 16])
def test_any_number_of_threads(isa: str, count: int) -> None:
    """Everything: bit-identical to one thread."""
    with cases.using_isa(isa):
        with threads(1):
            expected = run_all()
        with threads(count):
            found = run_all()
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_calls_from_several_threads_at_once() -> None:
    """Everything: bit-identical; a call that finds the pool busy does its work alone."""
    seeds = list(range(8))
    with threads(1):
        expected = [run_all(seed) for seed in seeds]
    with threads(2), ThreadPoolExecutor(4) as executor:
        found = list(executor.map(run_all, seeds))
    for results, wanted in zip(found, expected, strict=True):
        for actual, tensor in zip(results, wanted, strict=True):
            assert torch.equal(actual, tensor)


@pytest.mark.parametrize("count", [1, 2])
def test_subnormals_count_whatever_the_caller_has_set(count: int) -> None:
    """Output: bit-identical under torch.set_flush_denormal, on the caller's thread and others."""
    payload = torch.zeros(BLOCK8.payload_bytes(2500), dtype=torch.uint8)
    codes, scales = payload.split([2500 * 128, 2500 * 2])
    codes.fill_(1)
    scales.view(-1, 2)[:] = torch.tensor([0x01, 0x00], dtype=torch.uint8)
    output = torch.zeros(2500 * 128)
    assert torch.set_flush_denormal(True)
    try:
        with threads(count):
            ops.block_decode(payload, output, BLOCK8)
    finally:
        torch.set_flush_denormal(False)
    assert output.view(torch.int32).eq(1 << 16).all()


def test_a_forked_child_has_threads_of_its_own() -> None:
    """Payload: bit-identical in the child of a process whose pool is running; nobody waits.

    All but our own ops runs on one thread: torch's OpenMP does hang in a forked child.
    """
    program = """
import os, signal, torch
from commrt import ops

fmt = ops.BlockFormat(bits=4, block=128)
torch.set_num_threads(1)
grad = torch.linspace(-3, 5, 300_032)
payload = torch.zeros(fmt.payload_bytes(fmt.num_blocks(grad.numel())), dtype=torch.uint8)
torch.set_num_threads(2)

def num_threads():
    return len(os.listdir("/proc/self/task"))

def encode():
    before = num_threads()
    ops.block_encode(grad, payload, fmt, seed=1)
    return payload.numpy().tobytes(), num_threads() - before

expected, started = encode()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if encode() == (expected, 1) else 1)
status = os.waitpid(child, 0)[1]
print(started, status, encode() == (expected, 0))
"""
    assert run_python(program).stdout == "1 0 True\n"
