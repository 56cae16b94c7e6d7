"""Payloads: values to bytes, and a reader that trusts none of them."""

import numpy as np
import torch
from torch import Tensor

from commrt.errors import WireFormatError
from commrt.federated.layout import magnitude
from commrt.federated.vector import MAX_SCALE


def pack_floats(values: Tensor) -> bytes:
    """The bytes of a tensor of any float dtype, little-endian as the machine."""
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def pack_codes(codes: np.ndarray, width: int) -> bytes:
    """Unsigned codes of ``width`` bits (1 to 63) each, as a little-endian bit stream."""
    size = next(size for size in (1, 2, 4, 8) if size * 8 >= width)
    columns = codes.astype(f"<u{size}").view(np.uint8).reshape(-1, size)
    bits = np.unpackbits(columns, axis=1, count=width, bitorder="little")
    return np.packbits(bits, bitorder="little").tobytes()


def packed_bytes(count: int, width: int) -> int:
    """Size of ``count`` packed codes of ``width`` bits."""
    return -(-count * width // 8)


class PayloadReader:
    """Takes a payload apart from its front; whatever is missing or impossible raises."""

    def __init__(self, payload: bytes) -> None:
        self._rest = np.frombuffer(payload, np.uint8)

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` bytes."""
        if count > len(self._rest):
            raise WireFormatError(f"payload ends {count - len(self._rest)} bytes too early")
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def rest(self) -> np.ndarray:
        """All bytes that are left."""
        return self.take(len(self._rest))

    def floats(self, count: int, dtype: torch.dtype, largest: float = MAX_SCALE) -> Tensor:
        """``count`` finite floats of ``dtype``, as float32, of magnitudes up to ``largest``."""
        raw = torch.empty(count, dtype=dtype)
        raw.view(torch.uint8).numpy()[:] = self.take(count * dtype.itemsize)
        values = raw.float()
        if count and not magnitude(values) <= largest:
            raise WireFormatError(f"payload has a value that is not finite or above {largest:g}")
        return values

    def scales(self, count: int, dtype: torch.dtype, largest: float = MAX_SCALE) -> Tensor:
        """As :meth:`floats`, none of them negative."""
        values = self.floats(count, dtype, largest)
        if bool((values < 0).any()):
            raise WireFormatError("payload has a negative scale")
        return values

    def codes(self, count: int, width: int, most: int | None = None) -> np.ndarray:
        """``count`` codes of :func:`pack_codes`, up to ``most``: uint8, or uint64 if wider."""
        bits = np.unpackbits(self.take(packed_bytes(count, width)), bitorder="little")
        if bits[count * width :].any():
            raise WireFormatError("payload has bits after its last code")
        size = 1 if width <= 8 else 8
        columns = np.packbits(
            bits[: count * width].reshape(count, width), axis=1, bitorder="little"
        )
        wide = np.zeros((count, size), np.uint8)
        wide[:, : columns.shape[1]] = columns
        codes = wide.view(f"<u{size}").reshape(count)
        if most is not None and codes.max(initial=0) > most:
            raise WireFormatError(f"payload has a code of {codes.max()}: at most {most} is allowed")
        return codes

    def end(self) -> None:
        """Raise unless all was taken."""
        if len(self._rest):
            raise WireFormatError(f"payload is {len(self._rest)} bytes too long")
