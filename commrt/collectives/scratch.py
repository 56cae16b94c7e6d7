"""Payload buffers kept from bucket to bucket: no page faults, no fragmented heap."""

import itertools

import torch
from torch import Tensor

from commrt.collectives import order

# One payload is being received, one waits for the gather leg, one is in it.
RECEIVED_IN_FLIGHT = 3


class Scratch:
    """Named uint8 buffers that grow to the largest size asked for. One caller a name at a time.

    On a GPU each stream has its own, so that work on one never overwrites what another still reads.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.cuda.Stream | None], Tensor] = {}
        self._turns = itertools.cycle(range(RECEIVED_IN_FLIGHT))

    def take(self, name: str, num_bytes: int, device: torch.device) -> Tensor:
        """The buffer of this name, with undefined content; what it held before is lost."""
        key = name, torch.cuda.current_stream(device) if order.is_queued(device) else None
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < num_bytes:
            self._buffers.pop(key, None)
            with torch.inference_mode(False):  # or training could not write to it later
                buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._buffers[key] = buffer
        return buffer[:num_bytes]

    def take_received(self, num_bytes: int, device: torch.device) -> Tensor:
        """A buffer that stays untouched while the next two are taken."""
        return self.take(f"received {next(self._turns)}", num_bytes, device)

    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.numel() for buffer in self._buffers.values())
