"""Process groups of commrt's own, made by every rank of a parent group in the same order."""

import dataclasses
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from commrt.collectives import order
from commrt.collectives.agreement import check_agreement
from commrt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class LegGroups:
    """The same ranks twice: a group for each leg, on CUDA one for both (a stream orders them)."""

    reduce: dist.ProcessGroup
    gather: dist.ProcessGroup


class GroupMaker:
    """Makes groups of a parent's ranks; ranks outside the parent do not call.

    Args:
        parent: The group.
        device: Its backend's.
    """

    def __init__(self, parent: dist.ProcessGroup, device: torch.device) -> None:
        self._parent, self._device = parent, device
        self._timeout = parent._get_backend(device).options._timeout
        self._is_checked = False

    def make(self, ranks: Sequence[int]) -> LegGroups:
        """Groups of these global ranks; see :meth:`make_lanes`."""
        return LegGroups(*self.make_lanes(ranks, 2))

    def make_lanes(self, ranks: Sequence[int], number: int) -> list[dist.ProcessGroup]:
        """Groups of these global ranks, for as many threads; on CUDA the same one each time.

        torch names a group made without the other ranks after the number of groups a rank knows, so
        that has to be the same on all of the parent's ranks.

        Ranks: all of the parent, each naming a group that it is in.

        Raises:
            PeerMismatchError: On every rank of the parent, if the number of groups differs.
        """
        is_world = len(ranks) == dist.get_world_size()
        if not is_world and not self._is_checked:
            num_groups = len(dist.distributed_c10d._world.pg_names)
            check_agreement({"number of process groups": num_groups}, self._parent, self._device)
            self._is_checked = True
        is_queued = order.is_queued(self._device)
        groups = [
            self._new_group(tuple(ranks), is_world=is_world)
            for _ in range(1 if is_queued else number)
        ]
        return groups * number if is_queued else groups

    def _new_group(self, ranks: tuple[int, ...], *, is_world: bool) -> dist.ProcessGroup:
        free = _given_back.get((ranks, self._timeout), [])
        while free:
            group = free.pop()
            if group in dist.distributed_c10d._world.pg_map:
                return group
        made = dist.new_group(
            list(ranks), timeout=self._timeout, use_local_synchronization=not is_world
        )
        assert isinstance(made, dist.ProcessGroup)
        return made


_given_back: dict[tuple[tuple[int, ...], timedelta], list[dist.ProcessGroup]] = {}
"""Groups to be used again, by ranks and timeout.

torch (2.13) names a group that only its ranks make after the number of groups there are. Once any
was destroyed, the next gets a name that was used before, and waits for addresses of long ago.
"""


def give_back(group: dist.ProcessGroup) -> None:
    """Keep a group that :class:`GroupMaker` made for the next who asks for one of these ranks.

    Ranks: all of it, in the same order, with nothing under way.
    """
    ranks = tuple(dist.get_process_group_ranks(group))
    timeout = group._get_backend(group._device_types[0]).options._timeout
    _given_back.setdefault((ranks, timeout), []).append(group)


def find_nodes(
    hierarchy: int | Sequence[Sequence[int]], ranks: Sequence[int]
) -> list[tuple[int, ...]]:
    """The ranks of each node.

    Args:
        hierarchy: Ranks a node, consecutive ones being neighbours, or each node's ranks.
        ranks: All (global) ranks.

    Raises:
        ConfigError: The nodes are not equally large, or are not these ranks, each once.
    """
    is_number = not isinstance(hierarchy, Sequence)
    if is_number and (not isinstance(hierarchy, int) or isinstance(hierarchy, bool)):
        raise ConfigError(f"hierarchy={hierarchy!r}: must be ranks a node, or lists of ranks")
    if isinstance(hierarchy, int):
        if hierarchy < 1 or len(ranks) % hierarchy:
            raise ConfigError(
                f"hierarchy={hierarchy} ranks a node: must divide the {len(ranks)} ranks"
            )
        starts = range(0, len(ranks), hierarchy)
        return [tuple(ranks[start : start + hierarchy]) for start in starts]
    if not all(isinstance(node, Sequence) for node in hierarchy):
        raise ConfigError(f"hierarchy={hierarchy!r}: must be ranks a node, or lists of ranks")
    nodes = sorted(tuple(sorted(node)) for node in hierarchy)  # as torch numbers ranks in groups
    if sorted(rank for node in nodes for rank in node) != sorted(ranks):
        raise ConfigError(f"hierarchy={nodes}: must name each of the ranks {list(ranks)} once")
    if len({len(node) for node in nodes}) != 1:
        raise ConfigError(f"hierarchy={nodes}: nodes must have equally many ranks")
    return nodes
