"""Settings of the policies: FedAvg, FedAsync, FedBuff, FedFix."""

import dataclasses
import math
from typing import Any

from commrt.codecs.spec import parse_options
from commrt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Staleness:
    """How much less an update counts when ``tau`` aggregations came between its start and itself.

    Source: Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", 2019, section 5.2;
    with ``a=0.5`` the polynomial is that of FedBuff.

    Attributes:
        kind: ``"constant"``: 1. ``"polynomial"``: (1 + tau)^-a. ``"hinge"``: 1 up to tau = b, then
            1 / (1 + a (tau - b)).
        a: Positive.
        b: At least 0; of the hinge.
    """

    kind: str
    a: float = 0.5
    b: float = 4.0

    @classmethod
    def parse(cls, spec: str) -> "Staleness":
        """From ``"constant"``, ``"polynomial:a=0.5"`` or ``"hinge:a=10,b=4"``.

        Raises:
            ConfigError: Another kind, option or value; says what is allowed.
        """
        name, _, text = spec.partition(":")
        taken = {"constant": {"kind", "a", "b"}, "polynomial": {"kind", "b"}, "hinge": {"kind"}}
        if name not in taken:
            raise ConfigError(f"staleness is {spec!r}: it must be one of {', '.join(taken)}")
        staleness = cls(name, **parse_options(spec, cls, taken[name], text or None))
        if not (0 < staleness.a < math.inf and 0 <= staleness.b < math.inf):
            raise ConfigError(f"staleness is {spec!r}: a must be positive and b at least 0")
        return staleness

    def __call__(self, tau: int) -> float:
        """The factor, in (0, 1]."""
        if self.kind == "polynomial":
            # The square root is exact everywhere, a power is not.
            return 1 / (math.sqrt(1 + tau) if self.a == 0.5 else (1 + tau) ** self.a)
        if self.kind == "hinge" and tau > self.b:
            return 1 / (1 + self.a * (tau - self.b))
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Rounds: a cohort begins together, and what came in time is averaged.

    A round ends when ``cohort`` updates have arrived, at the deadline, or when nobody is at work
    any more. Who is late is left out and idle again. With fewer than ``least`` updates the round
    is given up and another cohort drawn. A round begins with as many as are there, if ``least``
    are, and otherwise as soon as they are.

    Weights are those of the importance, or equal ones where it was sampled by, made to add up to
    one over what arrived.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", AISTATS 2017; over-selection, deadline and rounds given up: Bonawitz et al., "Towards
    Federated Learning at Scale: System Design", MLSys 2019, section 2.2.

    Attributes:
        cohort: Updates a round.
        over_selection: How many times as many are asked, rounded up; at most all that are there.
        deadline_s: After the round's begin; what arrives at that time is in time.
        least: Updates without which there is no aggregation.
        sampling: ``"uniform"``, or ``"weighted"`` by the importance; both without replacement.
    """

    cohort: int
    over_selection: float = 1.0
    deadline_s: float = math.inf
    least: int = 1
    sampling: str = "uniform"

    def __post_init__(self) -> None:
        _require(self, "cohort", self.cohort >= 1, "at least 1")
        _require(self, "over_selection", 1 <= self.over_selection <= 1e6, "from 1 to 1e6")
        _require(self, "deadline_s", self.deadline_s > 0, "above 0")
        _require(self, "least", 1 <= self.least <= self.cohort, f"from 1 to {self.cohort}")
        _require(self, "sampling", self.sampling in ("uniform", "weighted"), "uniform or weighted")

    @property
    def asked(self) -> int:
        """How many clients are asked in a round."""
        # A hundred times 1.1 is 110.00000000000001.
        return math.ceil(round(self.cohort * self.over_selection, 6))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedAsync:
    """Every update is mixed in as it arrives: q = alpha s(tau).

    A client's model is mixed, not its update: see :class:`~commrt.simulation.steps.Aggregate`.
    Whoever is drawn next begins at once. Clients count the same.

    Source: Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", 2019, algorithm 1.

    Attributes:
        concurrency: How many clients are at work.
        alpha: Weight of an update that is not stale, above 0 and at most 1.
        staleness: s, see :meth:`Staleness.parse`.
    """

    concurrency: int
    alpha: float = 0.6
    staleness: str = "polynomial:a=0.5"

    def __post_init__(self) -> None:
        _require(self, "concurrency", self.concurrency >= 1, "at least 1")
        _require(self, "alpha", 0 < self.alpha <= 1, "above 0 and at most 1")
        Staleness.parse(self.staleness)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedBuff:
    """Updates are aggregated as soon as there are ``buffer`` of them: q = s(tau) / buffer.

    Clients count the same; one whose update is in the buffer is not drawn until it is aggregated.

    Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS
    2022, algorithm 1.

    Attributes:
        buffer: Updates an aggregation.
        concurrency: How many clients are at work.
        staleness: s, see :meth:`Staleness.parse`.
    """

    buffer: int
    concurrency: int
    staleness: str = "polynomial:a=0.5"

    def __post_init__(self) -> None:
        for name in ("buffer", "concurrency"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        Staleness.parse(self.staleness)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedFix:
    """The server aggregates at fixed times what has come; all clients are at work all the time.

    Clients begin at these times, so whoever arrives waits for the next. A client of importance p
    whose update is aggregated at the end of interval n counts

        q(n) = p (n - m),

    m the interval at whose end it was aggregated before, 0 at first. Since the gaps add up,

        sum of its q up to n = p n

    whenever it is aggregated, and its mean weight an aggregation time is p however its times are
    distributed, whether it drops out or goes offline: 1 / (mean gap) is how often it takes part,
    and p (mean gap) its mean weight then. A client that always takes the time T has q = p ceil(T /
    interval), the paper's weights; with all T below the interval this is FedAvg. The weights of
    one aggregation add up to one in the mean only.

    So a client of twenty that was away for 500 intervals counts 25 times the mean of all when it is
    back, which no model survives. Where clients are away for long, bound the gap by ``most_gap``:
    who is away for longer then counts less than its importance.

    Source: Fraboni, Vidal, Kameni and Lorenzi, "A General Theory for Federated Optimization with
    Asynchronous and Heterogeneous Clients Updates", JMLR 24, 2023.

    Attributes:
        interval_s: From one aggregation to the next. An interval in which nothing came has none.
        most_gap: Intervals that n - m counts at most; None for any number.
    """

    interval_s: float
    most_gap: int | None = None

    def __post_init__(self) -> None:
        _require(self, "interval_s", 0 < self.interval_s < math.inf, "above 0 and finite")
        _require(self, "most_gap", self.most_gap is None or self.most_gap >= 1, "at least 1")


Policy = FedAvg | FedAsync | FedBuff | FedFix
POLICIES: dict[str, type[Policy]] = {
    "fedavg": FedAvg,
    "fedasync": FedAsync,
    "fedbuff": FedBuff,
    "fedfix": FedFix,
}


def _require(settings: Any, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {getattr(settings, name)}: it must be {allowed}")
