"""Ranks compare what they are about to do, before the first byte that depends on it."""

import json

import torch
import torch.distributed as dist

from commrt.collectives.torch_names import all_gather_single
from commrt.errors import PeerMismatchError


def check_agreement(
    settings: dict[str, str | int | float], group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Raise on every rank unless all ranks of ``group`` have equal settings.

    Args:
        settings: What must agree; plain values, since they travel as JSON.
        group: Every rank of it must call; None is the default one.
        device: Where the group's backend wants its tensors.

    Raises:
        PeerMismatchError: Names the first setting that differs and each rank's value of it.
    """
    own = json.dumps(settings, sort_keys=True)
    peers = [json.loads(text) for text in gather_texts(own, group, device)]
    for key in sorted(set().union(*peers)):
        values = [peer.get(key) for peer in peers]
        if any(value != values[0] for value in values):
            listing = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise PeerMismatchError(f"ranks disagree on {key}: {listing}")


def gather_texts(text: str, group: dist.ProcessGroup | None, device: torch.device) -> list[str]:
    """Every rank's text, on every rank, in rank order.

    Args:
        text: Of any length; the cost is the longest one's, times the number of ranks.
        group: Every rank of it must call; None is the default one.
        device: Where the group's backend wants its tensors.
    """
    own = text.encode()
    world_size = dist.get_world_size(group)
    sizes = torch.zeros(world_size, dtype=torch.int64, device=device)
    size = torch.tensor([len(own)], dtype=torch.int64, device=device)
    all_gather_single(sizes, size, group=group)
    longest = max(int(sizes.max()), 1)
    padded = torch.tensor(list(own.ljust(longest)), dtype=torch.uint8, device=device)
    gathered = torch.empty(world_size * longest, dtype=torch.uint8, device=device)
    all_gather_single(gathered, padded, group=group)
    parts = zip(gathered.split(longest), sizes.tolist(), strict=True)
    return [bytes(part.tolist())[:length].decode() for part, length in parts]
