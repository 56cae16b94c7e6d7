"""How fast simulated clients are, and when they are there: drawn, or read from a file."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from commrt.codecs import derive_seed
from commrt.errors import ConfigError
from commrt.simulation.trace_file import TraceFile, Window

ALWAYS = (0.0, math.inf)
NEVER = (math.inf, math.inf)
# Factors of e^(8 sigma) are drawn once in 10^15 times, and have to be numbers.
MOST_SIGMA = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """How clients differ in speed and presence.

    What is log-normal has the median given, and a natural logarithm of standard deviation sigma.

    Attributes:
        compute_s: Seconds an example, log-normal over clients by ``compute_sigma``.
        compute_sigma: Spread of ``compute_s``; 0 for clients that are all the same.
        jitter: Sigma by which a client's compute time varies from one piece of work to the next.
        up_bytes_per_s: Rate to the server, log-normal over clients by ``link_sigma``; infinite for
            transfers that take no time.
        down_bytes_per_s: Rate from the server, likewise.
        link_sigma: Spread of both rates, which are drawn separately.
        latency_s: Added to every transfer.
        straggler_share: Share of the clients, rounded to whole ones, that are stragglers.
        straggler_factor: How many times as long a straggler computes.
        dropout: Probability that a client gives a piece of work up, at a uniform time before it
            begins to send.
        rejoin_s: For how long it is away then.
        on_s: Mean time for which a client is there, exponentially distributed.
        off_s: Mean time for which it is not, likewise; 0 for clients that are always there.
        file: A CSV file, see :class:`~commrt.simulation.trace_file.TraceFile`. What it says of a
            client takes the place of what would be drawn.
        file_period_s: Time after which the file's windows begin again; infinite for once.

    Raises:
        ConfigError: A value is out of range; names it.
    """

    compute_s: float = 1e-3
    compute_sigma: float = 0.0
    jitter: float = 0.0
    up_bytes_per_s: float = math.inf
    down_bytes_per_s: float = math.inf
    link_sigma: float = 0.0
    latency_s: float = 0.0
    straggler_share: float = 0.0
    straggler_factor: float = 1.0
    dropout: float = 0.0
    rejoin_s: float = 0.0
    on_s: float = math.inf
    off_s: float = 0.0
    file: Path | None = None
    file_period_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("compute_s", "latency_s", "rejoin_s", "off_s"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        for name in ("compute_sigma", "jitter", "link_sigma"):
            self._require(name, 0 <= getattr(self, name) <= MOST_SIGMA, f"from 0 to {MOST_SIGMA}")
        for name in ("up_bytes_per_s", "down_bytes_per_s", "on_s", "file_period_s"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("straggler_share", 0 <= self.straggler_share <= 1, "from 0 to 1")
        self._require("straggler_factor", 1 <= self.straggler_factor < math.inf, "at least 1")
        self._require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        if self.off_s:
            self._require("on_s", self.on_s < math.inf, "finite with off_s above 0")
        if self.file is None:
            self._require("file_period_s", self.file_period_s == math.inf, "unset without file")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"{name} is {getattr(self, name)}: it must be {allowed}")


class Finish(NamedTuple):
    """How a piece of work goes.

    Attributes:
        downloaded_s: When the client has the model.
        computed_s: When it has trained.
        uploaded_s: When the server has its update.
        off_s: When its window closes.
        lost_s: When it was lost instead; None if it was not.
        reason: Of the loss: ``"dropout"``, or ``"offline"`` for a client whose window closed.
    """

    downloaded_s: float
    computed_s: float
    uploaded_s: float
    off_s: float
    lost_s: float | None = None
    reason: str | None = None


class Traces:
    """The clients' speeds and windows. Nothing depends on what was asked before.

    Args:
        config: What to draw from.
        num_clients: How many clients there are.
        seed: Of all draws.

    Raises:
        ConfigError: The file is damaged, or has fewer clients.
    """

    def __init__(self, config: TraceConfig, num_clients: int, seed: int) -> None:
        if num_clients < 1:
            raise ConfigError(f"num_clients is {num_clients}: it must be at least 1")
        self.config = config
        self.num_clients = num_clients
        self._seed = seed
        clients = range(num_clients)
        slow = self._stragglers()
        self._compute = [
            config.compute_s
            * self._factor(config.compute_sigma, "compute", client)
            * (config.straggler_factor if client in slow else 1.0)
            for client in clients
        ]
        spread = config.link_sigma
        self._up = [config.up_bytes_per_s * self._factor(spread, "up", c) for c in clients]
        self._down = [config.down_bytes_per_s * self._factor(spread, "down", c) for c in clients]
        self._latency = [config.latency_s] * num_clients
        self._windows: dict[int, tuple[Window, ...]] = {}
        if config.file is not None:
            self._read(config.file)
        self._edges: dict[int, tuple[list[float], Iterator[float]]] = {}

    def _read(self, path: Path) -> None:
        file = TraceFile(path, self.num_clients, self.config.file_period_s)
        for into, column in (
            (self._compute, "compute_s"),
            (self._up, "up_bytes_per_s"),
            (self._down, "down_bytes_per_s"),
            (self._latency, "latency_s"),
        ):
            for client, value in file.values[column].items():
                into[client] = value
        self._windows = file.windows

    def finish(
        self,
        client: int,
        start_s: float,
        num_examples: float,
        down_bytes: int,
        up_bytes: int,
        round_index: int,
    ) -> Finish:
        """How a piece of work goes that is started now.

        Args:
            client: Who does it.
            start_s: When its download begins.
            num_examples: How many it trains on, each epoch counted.
            down_bytes: What it loads.
            up_bytes: What it sends. With 0 the earliest that anything could arrive.
            round_index: Which of its pieces of work; jitter and dropout are drawn from it.

        Raises:
            ConfigError: The client is not there at ``start_s``.
        """
        on_s, off_s = self.window(client, start_s)
        if on_s > start_s:
            raise ConfigError(f"client {client} starts at {start_s} s: it is not there by then")
        downloaded = start_s + (self._latency[client] + down_bytes / self._down[client])
        jitter = self._factor(self.config.jitter, "jitter", client, round_index)
        computed = downloaded + num_examples * self._compute[client] * jitter
        lost = reason = None
        given_up = self._given_up(client, round_index)
        if given_up is not None and start_s + given_up * (computed - start_s) < off_s:
            lost, reason = start_s + given_up * (computed - start_s), "dropout"
        finish = Finish(downloaded, computed, computed, off_s, lost, reason)
        return self.resize(client, finish, up_bytes)

    def resize(self, client: int, finish: Finish, up_bytes: int) -> Finish:
        """The same piece of work where the client sends another number of bytes."""
        downloaded, computed, _, off_s, lost, reason = finish
        uploaded = computed + (self._latency[client] + up_bytes / self._up[client])
        if reason != "dropout":
            lost, reason = (off_s, "offline") if off_s < uploaded else (None, None)
        return Finish(downloaded, computed, uploaded, off_s, lost, reason)

    def window(self, client: int, at_s: float) -> Window:
        """From when to when the client is there: the window around a time, or else the next.

        Returns:
            Both ends in seconds, the second not in it; both infinite if the client never comes.
        """
        windows = self._windows.get(client)
        if windows == (ALWAYS,) or (windows is None and not self.config.off_s):
            return ALWAYS
        if client not in self._edges:
            self._edges[client] = ([], self._draw_edges(client, windows))
        edges, more = self._edges[client]
        while not edges or edges[-1] <= at_s or len(edges) % 2:
            edge = next(more, None)
            if edge is None:
                break
            edges.append(edge)
        after = bisect.bisect_right(edges, at_s)
        if after == len(edges):
            return NEVER
        begin = after - after % 2
        return edges[begin], edges[begin + 1]

    def _draw_edges(self, client: int, windows: tuple[Window, ...] | None) -> Iterator[float]:
        """When a client comes and goes, in turn."""
        if windows is not None:
            yield from _repeat(windows, self.config.file_period_s)
            return
        on_s, off_s = self.config.on_s, self.config.off_s
        is_on = self._uniform("present", client) * (on_s + off_s) < on_s
        at_s = 0.0
        if is_on:
            yield at_s
        for index in itertools.count():
            # The exponential distribution has no memory: the first window is like the others.
            length = -math.log(self._uniform("window", client, index))
            at_s += _steady(length) * (on_s if is_on else off_s)
            is_on = not is_on
            yield at_s

    def _stragglers(self) -> set[int]:
        count = round(self.config.straggler_share * self.num_clients)
        if not count:
            return set()
        order = sorted(range(self.num_clients), key=lambda c: (self._uniform("straggler", c), c))
        return set(order[:count])

    def _given_up(self, client: int, round_index: int) -> float | None:
        """After what part of the time before it sends the client drops out; None if not."""
        if not self.config.dropout:
            return None
        drawn = self._uniform("dropout", client, round_index) / self.config.dropout
        # Below one it is uniform, so it serves once more.
        return drawn if drawn < 1 else None

    def _factor(self, sigma: float, purpose: str, *parts: int) -> float:
        """Log-normal, of median one."""
        if not sigma:
            return 1.0
        return _steady(math.exp(sigma * NormalDist().inv_cdf(self._uniform(purpose, *parts))))

    def _uniform(self, purpose: str, *parts: int) -> float:
        return uniform(f"trace {purpose}", self._seed, *parts)


def uniform(*parts: int | str) -> float:
    """A number in (0, 1), the same for the same parts on any machine; a multiple of 2**-53."""
    return ((derive_seed(*parts) >> 11) + 0.5) * 2.0**-52


def _steady(value: float) -> float:
    # Libraries of different machines differ in the last bit of exp and log, and ranks must agree.
    return float(f"{value:.6g}")


def _repeat(windows: tuple[Window, ...], period_s: float) -> Iterator[float]:
    """Ends of windows, again after every period; two that touch are one."""
    if period_s == math.inf:
        yield from itertools.chain.from_iterable(windows)
        return
    end: float | None = None
    # From the period before: its last window may last into the first.
    for cycle in itertools.count(-1):
        for on_s, off_s in windows:
            begin = on_s + cycle * period_s
            if begin != end:
                if end is not None:
                    yield end
                yield begin
            end = off_s + cycle * period_s
