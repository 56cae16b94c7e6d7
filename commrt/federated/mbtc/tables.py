"""Which table each class of scales has: learned at the server, from the rounds before."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commrt import ops
from commrt.codecs.code_tables import NUM_PHASES, fit_rows
from commrt.federated.layout import Layout
from commrt.federated.mbtc.parameters import NUM_CLASSES
from commrt.federated.peers import Peers
from commrt.ops.rans import SYMBOLS

NUM_CONTEXTS = NUM_CLASSES * NUM_PHASES
# What a round's counts still weigh a round later.
DECAY = 0.5
# What a class learns from its neighbours.
SMOOTHING = 0.02


class Tables:
    """Counts of what was decoded, by group, class and phase."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._counts: Tensor | None = None
        self._fresh: Tensor | None = None
        self._rows: Tensor | None = None

    def count(self, codes: Tensor, contexts: Tensor) -> None:
        """Take a client's codes, int16 (N,), and their contexts."""
        ends = [group.end for group in self._layout.groups]
        ops.rans_count_(self._counted(), codes, contexts, ends)

    def close_round(self, peers: Peers) -> None:
        """From now on what was counted, at all peers, is of the round before.

        Only the first one has the others' counts.
        """
        if peers.size > 1:
            parts = peers.all_gather(_sparse(self._fresh))
            for part in parts[1:] if peers.rank == 0 else []:
                self._add(part)
        if self._fresh is not None:
            fresh = self._fresh.float().view(-1, NUM_CLASSES, NUM_PHASES, SYMBOLS)
            self._counts = fresh if self._counts is None else self._counts * DECAY + fresh
            self._fresh = self._rows = None

    def _add(self, part: bytes) -> None:
        """Take what :func:`_sparse` made of another's counts."""
        where, counts = torch.from_numpy(np.frombuffer(part, np.int64).reshape(2, -1).copy())
        if where.numel():
            self._counted().view(-1).index_add_(0, where, counts)

    def _counted(self) -> Tensor:
        """This round's counts."""
        if self._fresh is None:
            shape = (len(self._layout.groups), NUM_CONTEXTS, SYMBOLS)
            self._fresh = torch.zeros(shape, dtype=torch.int64)
        return self._fresh

    def fit(self) -> Tensor | None:
        """The first row of each class, int16 (groups, classes); None where nothing was counted."""
        if self._counts is None:
            return None
        if self._rows is None:
            shared = self._counts.clone()
            shared[:, 1:] += SMOOTHING * self._counts[:, :-1]
            shared[:, :-1] += SMOOTHING * self._counts[:, 1:]
            self._rows = torch.stack([_rows_of(counts) for counts in shared])
        return self._rows

    def state_dict(self) -> dict[str, Any]:
        """The counts, if any."""
        return {} if self._counts is None else {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._counts, self._rows = state.get("counts"), None


def _sparse(counts: Tensor | None) -> bytes:
    """Where counts are not zero, and what they are there: int64 (2, n)."""
    if counts is None:
        return b""
    flat = counts.view(-1)
    where = flat.nonzero()[:, 0]
    return torch.stack([where, flat[where]]).numpy().tobytes()


def _rows_of(counts: Tensor) -> Tensor:
    """A group's rows, by its counts (classes, phases, symbols).

    A class that had no codes has the row of the nearest that had.
    """
    [seen] = (counts.sum(dim=(1, 2)) > 0).nonzero(as_tuple=True)
    nearest = (torch.arange(NUM_CLASSES)[:, None] - seen[None, :]).abs().argmin(dim=1)
    return fit_rows(counts[seen])[nearest]
