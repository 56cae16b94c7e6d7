"""Rounds of a few clients with any uplink, and frames that are damaged."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from commrt.federated import Aggregate, Client, Layout, Server, Uplink

LAYOUT = Layout({"weight": (40, 30), "bias": (40,), "head": (10, 40), "scale": ()})
SPECS = (
    *("fp32", "fp16", "eden1", "qsgd:levels=4", "spread:step=1.9", "sign", "pvq"),
    *("topk:share=0.1", "loco4"),
    *("mbtc:nmse=0.5", "mbtc:bits=1.5,memory=False", "mbtc:bits=2.0,joint=off,lattice=e8"),
)
CLIENTS = (3, 7, 11, 2**63 - 1)


class Training:
    """Clients whose updates have something in common, round after round."""

    def __init__(
        self,
        uplink: Uplink,
        seed: int = 5,
        layout: Layout = LAYOUT,
        clients: Iterable[int] = CLIENTS,
    ) -> None:
        self.uplink, self.layout = uplink, layout
        self.server: Server = uplink.server(layout, seed=seed)
        self.clients: dict[int, Client] = {
            client: uplink.client(layout, client, seed=seed) for client in clients
        }
        self.previous: Tensor | None = None
        self.index = 0

    def updates(self) -> dict[int, Tensor]:
        generator = torch.Generator().manual_seed(self.index)
        common = torch.randn(self.layout.numel, generator=generator)
        return {
            client: common + 0.5 * torch.randn(self.layout.numel, generator=generator)
            for client in self.clients
        }

    def payloads(self, updates: dict[int, Tensor]) -> dict[int, bytes]:
        return self.encoded(updates, self.server.begin(self.index, tuple(self.clients)))

    def encoded(self, updates: dict[int, Tensor], told: dict[int, bytes]) -> dict[int, bytes]:
        return {
            client: self.clients[client].encode(self.index, update, told[client], self.previous)
            for client, update in updates.items()
        }

    def end(self, payloads: dict[int, bytes]) -> Aggregate:
        for client, payload in payloads.items():
            self.server.receive(client, payload)
        aggregate = self.server.finish()
        self.previous, self.index = aggregate.mean, self.index + 1
        return aggregate

    def round(self) -> Aggregate:
        return self.end(self.payloads(self.updates()))


def mutations(frame: bytes) -> Iterator[bytes]:
    """Truncated, extended, and flipped at places all over."""
    yield from (b"", frame[:3], frame[:-1], frame + b"\0")
    for at in {*range(0, len(frame), max(1, len(frame) // 23)), len(frame) - 1}:
        yield frame[:at] + bytes((frame[at] ^ 0x40,)) + frame[at + 1 :]
