"""Arrays of other libraries share their memory with the ops."""

import numpy as np
import pytest
import torch

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import BlockFormat
from tests.native import cases

FMT = BlockFormat(bits=4, block=32)


def test_numpy_arrays_give_what_tensors_give() -> None:
    """Payload, residual, output and mean, bit-identical, written into the arrays themselves."""
    flat = cases.sample(100, FMT.block, torch.float32, seed=0)
    payload = cases.empty_payload(FMT, 4)
    residual = cases.empty_residual(8, FMT.block, 100)
    arrays = [value.clone().numpy() for value in (flat, residual, payload)]
    ops.loco_encode(flat, residual, payload, FMT)
    ops.loco_encode(*arrays, FMT)
    for array, expected in zip(arrays, (flat, residual, payload), strict=True):
        cases.assert_same_bits(torch.from_numpy(array), expected)

    mean, array = torch.zeros(100), np.zeros(100, dtype=np.float32)
    ops.decode_average(payload.repeat(3, 1), mean, FMT)
    ops.decode_average(np.tile(arrays[2], (3, 1)), array, FMT)
    cases.assert_same_bits(torch.from_numpy(array), mean)
    half = np.zeros(100, dtype=np.float16)
    ops.block_decode(arrays[2], half, FMT)
    cases.assert_same_bits(
        torch.from_numpy(half), cases.decode(payload, FMT, 100, dtype=torch.float16)
    )


def test_arrays_that_cannot_serve() -> None:
    payload = cases.empty_payload(FMT, 1).numpy()
    with pytest.raises(ConfigError, match=r"torch\.float64: must be one of"):
        ops.block_encode(np.zeros(32), payload, FMT)
    dates = np.zeros(32, dtype="datetime64[s]")
    with pytest.raises(ConfigError, match="input is a ndarray whose memory cannot be shared"):
        ops.block_encode(dates, payload, FMT)
    flat = np.zeros(32, dtype=np.float32)
    payload.flags.writeable = False
    with pytest.raises(ConfigError, match="payload is a read-only ndarray: is written to"):
        ops.block_encode(flat, payload, FMT)
    ops.block_decode(payload, flat, FMT)


def test_tensors_of_several_devices_are_refused() -> None:
    """Before a kernel is given an address of another one."""
    flat, payload = torch.zeros(100, device="meta"), cases.empty_payload(FMT, 4)
    residual = cases.empty_residual(8, FMT.block, 100)
    with pytest.raises(ConfigError, match="payload is on cpu: must be on meta, as input is"):
        ops.block_encode(flat, payload, FMT)
    with pytest.raises(ConfigError, match="residual is on cpu: must be on meta, as grad is"):
        ops.loco_encode(flat, residual, payload.to("meta"), FMT)
    with pytest.raises(ConfigError, match="output is on meta: must be on cpu, as payload is"):
        ops.block_decode(payload, flat, FMT)
    with pytest.raises(ConfigError, match="output is on meta: must be on cpu, as payloads is"):
        ops.decode_average(payload[None], flat, FMT)
    with pytest.raises(ConfigError, match="output is on meta: must be on cpu, as payloads is"):
        ops.decode_average_encode(payload[None], payload.to("meta"), FMT, FMT)
    with pytest.raises(ConfigError, match="ratio is on meta: must be on cpu, as payload is"):
        ops.rescale_(payload, torch.zeros((), device="meta"), FMT)
