"""All-to-all and all-gather of payloads, for links that gloo's own fill unevenly.

gloo's all-to-all sends to all peers at the same moment, so every link carries W - 1 flows into one
receiver. TCP shares a full link unevenly: on 4 nodes at 100 Mbit/s the last flow ends when 1.5
times the bytes could have been sent (bench/results). Large payloads are therefore sent to one peer
after the other, beginning with the next rank, so that at any time each link carries about one flow.

gloo's all-gather is a ring, which is one flow a link already. But the ring of two ranks runs both
ways over one connection, where a receiver's message that it is ready stands behind its own data:
at 200 Mbit/s it takes 1.5 times as long as two sends whose receivers were ready before.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from commrt.collectives import order
from commrt.collectives.torch_names import all_gather_single

IN_TURN_BYTES = 64 << 10
"""Payloads to a peer from which on peers take turns; smaller ones are a matter of latency."""


def exchange_payloads(
    received: Tensor, send: Tensor, own: int, sizes: Sequence[int], group: dist.ProcessGroup | None
) -> None:
    """Send each rank its part, and receive this rank's from everybody.

    Args:
        received: (W * own) bytes, overwritten, in rank order.
        send: (sum(sizes)) bytes, in rank order.
        own: Bytes of this rank's part.
        sizes: Of every rank's part, the same on all ranks.
        group: All ranks call.
    """
    owns = [own] * len(sizes)
    if not order.is_queued(send.device) and max(sizes) >= IN_TURN_BYTES:
        _send_in_turn(received.split(owns), send.split(list(sizes)), group)
    else:
        dist.all_to_all_single(received, send, owns, list(sizes), group=group)


def gather_payloads(received: Tensor, send: Tensor, group: dist.ProcessGroup | None) -> None:
    """Send this rank's payload to everybody, and receive everybody's.

    Args:
        received: (W * N) bytes, overwritten, in rank order.
        send: (N) bytes, N the same on all ranks.
        group: All ranks call.
    """
    world_size = dist.get_world_size(group)
    is_large = send.numel() >= IN_TURN_BYTES
    if world_size == 2 and is_large and not order.is_queued(send.device):
        _send_in_turn(received.chunk(world_size), [send] * world_size, group)
    else:
        all_gather_single(received, send, group=group)


def _send_in_turn(
    slots: Sequence[Tensor], parts: Sequence[Tensor], group: dist.ProcessGroup | None
) -> None:
    """Send ``parts``, one for each rank, of whom one is received in each of ``slots``."""
    rank, world_size = dist.get_rank(group), len(parts)
    slots[rank].copy_(parts[rank])
    peers = [(rank + turn) % world_size for turn in range(1, world_size)]
    # Before the first send, so that no peer waits for this rank's own turn.
    arriving = [
        dist.irecv(slots[peer], group=group, group_src=peer)
        for peer in peers
        if slots[peer].numel()
    ]
    for peer in peers:
        if parts[peer].numel():
            dist.send(parts[peer], group=group, group_dst=peer)
    for work in arriving:
        assert work is not None
        work.wait()
