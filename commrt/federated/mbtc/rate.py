"""The quantizer's step of the next round: by the distortion to have, or by the bits to spend."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from commrt.federated.mbtc.coding import LEAST_STEP
from commrt.federated.mbtc.side import ROUNDING

if TYPE_CHECKING:
    from commrt.federated.mbtc.spec import Mbtc

MOST_OCTAVES = 1.0
LEAST_SLOPE = 0.05


class StepControl:
    """One step for all clients: of all ways to share a distortion, equal noise takes fewest bits.

    Attributes:
        step: Of the coming round; 0 before the first, when each client chooses its own.
    """

    def __init__(self, codec: "Mbtc") -> None:
        self._codec = codec
        self.step = 0.0

    def learn(self, energy: float, steps: list[float], bits: float) -> None:
        """Choose the next step.

        Args:
            energy: Of an update, a weight, without the noise; the mean of those that came.
            steps: That these were coded with.
            bits: That they took, a weight.
        """
        if self._codec.nmse is not None:
            step = math.sqrt(max(energy, 0.0) * self._codec.nmse / ROUNDING)
        else:
            assert self._codec.bits is not None
            mean = math.exp(sum(map(math.log, steps)) / len(steps))
            slope = min(1.0, max(LEAST_SLOPE, bits))
            octaves = (bits - self._codec.bits) / slope
            step = mean * 2.0 ** max(-MOST_OCTAVES, min(MOST_OCTAVES, octaves))
        self.step = max(step, LEAST_STEP)

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.step = float(state["step"])
