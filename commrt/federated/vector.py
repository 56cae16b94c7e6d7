"""What the federated uplink asks of a codec: a vector to bytes and back."""

import abc
import dataclasses

import torch
from torch import Tensor

from commrt.codecs import derive_seed
from commrt.errors import ConfigError
from commrt.federated.layout import magnitude

MAX_MAGNITUDE = 2.0**80
"""Of an element that codecs with scales take, so that no norm of theirs overflows fp32."""
MAX_SCALE = 2.0**90
"""Of a scale in a payload, so that no product with it overflows fp32."""
MIN_SCALE = 2.0**-96
"""Scales below it count as zero, so that no reciprocal overflows fp32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """What randomness and side knowledge a codec may use, the same at the client and the server.

    Args:
        seed: Of the round, shared by the cohort, in [0, 2**63).
        index: Of the client in the cohort.
        count: Clients in the cohort.

    Raises:
        ConfigError: For a value outside these.
    """

    seed: int
    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed={self.seed}: must be in [0, 2**63)")
        if not 0 <= self.index < self.count:
            raise ConfigError(f"index={self.index}: must be in [0, {self.count}), the cohort")

    def own_seed(self, purpose: str) -> int:
        """A seed of this client in this round."""
        return derive_seed(self.seed, purpose, self.index)

    def shared_seed(self, purpose: str) -> int:
        """A seed that the whole cohort has in this round."""
        return derive_seed(self.seed, purpose)


class VectorCodec(abc.ABC):
    """Turns a client's update into a payload and back.

    Codecs are immutable and hold no state: a codec with error feedback keeps its memory in the
    residual that its caller passes in. Payloads are made on the CPU, and carry nothing that the
    server knows: it decodes with the codec, the number of elements and the draw of the client.
    """

    @property
    @abc.abstractmethod
    def spec(self) -> str:
        """The canonical spec string, which ``parse_baseline`` turns into an equal codec."""

    @property
    @abc.abstractmethod
    def is_unbiased(self) -> bool:
        """Whether what is decoded has the vector as its mean over seeds."""

    def residual(self, numel: int) -> Tensor | None:
        """A new, empty error memory for vectors of ``numel`` elements; None for most codecs."""
        del numel
        return None

    def check_residual(self, residual: Tensor, numel: int) -> None:
        """Raise ``ConfigError`` for what is no error memory of ``numel`` elements."""
        like = self.residual(numel)
        assert like is not None
        if residual.dtype != like.dtype or residual.shape != like.shape:
            raise ConfigError(
                f"residual is {residual.dtype} {tuple(residual.shape)}: "
                f"must be {like.dtype} {tuple(like.shape)}"
            )
        if not bool(residual.isfinite().all()):
            raise ConfigError("residual has elements that are not finite: none may be")

    @abc.abstractmethod
    def encode(self, vector: Tensor, draw: Draw, residual: Tensor | None = None) -> bytes:
        """Encode a vector.

        Args:
            vector: float32 (N,), on any device.
            draw: Of this client in this round.
            residual: Error memory of this client, updated in place; None sends as with an empty
                one and keeps nothing.

        Raises:
            ConfigError: For another dtype or shape, and for an element that is not finite or too
                large for the codec; names it.
        """

    @abc.abstractmethod
    def decode(self, payload: bytes, numel: int, draw: Draw) -> Tensor:
        """Decode a payload of :meth:`encode`.

        Args:
            payload: From another machine: any bytes.
            numel: N, which the server knows.
            draw: As in :meth:`encode`.

        Returns:
            float32 (N,), all finite, on the CPU.

        Raises:
            WireFormatError: For a payload that no vector of N elements has. Memory and time are
                bounded by N and the length of the payload.
        """


def check_vector(vector: Tensor, largest: float = MAX_MAGNITUDE) -> Tensor:
    """The vector on the CPU, once it is known to be one that codecs take.

    Raises:
        ConfigError: As :meth:`VectorCodec.encode`; ``largest`` is the largest magnitude allowed.
    """
    if vector.dtype != torch.float32 or vector.dim() != 1:
        raise ConfigError(
            f"vector is {vector.dtype} {tuple(vector.shape)}: must be float32 with one dimension"
        )
    flat = vector.detach().cpu().contiguous()
    if flat.numel() and not magnitude(flat) <= largest:
        first = int((~(flat.abs() <= largest)).nonzero()[0])
        raise ConfigError(
            f"vector[{first}] is {flat[first].item()}: "
            f"must be finite and at most {largest:g} in magnitude"
        )
    return flat
