"""Residuals of a model's parameters, by name: what a checkpoint of the communication holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commrt.codecs import Codec, LowRankCodec, derive_seed
from commrt.errors import StateError


class Shard(NamedTuple):
    """A part of a parameter of ``numel`` elements.

    Seen as ``outer`` rows, it is the elements [begin, end) of each: with one row a range of the
    flat parameter, with more what sharding along an inner dimension makes.
    """

    begin: int
    end: int
    numel: int
    outer: int = 1

    @property
    def size(self) -> int:
        """Its elements."""
        return self.outer * (self.end - self.begin)

    def of(self, flat: Tensor) -> Tensor:
        """The view of these elements in the flat parameter, (outer, end - begin)."""
        return flat.view(self.outer, -1)[:, self.begin : self.end]


class Unmatched(NamedTuple):
    """Names that only the model has (missing) and only the state (unexpected)."""

    missing: list[str]
    unexpected: list[str]


class Residuals:
    """What this rank keeps of each parameter, by name: DDP may rebuild its buckets.

    A residual is a payload for each shard of the parameter that this rank sends, one after the
    other. Where one was rounded anew, since another world wrote it, the rounding is kept too, in
    fp32: the *carry*, to be added to the next gradient.

    Args:
        codec: Decides the size of a residual; one without memory has none.
        on_host: Keep residuals in host memory, pinned where there is a GPU.
    """

    def __init__(self, codec: Codec, *, on_host: bool = False) -> None:
        self._codec = codec
        self._on_host = on_host
        self._payloads: dict[str, Tensor] = {}
        self._shards: dict[str, list[Shard]] = {}
        self._bases: dict[str, Tensor] = {}
        self._carries: dict[str, Tensor] = {}
        self._devices: dict[str, torch.device] = {}

    def add(
        self,
        name: str,
        parameter: Tensor,
        shards: Sequence[Shard],
        device: torch.device | None = None,
    ) -> None:
        """Make an empty residual of some shards, unless the parameter has one.

        Args:
            name: Of the parameter.
            parameter: Its shape counts.
            shards: Of it, which this rank sends.
            device: Where the residual is used; by default the parameter's.
        """
        if self._codec.residual_fmt is None or name in self._payloads:
            return
        device = device or parameter.device
        size = sum(self._codec.residual_bytes(shard.size) for shard in shards)
        self._payloads[name] = self._empty(size, device)
        self._devices[name] = device
        self._shards[name] = list(shards)
        if isinstance(self._codec, LowRankCodec):
            basis = self._codec.new_basis(parameter.shape, name)
            self._bases[name] = basis.to(device)

    def get(self, name: str) -> Tensor | None:
        """The parameter's residual, to be updated in place; None without memory."""
        return self._payloads.get(name)

    def of_shards(self, name: str, payload: Tensor) -> list[Tensor]:
        """Views of a residual, or of a copy of it, for each of the shards it was added with."""
        sizes = [self._codec.residual_bytes(shard.size) for shard in self._shards[name]]
        return list(payload.split(sizes))

    def carry(self, name: str) -> Tensor | None:
        """fp32 of all shards, to be added to the next gradient and zeroed; None if none is kept."""
        return self._carries.get(name)

    def carries_of_shards(self, name: str) -> Sequence[Tensor | None]:
        """Views of :meth:`carry` for each of the shards."""
        carry, shards = self._carries.get(name), self._shards[name]
        return [None] * len(shards) if carry is None else carry.split([s.size for s in shards])

    def settle(self, names: Iterable[str]) -> None:
        """Forget the carries that have become zero."""
        for name in self._carries.keys() & set(names):
            if not self._carries[name].any():
                del self._carries[name]

    def basis(self, name: str) -> Tensor | None:
        """The parameter's basis, to be updated in place; None but for low-rank codecs."""
        return self._bases.get(name)

    def reset(self, names: list[str]) -> None:
        """Empty the residuals of these parameters."""
        for name in names:
            if name in self._payloads:
                self._payloads[name].zero_()
            self._carries.pop(name, None)

    def drop(self, name: str) -> None:
        """Give one up."""
        for part in (self._payloads, self._shards, self._bases, self._carries):
            part.pop(name, None)

    def clear(self) -> None:
        """Give all of them up, and their memory."""
        for part in (self._payloads, self._shards, self._bases, self._carries):
            part.clear()

    def rescale_(self, ratio: Tensor) -> None:
        """Multiply all residuals by a scalar: gradients are now that much larger."""
        # A copy of the list: another thread may add one, empty, meanwhile.
        for payload in list(self._payloads.values()):
            self._codec.rescale_residual(payload, ratio)
        for carry in list(self._carries.values()):
            carry.mul_(ratio)

    def num_bytes(self) -> int:
        """Memory they take."""
        kept = (*self._payloads.values(), *self._bases.values(), *self._carries.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def norm(self) -> float:
        """Euclidean norm of all residuals e together."""
        total = 0.0
        for name, payload in self._payloads.items():
            for decoded in self._decode(payload, self._carries.get(name), self._shards[name]):
                total += float(decoded.double().square().sum())
        return float(total**0.5)

    def state_dict(self) -> dict[str, Any]:
        """Copies, by name: residuals, the shards they are of, what is carried, and bases."""
        return {
            "residuals": {name: payload.clone() for name, payload in self._payloads.items()},
            "shards": {name: list(map(list, shards)) for name, shards in self._shards.items()},
            "carries": {name: carry.clone() for name, carry in self._carries.items()},
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
            shards = _shards(state, name)
            if {shard.numel for shard in shards} - {self._shards[name][0].numel}:
                raise StateError(
                    f"residual of {name!r} is of {shards[0].numel} elements: "
                    f"must be {self._shards[name][0].numel}"
                )
            size = sum(self._codec.residual_bytes(shard.size) for shard in shards)
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
            name not in state["shards"] or shards == _shards(state, name)
            for name, shards in self._shards.items()
        )

    def load(self, state: Mapping[str, Any]) -> None:
        """Overwrite every residual with that of a checked state that :meth:`fits`."""
        for name, payload in self._payloads.items():
            if name in state["residuals"]:
                payload.copy_(state["residuals"][name])
            else:
                payload.zero_()
        self._carries = {
            name: carry.to(self._devices[name], copy=True)
            for name, carry in state["carries"].items()
            if name in self._payloads
        }
        self._load_bases(state)

    def load_mean(self, states: Sequence[Mapping[str, Any]], seed: int) -> None:
        """Give every rank the mean of the residuals of a former world, whatever its size.

        What the ranks still owe to the mean gradient, sum(e) / ranks, stays what it was: what a
        residual's 8 or 4 bits leave out of it goes into the carry.

        Args:
            states: Checked states of all its ranks.
            seed: Of the rounding; another one on every rank.
        """
        self._carries = {}
        for name, shards in self._shards.items():
            payload = self._payloads[name]
            mean = self._mean_of(name, states)
            parts = [shard.of(mean).flatten().to(payload.device) for shard in shards]
            for number, (residual, part) in enumerate(
                zip(self.of_shards(name, payload), parts, strict=True)
            ):
                self._codec.encode_residual(part, residual, derive_seed(seed, name, number))
            stored = self._decode(payload, None, shards)
            lost = [part.sub_(kept) for part, kept in zip(parts, stored, strict=True)]
            carry = torch.cat(lost).div_(1 - self._codec.beta)
            if carry.any():
                self._carries[name] = carry.to(self._devices[name])
        self._load_bases(states[0])

    def _mean_of(self, name: str, states: Sequence[Mapping[str, Any]]) -> Tensor:
        """fp32 of the whole parameter: the mean over those who keep a residual of an element."""
        numel = self._shards[name][0].numel
        total, num_kept = torch.zeros(numel), 0
        for state in states:
            if name not in state["residuals"]:
                continue
            shards = _shards(state, name)
            decoded = self._decode(state["residuals"][name], state["carries"].get(name), shards)
            for shard, values in zip(shards, decoded, strict=True):
                shard.of(total).add_(values.cpu().view(shard.outer, -1))
                num_kept += shard.size
        return total.mul_(numel / num_kept) if num_kept else total

    def _load_bases(self, state: Mapping[str, Any]) -> None:
        for name in self._bases.keys() & state["bases"].keys():
            self._bases[name].copy_(state["bases"][name])

    def _empty(self, size: int, device: torch.device) -> Tensor:
        if not self._on_host:
            return torch.zeros(size, dtype=torch.uint8, device=device)
        return torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def _decode(
        self, payload: Tensor, carry: Tensor | None, shards: Sequence[Shard]
    ) -> list[Tensor]:
        """Each shard's residual in fp32, flat, with what is carried."""
        decoded, offset = [], 0
        for shard in shards:
            size = self._codec.residual_bytes(shard.size)
            decoded.append(torch.empty(shard.size, device=payload.device))
            self._codec.decode_residual(payload[offset : offset + size], decoded[-1])
            offset += size
        if carry is not None:
            for values, part in zip(decoded, carry.split([s.size for s in shards]), strict=True):
                values.add_(part.to(values.device), alpha=1 - self._codec.beta)
        return decoded


def _shards(state: Mapping[str, Any], name: str) -> list[Shard]:
    return [Shard(*shard) for shard in state["shards"][name]]


def _listing(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    if not names:
        return "none"
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
