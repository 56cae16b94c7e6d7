"""Patches: what changed of weights, in few bits and without loss; see :mod:`commrt.ops`.

A small step leaves most 16-bit weights as they are and moves the others to a neighbouring number.
A patch of N elements is ``total | entries | bodies``, in little endian::

    total     8 bytes             of the whole patch
    entries   4 bytes a group     the byte, a multiple of 4, at which the group's body begins,
                                  plus the group's kind
    bodies    one after another   each padded with zeros to a multiple of 4 bytes

A group has 1,024 elements, the last one those that are left. Its kind is 0, nothing changed, with
no body and an entry of 0; 1, a patch; or 2, the new elements as they are, where a patch would not
be shorter. A patch is ``mask | codes | escaped``::

    mask      128 bytes           bit i is set if element i changed
    codes     4 bits a change     in order, the low half of a byte first, padded to 4 bytes
    escaped   an element each     the new bits of those whose code is 15, padded to 4 bytes

The bits of an element, seen as a sign and a magnitude, are mapped to a signed integer: m to m, and
-m to -m - 1, so that numbers that follow each other differ by 1. With d the difference of new and
old, wrapped to the element's width, the code is 2d - 1 for 0 < d < 8, -2d - 2 for -8 <= d < 0, and
15 for any other.
"""

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.arrays import takes_arrays
from commrt.ops.format import FLOAT_DTYPES

# Of the layout above.
PATCH_VERSION = 1
GROUP = 1024
TOTAL_BYTES = 8
ENTRY_BYTES = 4
# What an entry can name.
MOST_BYTES = 1 << 32


def patch_capacity(numel: int, dtype: torch.dtype) -> int:
    """The bytes that a patch of ``numel`` elements can need: all of them, as they are.

    Raises:
        ConfigError: More than 4 GiB, which entries cannot name; cut the tensor.
    """
    if dtype not in FLOAT_DTYPES:
        raise ConfigError(f"a patch of {dtype}: must be one of {FLOAT_DTYPES}")
    num_bytes = header_bytes(numel) + _padded(numel * dtype.itemsize)
    if num_bytes > MOST_BYTES:
        raise ConfigError(
            f"a patch of {numel} elements can need {num_bytes} bytes: must be at most {MOST_BYTES}"
        )
    return num_bytes


def patch_bytes(payload: Tensor) -> int:
    """The bytes that a patch has, by its first eight.

    Stream: waits for a payload that is on a GPU.
    """
    if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() < TOTAL_BYTES:
        raise ConfigError(f"payload is {payload.dtype} {tuple(payload.shape)}: is no patch")
    return int.from_bytes(payload[:TOTAL_BYTES].tolist(), "little")


@takes_arrays("payload")
def patch_encode(new: Tensor, old: Tensor, payload: Tensor) -> None:
    """Write into ``payload`` what makes ``new`` of ``old``, to the bit.

    Deterministic and lossless, whatever the bits mean: NaNs and the sign of zero included.

    Args:
        new: Flat tensor of N elements, on the CPU.
        old: As ``new``.
        payload: uint8 of at least ``patch_capacity(N, new.dtype)`` bytes, on the CPU. Overwritten
            up to :func:`patch_bytes`, which is what has to be sent.

    Cost: reads N elements of both. Writes 1.03 bits an element of a group in which something
    changed, and 4 bits for each change, or 4 bits and an element for one of more than eight steps;
    never more than the capacity.

    Source: for how few weights change, Miahi and Belilovsky, "Understanding and Exploiting Weight
    Update Sparsity for Communication-Efficient Distributed RL" (PULSE), 2026 (arXiv 2602.03839).
    """
    _check_flat("new", new)
    _check_flat("old", old)
    if old.dtype != new.dtype or old.numel() != new.numel():
        raise ConfigError(
            f"old is {old.dtype} of {old.numel()} elements: must be {new.dtype} of {new.numel()}"
        )
    _check_payload(payload, patch_capacity(new.numel(), new.dtype))
    for name, tensor in (("new", new), ("old", old), ("payload", payload)):
        if tensor.device.type not in ("cpu", "meta"):
            raise ConfigError(f"{name} is on {tensor.device}: patches are encoded on the CPU only")
        if tensor.device != new.device:
            raise ConfigError(f"{name} is on {tensor.device}: must be on {new.device}, as new is")
    torch.ops.commrt.patch_encode(new, old, payload)


@takes_arrays("weights")
def patch_apply_(weights: Tensor, payload: Tensor) -> None:
    """Make of ``weights`` the tensor that the patch was encoded for, in place.

    Args:
        weights: Flat tensor of N elements with the bits that ``old`` had.
        payload: uint8 on the same device, the first ``patch_bytes(payload)`` bytes at least, at an
            address that is a multiple of 4.

    Raises:
        ConfigError: The payload is not a patch of N elements; groups whose part of it can be read
            may have been changed. A GPU does not look: what it is given there must be whole.

    Cost: reads the payload; reads and writes the weights near those that change.
    """
    _check_flat("weights", weights)
    patch_capacity(weights.numel(), weights.dtype)
    _check_payload(payload, header_bytes(weights.numel()))
    if payload.device != weights.device:
        raise ConfigError(
            f"payload is on {payload.device}: must be on {weights.device}, as weights is"
        )
    torch.ops.commrt.patch_apply_(weights, payload)


def header_bytes(numel: int) -> int:
    """Bytes of a patch before its bodies."""
    return TOTAL_BYTES + ENTRY_BYTES * num_groups(numel)


def num_groups(numel: int) -> int:
    """Groups that ``numel`` elements fill, the last perhaps in part."""
    return -(-numel // GROUP)


def damaged(numel: int) -> ConfigError:
    """What is raised for a payload that no encoder wrote."""
    return ConfigError(f"payload is damaged, or no patch of {numel} elements of this dtype")


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // 4) * 4


def _check_flat(name: str, flat: Tensor) -> None:
    if flat.dtype not in FLOAT_DTYPES:
        raise ConfigError(f"{name} is {flat.dtype}: must be one of {FLOAT_DTYPES}")
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ConfigError(f"{name} has shape {tuple(flat.shape)}: must be 1-D and contiguous")


def _check_payload(payload: Tensor, least: int) -> None:
    if payload.dtype != torch.uint8 or payload.dim() != 1 or not payload.is_contiguous():
        raise ConfigError(f"payload is {payload.dtype} {tuple(payload.shape)}: must be 1-D uint8")
    if payload.numel() < least:
        raise ConfigError(f"payload has {payload.numel()} bytes: must be at least {least}")
