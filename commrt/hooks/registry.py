"""Which parameters of a model are compressed, and why the others are not."""

from torch import Tensor

from commrt.codecs import Codec, ExactCodec, LowRankCodec, derive_seed
from commrt.ops.format import FLOAT_DTYPES


class Registry:
    """The parameters of one model, by name.

    Args:
        codec: Of those that are compressed.
        min_numel: Those with fewer elements are not, nor are those with fewer than two dimensions.

    Attributes:
        compressed: Elements of each that is.
        exempt: Of each that is not: the reason, and its elements.
    """

    def __init__(self, codec: Codec, min_numel: int) -> None:
        self._codec = codec
        self._min_numel = min_numel
        self._names: dict[Tensor, str] = {}
        self.compressed: dict[str, int] = {}
        self.exempt: dict[str, tuple[str, int]] = {}

    def name(self, parameter: Tensor, name: str | None = None) -> str:
        """The name that it has, or gets: by the order of first sight, where none is given."""
        return self._names.setdefault(parameter, name or f"parameter.{len(self._names)}")

    def admit(self, parameter: Tensor, reason: str = "") -> bool:
        """Decide on a parameter; whether it is newly one of those that are compressed.

        ``reason`` is one not to, besides those of its own size and shape.
        """
        name = self.name(parameter)
        if name in self.exempt or name in self.compressed:
            return False
        reason = self._exemption(parameter) or reason
        if reason:
            self.exclude(parameter, reason)
        else:
            self.compressed[name] = parameter.numel()
        return not reason

    def exclude(self, parameter: Tensor, reason: str) -> None:
        """From now on it is not compressed."""
        name = self.name(parameter)
        self.exempt[name] = (reason, parameter.numel())
        self.compressed.pop(name, None)

    def layout(self) -> dict[str, int]:
        """What ranks must have alike: number and digest of the names and sizes, in order."""
        parameters = [
            (name, parameter.numel())
            for parameter, name in self._names.items()
            if name in self.compressed or name in self.exempt
        ]
        return {"parameters": len(parameters), "layout": derive_seed(repr(parameters))}

    def _exemption(self, parameter: Tensor) -> str:
        if isinstance(self._codec, ExactCodec):
            return f"codec is {self._codec.spec}"
        if parameter.dtype not in FLOAT_DTYPES:
            return f"dtype {parameter.dtype}"
        if parameter.numel() == 0:
            return "empty"
        if parameter.dim() < 2:
            return "fewer than 2 dimensions"
        if parameter.numel() < self._min_numel:
            return f"fewer than {self._min_numel} elements"
        if isinstance(self._codec, LowRankCodec) and not self._codec.pays(parameter.shape):
            return f"factors of rank {self._codec.rank} would not be half as large"
        return ""
