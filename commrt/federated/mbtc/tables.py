"""Which table each class of scales has: learned at the server, from the rounds before."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commrt import ops
from commrt.codecs.code_tables import NUM_PHASES, fit_rows, used_columns
from commrt.federated.layout import Layout
from commrt.federated.mbtc.parameters import NUM_CLASSES
from commrt.federated.peers import Peers, gather
from commrt.ops.rans import SYMBOLS

NUM_CONTEXTS = NUM_CLASSES * NUM_PHASES
# What a round's counts still weigh a round later.
DECAY = 0.5
# What a class learns from its neighbours.
SMOOTHING = 0.02


class Tables:
    """Counts of what was decoded, by group, class and phase."""

    def __init__(self, layout: Layout) -> None:
        self._ends = layout.ends.tolist()
        self._counts: Tensor | None = None
        self._fresh = torch.zeros(len(layout.groups), NUM_CONTEXTS, SYMBOLS, dtype=torch.int64)
        self._has_fresh = False
        self._rows: Tensor | None = None

    def count(self, codes: Tensor, contexts: Tensor) -> None:
        """Take clients' codes, int16 (K, N), and their contexts."""
        self._has_fresh = True
        ops.rans_count_(self._fresh, codes, contexts, self._ends)

    def close_round(self, peers: Peers) -> None:
        """From now on what was counted, at all peers, is of the round before.

        Only the first one has the others' counts.
        """
        if peers.size > 1:
            for part in gather(peers, _sparse(self._fresh) if self._has_fresh else b"")[1:]:
                self._add(part)
        if self._has_fresh:
            fresh = self._fresh.view(-1, NUM_CLASSES, NUM_PHASES, SYMBOLS)
            if self._counts is None:
                self._counts = fresh.float()
            else:
                self._counts.mul_(DECAY).add_(fresh)
            self._rows, self._has_fresh = None, False
            self._fresh.zero_()

    def _add(self, part: bytes) -> None:
        """Take what :func:`_sparse` made of another's counts."""
        where, counts = torch.from_numpy(np.frombuffer(part, np.int64).reshape(2, -1).copy())
        self._fresh.view(-1).index_add_(0, where, counts)
        self._has_fresh |= bool(part)

    def fit(self) -> Tensor | None:
        """The first row of each class, int16 (groups, classes); None where nothing was counted."""
        if self._rows is None and self._counts is not None:
            self._rows = _rows_of(self._counts.view(-1, NUM_CLASSES, NUM_PHASES * SYMBOLS))
        return self._rows

    def state_dict(self) -> dict[str, Any]:
        """The counts, if any."""
        return {} if self._counts is None else {"counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: It is not one of such tables.
        """
        counts = state.get("counts")
        if counts is not None:
            shape = (len(self._ends), NUM_CLASSES, NUM_PHASES, SYMBOLS)
            if counts.shape != shape or not bool(counts.isfinite().all()):
                raise ValueError(f"counts {tuple(counts.shape)}: must be finite {shape}")
            counts = counts.float().clone()
        self._counts, self._rows = counts, None


def _sparse(counts: Tensor) -> bytes:
    """Where counts are not zero, and what they are there: int64 (2, n)."""
    flat = counts.view(-1)
    where = flat.nonzero()[:, 0]
    return torch.stack([where, flat[where]]).numpy().tobytes()


def _rows_of(counts: Tensor) -> Tensor:
    """The rows of counts (groups, classes, phases * symbols).

    A class that had no codes has the row of the nearest of its group that had.
    """
    columns = used_columns(counts.flatten(0, 1))
    own = counts[:, :, columns]
    shared = own.clone()
    shared[:, 1:] += SMOOTHING * own[:, :-1]
    shared[:, :-1] += SMOOTHING * own[:, 1:]
    seen = shared.sum(dim=2) > 0
    rows = torch.zeros(seen.shape, dtype=torch.int16)
    rows[seen] = fit_rows(shared[seen], columns)
    classes = torch.arange(NUM_CLASSES)
    distance = (classes[:, None] - classes).abs() + NUM_CLASSES * ~seen[:, None]
    return rows.gather(1, distance.argmin(dim=2))
