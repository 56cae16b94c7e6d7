"""All-to-all of payloads, for links that several senders at once would fill unevenly.

gloo's all-to-all sends to all peers at the same moment, so every link carries W - 1 flows into one
receiver. TCP shares a full link unevenly: on 4 nodes at 100 Mbit/s the last flow ends when 1.5
times the bytes could have been sent (bench/results). Large payloads are therefore sent to one peer
after the other, beginning with the next rank, so that at any time each link carries about one flow.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

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
    takes_turns = send.device.type == "cpu" and max(sizes) >= IN_TURN_BYTES
    if not takes_turns:
        dist.all_to_all_single(received, send, [own] * len(sizes), list(sizes), group=group)
        return
    rank, world_size = dist.get_rank(group), len(sizes)
    parts, slots = send.split(list(sizes)), received.split(own) if own else []
    if own:
        slots[rank].copy_(parts[rank])
    peers = [(rank + turn) % world_size for turn in range(1, world_size)]
    # Before the first send, so that no peer waits for this rank's own turn.
    arriving = [dist.irecv(slots[peer], group=group, group_src=peer) for peer in peers if own]
    for peer in peers:
        if sizes[peer]:
            dist.send(parts[peer], group=group, group_dst=peer)
    for work in arriving:
        assert work is not None
        work.wait()
