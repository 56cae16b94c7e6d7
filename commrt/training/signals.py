"""Stopping on request: a signal sets a flag, the loop decides when to act on it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, SIGINT (Ctrl-C) and SIGTERM are noted instead of ending the process.

    Once one was noted, later ones change nothing, even after the exit: a launcher repeats its
    signal while the ranks are already on their way out.

    Attributes:
        received: The first signal, None before it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._former = {number: signal.signal(number, self._note) for number in _STOPPING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.received is None:
            for number, handler in self._former.items():
                signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The shell's code for the signal, or for Ctrl-C where another rank received it."""
        return 128 + (self.received or signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
