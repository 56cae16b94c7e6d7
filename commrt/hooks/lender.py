"""Residuals in host memory: on the device only while a unit's gradients are sent.

A stream beside FSDP's brings the next unit's residuals while this one's are in use, and takes back
what was updated::

    FSDP's     | unit 1: encode, send | unit 2: encode, send |
    beside it  | in: 2                | out: 1   in: 3       | out: 2  ...

Which unit is next is known from the backward before. On a CPU the copies are made in place.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from commrt.collectives import order
from commrt.hooks.residuals import Residuals


class Lender:
    """Lends residuals, unit by unit.

    Args:
        residuals: Where they are kept.
        device: Where they are used.

    Cost: device memory of two units' residuals; two copies of each a step.
    """

    def __init__(self, residuals: Residuals, device: torch.device) -> None:
        self._residuals = residuals
        self._device = device
        self._stream = torch.cuda.Stream(device) if order.is_queued(device) else None
        self._ahead: dict[str, dict[str, Tensor]] = {}
        self._following: dict[str, tuple[str, Sequence[str]]] = {}
        self._last: str | None = None

    def take(self, unit: str, names: Sequence[str]) -> dict[str, Tensor]:
        """The unit's residuals on the device, by name, until :meth:`give_back`."""
        if self._last is not None:
            self._following[self._last] = unit, names
        self._last = unit
        if self._stream is None:
            return self._copies(names)
        if unit not in self._ahead:
            self._fetch(unit, names)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        lent = self._ahead.pop(unit)
        for tensor in lent.values():
            tensor.record_stream(current)
        if unit in self._following:
            self._fetch(*self._following[unit])
        return lent

    def give_back(self, lent: Mapping[str, Tensor]) -> None:
        """Keep what has been updated."""
        if self._stream is None:
            self._keep(lent)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._keep(lent)

    def settle(self) -> None:
        """Wait until host memory is up to date; forget what was fetched ahead."""
        self._ahead.clear()
        if self._stream is not None:
            self._stream.synchronize()

    def _fetch(self, unit: str, names: Sequence[str]) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._ahead[unit] = self._copies(names)

    def _copies(self, names: Sequence[str]) -> dict[str, Tensor]:
        kept = {name: self._residuals.get(name) for name in names}
        return {
            name: torch.empty(payload.shape, dtype=payload.dtype, device=self._device).copy_(
                payload, non_blocking=True
            )
            for name, payload in kept.items()
            if payload is not None
        }

    def _keep(self, lent: Mapping[str, Tensor]) -> None:
        for name, tensor in lent.items():
            payload = self._residuals.get(name)
            if payload is not None:
                payload.copy_(tensor, non_blocking=True)
