"""Which table each class of scales has: learned at the server, from the rounds before."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from commrt.codecs.code_tables import NUM_PHASES, fit_rows
from commrt.codecs.entropy import count_codes
from commrt.federated.layout import Layout
from commrt.federated.mbtc.parameters import NUM_CLASSES
from commrt.ops.rans import SYMBOLS

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

    def count(self, codes: Tensor, contexts: Tensor) -> None:
        """Take a client's codes, int16 (N,), and their contexts."""
        fresh = torch.stack(
            [
                count_codes(group.of(codes), group.of(contexts), NUM_CLASSES)
                for group in self._layout.groups
            ]
        )
        self._fresh = fresh if self._fresh is None else self._fresh + fresh

    def close_round(self) -> None:
        """From now on what was counted is of the round before."""
        if self._fresh is not None:
            fresh = self._fresh.float()
            self._counts = fresh if self._counts is None else self._counts * DECAY + fresh
            self._fresh = None

    def fit(self) -> Tensor | None:
        """The first row of each class, int16 (groups, classes); None where nothing was counted."""
        if self._counts is None:
            return None
        shared = self._counts * 1.0
        shared[:, 1:] += SMOOTHING * self._counts[:, :-1]
        shared[:, :-1] += SMOOTHING * self._counts[:, 1:]
        rows = fit_rows(shared.view(-1, NUM_PHASES, SYMBOLS)).view(-1, NUM_CLASSES)
        return torch.stack(
            [_filled(row, seen) for row, seen in zip(rows, shared.sum(dim=(2, 3)) > 0, strict=True)]
        )

    def state_dict(self) -> dict[str, Any]:
        """The counts, if any."""
        return {} if self._counts is None else {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._counts = state.get("counts")


def _filled(row: Tensor, is_seen: Tensor) -> Tensor:
    """A group's rows, where a class that had no codes has the row of the nearest that had."""
    seen = is_seen.nonzero()[:, 0]
    nearest = (torch.arange(len(row))[:, None] - seen[None, :]).abs().argmin(dim=1)
    return row[seen[nearest]]
