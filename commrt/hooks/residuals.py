"""Residuals of a model's parameters, by name: what a checkpoint of the communication holds."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from commrt.codecs import Codec, LocoCodec
from commrt.errors import StateError

STATE_VERSION = 1


class Residuals:
    """One residual a parameter. A name never changes bucket, so DDP may rebuild its buckets.

    Args:
        codec: Decides the size of a residual; one without memory has none.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._payloads: dict[str, Tensor] = {}
        self._numels: dict[str, int] = {}

    def add(self, name: str, numel: int, device: torch.device) -> None:
        """Make an empty residual, unless the parameter has one."""
        if isinstance(self._codec, LocoCodec) and name not in self._payloads:
            size = self._codec.residual_bytes(numel)
            self._payloads[name] = torch.zeros(size, dtype=torch.uint8, device=device)
            self._numels[name] = numel

    def get(self, name: str) -> Tensor | None:
        """The parameter's residual, to be updated in place; None without memory."""
        return self._payloads.get(name)

    def reset(self, names: list[str]) -> None:
        """Empty the residuals of these parameters."""
        for name in names:
            if name in self._payloads:
                self._payloads[name].zero_()

    def num_bytes(self) -> int:
        """Memory they take."""
        return sum(payload.numel() for payload in self._payloads.values())

    def norm(self) -> float:
        """Euclidean norm of all residuals e together."""
        total = 0.0
        for name, payload in self._payloads.items():
            assert isinstance(self._codec, LocoCodec)
            decoded = torch.empty(self._numels[name], dtype=torch.float32, device=payload.device)
            self._codec.decode_residual(payload, decoded)
            total += float(decoded.double().square().sum())
        return float(total**0.5)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of every residual, by parameter name."""
        return {name: payload.clone() for name, payload in self._payloads.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Overwrite every residual.

        Raises:
            StateError: Names what is missing, unexpected or of another size; nothing is changed.
        """
        missing = sorted(self._payloads.keys() - state.keys())
        unexpected = sorted(state.keys() - self._payloads.keys())
        if missing or unexpected:
            raise StateError(
                "state dict is of another model: "
                f"missing {_listing(missing)}, unexpected {_listing(unexpected)}"
            )
        for name, payload in self._payloads.items():
            if state[name].dtype != torch.uint8 or state[name].shape != payload.shape:
                raise StateError(
                    f"residual of {name!r} is {state[name].dtype} {tuple(state[name].shape)}: "
                    f"must be torch.uint8 {tuple(payload.shape)}"
                )
        for name, payload in self._payloads.items():
            payload.copy_(state[name])


def _listing(names: list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
