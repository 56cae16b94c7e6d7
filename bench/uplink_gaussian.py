"""Gaussian sources for `bench.uplink`: what a codec really sends, against what it could.

Clients' updates are unit Gaussians of which any two have the same correlation, unknown to both
ends; they are new in every round, so that nothing is gained from rounds before but that
correlation. The distortion is NMSE, of one client's update; a mean of K clients has 1 / K of it.
"""

import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.uplink_round import Cohort, Outcome
from commrt.codecs import derive_seed
from commrt.federated import Layout
from commrt.federated.limits import Symmetric

NUMEL = 65536
NMSE = 0.109  # where an entropy-coded dithered scalar quantiser takes 1.93 bits
CORRELATIONS = (0.0, 0.3, 0.6, 0.9, 0.99)
COHORTS = (4, 16, 64)
SPREAD = "spread"  # its step is searched, since its error depends on the correlation
CODECS = (
    *(f"mbtc:nmse={NMSE},memory=False", f"mbtc:nmse={NMSE},memory=False,joint=off"),
    *("eden2", "qsgd:levels=28", SPREAD),
)
SEARCHES = 4
COLUMNS = (
    *("K", "rho", "codec", "first", "bits", "answers", "asked", "distortion", "limit", "alone"),
    *("enc_ms", "dec_ms"),
)


class Source(NamedTuple):
    """Equally correlated clients."""

    num_clients: int
    correlation: float

    def draw(self, round_index: int) -> Tensor:
        """Updates (K, N) of a round."""
        seed = derive_seed("bench.uplink_gaussian", self.num_clients, round_index)
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(NUMEL, generator=generator)
        own = torch.randn(self.num_clients, NUMEL, generator=generator)
        return math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * own

    def outcomes(self, spec: str, rounds: int) -> Iterator[Outcome]:
        """Of rounds in sequence."""
        layout = Layout({"weight": (NUMEL,)})
        cohort = Cohort(spec, layout, [1.0] * self.num_clients, seed=0)
        for index in range(rounds):
            yield cohort.round(index, list(self.draw(index)))

    def limits(self, nmse: float) -> tuple[float, float]:
        """Bits of unbiased clients at this distortion: Berger-Tung, and each decoded alone."""
        together = Symmetric(num_clients=self.num_clients, correlation=self.correlation)
        return together.rate(nmse), Symmetric(num_clients=1, correlation=0.0).rate(nmse)


def measure(num_clients: int, correlation: float, codec: str, *, rounds: int) -> dict[str, Any]:
    """A row of figures: the first round apart, means of the others."""
    source = Source(num_clients, correlation)
    spec = f"spread:step={_spread_step(source)}" if codec == SPREAD else codec
    learns = codec.startswith("mbtc")
    first, *later = source.outcomes(spec, rounds if learns else 2)

    def mean(name: str) -> float:
        return statistics.fmean(getattr(outcome, name) for outcome in later)

    limit, alone = source.limits(mean("distortion"))
    return {
        "K": num_clients,
        "rho": correlation,
        "codec": spec,
        "kind": codec,
        "first": first.bits,
        "bits": mean("bits"),
        "answers": mean("answer_bits"),
        "asked": mean("asked"),
        "distortion": mean("distortion"),
        "limit": limit,
        "alone": alone,
        "enc_ms": 1e3 * mean("encode_s"),
        "dec_ms": 1e3 * mean("decode_s"),
    }


def _spread_step(source: Source) -> float:
    """With which the mean has about the distortion of independent clients at NMSE."""
    step = math.sqrt(12 * NMSE)
    for _ in range(SEARCHES):
        (outcome,) = source.outcomes(f"spread:step={step}", 1)
        step *= math.sqrt(NMSE / outcome.distortion)
    return round(step, 3)
