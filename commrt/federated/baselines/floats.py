"""No quantizer: ``"fp32"``, ``"fp16"``, ``"bf16"``."""

import dataclasses

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.federated.baselines.wire import PayloadReader, pack_floats
from commrt.federated.vector import Draw, VectorCodec, check_vector

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatCodec(VectorCodec):
    """Send the values themselves, rounded to nearest even; exact in fp32.

    Args:
        name: ``"fp32"``, ``"fp16"`` (elements up to 65504) or ``"bf16"``.

    Cost: 32, 16 or 16 bits an element.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in DTYPES:
            raise ConfigError(f"name={self.name!r}: must be one of {sorted(DTYPES)}")

    @property
    def spec(self) -> str:
        """See :class:`VectorCodec`."""
        return self.name

    @property
    def is_unbiased(self) -> bool:
        """See :class:`VectorCodec`: only what is exact is."""
        return self.name == "fp32"

    def encode(self, vector: Tensor, draw: Draw, residual: Tensor | None = None) -> bytes:
        """See :class:`VectorCodec`."""
        del draw, residual
        return pack_floats(check_vector(vector, self._largest).to(self._dtype))

    def decode(self, payload: bytes, numel: int, draw: Draw) -> Tensor:
        """See :class:`VectorCodec`."""
        del draw
        reader = PayloadReader(payload)
        values = reader.floats(numel, self._dtype, self._largest)
        reader.end()
        return values

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    @property
    def _largest(self) -> float:
        return torch.finfo(self._dtype).max
