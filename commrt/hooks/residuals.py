"""Residuals of a model's parameters, by name: what a checkpoint of the communication holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commrt.codecs import Codec, LowRankCodec, derive_seed
from commrt.errors import StateError


class Shard(NamedTuple):
    """Elements [begin, end) of a parameter of ``numel``: those whose residual this rank keeps."""

    begin: int
    end: int
    numel: int


class Unmatched(NamedTuple):
    """Names that only the model has (missing) and only the state (unexpected)."""

    missing: list[str]
    unexpected: list[str]


class Residuals:
    """One residual a parameter. A name never changes bucket, so DDP may rebuild its buckets.

    Args:
        codec: Decides the size of a residual; one without memory has none.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._payloads: dict[str, Tensor] = {}
        self._shards: dict[str, Shard] = {}
        self._bases: dict[str, Tensor] = {}

    def add(self, name: str, parameter: Tensor, shard: Shard) -> None:
        """Make an empty residual, unless the parameter has one."""
        if self._codec.residual_fmt is None or name in self._payloads:
            return
        size = self._codec.residual_bytes(shard.end - shard.begin)
        self._payloads[name] = torch.zeros(size, dtype=torch.uint8, device=parameter.device)
        self._shards[name] = shard
        if isinstance(self._codec, LowRankCodec):
            basis = self._codec.new_basis(parameter.shape, name)
            self._bases[name] = basis.to(parameter.device)

    def get(self, name: str) -> Tensor | None:
        """The parameter's residual, to be updated in place; None without memory."""
        return self._payloads.get(name)

    def basis(self, name: str) -> Tensor | None:
        """The parameter's basis, to be updated in place; None but for low-rank codecs."""
        return self._bases.get(name)

    def reset(self, names: list[str]) -> None:
        """Empty the residuals of these parameters."""
        for name in names:
            if name in self._payloads:
                self._payloads[name].zero_()

    def drop(self, name: str) -> None:
        """Give one up."""
        for part in (self._payloads, self._shards, self._bases):
            part.pop(name, None)

    def clear(self) -> None:
        """Give all of them up, and their memory."""
        for part in (self._payloads, self._shards, self._bases):
            part.clear()

    def rescale_(self, ratio: Tensor) -> None:
        """Multiply all residuals by a scalar: gradients are now that much larger."""
        # A copy of the list: another thread may add one, empty, meanwhile.
        for payload in list(self._payloads.values()):
            self._codec.rescale_residual(payload, ratio)

    def num_bytes(self) -> int:
        """Memory they take."""
        kept = (*self._payloads.values(), *self._bases.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def norm(self) -> float:
        """Euclidean norm of all residuals e together."""
        total = 0.0
        for name, payload in self._payloads.items():
            decoded = self._decode(payload, self._shards[name])
            total += float(decoded.double().square().sum())
        return float(total**0.5)

    def state_dict(self) -> dict[str, Any]:
        """Copies, by name: every residual, the part of the parameter it is of, and the basis."""
        return {
            "residuals": {name: payload.clone() for name, payload in self._payloads.items()},
            "shards": {name: list(shard) for name, shard in self._shards.items()},
            "bases": {name: basis.clone() for name, basis in self._bases.items()},
        }

    def check(self, state: Mapping[str, Any], strict: bool = True) -> Unmatched:
        """Raise StateError unless ``state`` is of a model with the same parameters.

        Its message names what is missing (unless not ``strict``), unexpected or of another size.
        """
        unmatched = Unmatched(
            sorted(self._payloads.keys() - state["residuals"].keys()),
            sorted(state["residuals"].keys() - self._payloads.keys()),
        )
        if strict and any(unmatched):
            raise StateError(
                "state dict is of another model: missing "
                f"{_listing(unmatched.missing)}, unexpected {_listing(unmatched.unexpected)}"
            )
        for name, payload in state["residuals"].items():
            if name in unmatched.unexpected:
                continue
            begin, end, numel = state["shards"][name]
            if numel != self._shards[name].numel:
                raise StateError(
                    f"residual of {name!r} is of {numel} elements: "
                    f"must be {self._shards[name].numel}"
                )
            size = self._codec.residual_bytes(end - begin)
            if payload.dtype != torch.uint8 or payload.shape != (size,):
                raise StateError(
                    f"residual of {name!r} is {payload.dtype} {tuple(payload.shape)}: "
                    f"must be torch.uint8 {(size,)}"
                )
            basis = self._bases.get(name)
            if basis is not None and state["bases"][name].shape != basis.shape:
                raise StateError(f"state dict has no basis of {name!r} of {tuple(basis.shape)}")
        return unmatched

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a checked state keeps the same parts of the parameters as this rank does."""
        return all(
            list(shard) == state["shards"].get(name, list(shard))
            for name, shard in self._shards.items()
        )

    def load(self, state: Mapping[str, Any]) -> None:
        """Overwrite every residual with that of a checked state that :meth:`fits`."""
        for name, payload in self._payloads.items():
            if name in state["residuals"]:
                payload.copy_(state["residuals"][name])
            else:
                payload.zero_()
        self._load_bases(state)

    def load_mean(self, states: Sequence[Mapping[str, Any]], num_holders: int, seed: int) -> None:
        """Give every rank the mean of the residuals of a former world, whatever its size.

        What the ranks still owe to the mean gradient, sum(e) / ranks, stays what it was.

        Args:
            states: Checked states of all its ranks.
            num_holders: How many of them keep a residual of the same element.
            seed: Of the rounding; another one on every rank.
        """
        for name, shard in self._shards.items():
            total = torch.zeros(shard.numel)
            for state in states:
                if name not in state["residuals"]:
                    continue
                begin, end, _ = part = Shard(*state["shards"][name])
                total[begin:end] += self._decode(state["residuals"][name], part).cpu()
            mean = (total[shard.begin : shard.end] / num_holders).to(self._payloads[name].device)
            self._codec.encode_residual(mean, self._payloads[name], derive_seed(seed, name))
        self._load_bases(states[0])

    def _load_bases(self, state: Mapping[str, Any]) -> None:
        for name in self._bases.keys() & state["bases"].keys():
            self._bases[name].copy_(state["bases"][name])

    def _decode(self, payload: Tensor, shard: Shard) -> Tensor:
        decoded = torch.empty(shard.end - shard.begin, device=payload.device)
        self._codec.decode_residual(payload, decoded)
        return decoded


def _listing(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    if not names:
        return "none"
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
