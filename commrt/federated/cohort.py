"""A round at the server: who was asked, what weighs how much, and the bytes of it."""

import dataclasses
import operator
import struct
from collections.abc import Mapping, Sequence

from commrt.errors import ConfigError, StateError
from commrt.federated.mean import ExactMean
from commrt.federated.peers import ALONE, Peers
from commrt.federated.uplink import Server, Traffic

# What is kept of decoded updates between receive() and finish(); beyond, they are decoded again.
MOST_KEPT_BYTES = 1 << 28


class Round:
    """The running round.

    Args:
        index: Its number, from 0.
        cohort: The clients asked, each once: their numbers, in [0, 2**63).
        weights: By client, positive; None for equal ones.

    Raises:
        ConfigError: An empty cohort, a client twice or of a number that is none, a weight missing
            or not positive.
    """

    def __init__(
        self, index: int, cohort: Sequence[int], weights: Mapping[int, float] | None
    ) -> None:
        self.index = operator.index(index)
        self.cohort = tuple(operator.index(client) for client in cohort)
        if index < 0 or not self.cohort or len(set(self.cohort)) != len(self.cohort):
            raise ConfigError(
                f"round {index} of cohort {self.cohort}: must be clients, each once, from round 0"
            )
        strange = [client for client in self.cohort if not 0 <= client < 2**63]
        if strange:
            raise ConfigError(f"numbers of clients are {strange}: must be in [0, 2**63)")
        weights = dict.fromkeys(self.cohort, 1.0) if weights is None else weights
        wrong = {c: weights.get(c) for c in self.cohort if not 0 < weights.get(c, 0) < float("inf")}
        if wrong:
            raise ConfigError(f"weights of clients are {wrong}: must be positive")
        self.weights = {client: float(weights[client]) for client in self.cohort}
        if not sum(self.weights.values()) < float("inf"):
            raise ConfigError(f"weights of clients are {self.weights}: their sum must be finite")
        self._places = {client: place for place, client in enumerate(self.cohort)}
        self._uplink_bytes = dict.fromkeys(self.cohort, 0)
        self._answer_bytes = self._downlink_bytes = 0

    def place(self, client: int) -> int:
        """Where in the cohort ``client`` is."""
        if client not in self.weights:
            raise ConfigError(f"client {client} is not in the cohort of round {self.index}")
        return self._places[client]

    def came(self, client: int, payload: bytes, *, is_answer: bool = False) -> None:
        """Count what came from a client, of use or not."""
        self._uplink_bytes[client] += len(payload)
        self._answer_bytes += len(payload) * is_answer

    def sent(self, frames: dict[int, bytes]) -> dict[int, bytes]:
        """Count what goes to the clients; the same frames."""
        self._downlink_bytes += sum(map(len, frames.values()))
        return frames

    @property
    def traffic(self) -> Traffic:
        """The bytes so far, of this peer."""
        return Traffic(
            uplink_bytes=sum(self._uplink_bytes.values()),
            answer_bytes=self._answer_bytes,
            downlink_bytes=self._downlink_bytes,
        )

    def gathered(
        self, peers: Peers, arrived: Mapping[int, float]
    ) -> tuple[dict[int, float], Traffic]:
        """What arrived at all peers, in the order of clients, and the round's bytes.

        Args:
            peers: All that have this round.
            arrived: Of each client whose update is here, a number.
        """
        own = struct.pack("<qq", sum(self._uplink_bytes.values()), self._answer_bytes)
        own += b"".join(struct.pack("<qd", *each) for each in arrived.items())
        found, uplink_bytes, answer_bytes = dict[int, float](), 0, 0
        for part in peers.all_gather(own):
            uplink, answers = struct.unpack_from("<qq", part)
            uplink_bytes, answer_bytes = uplink_bytes + uplink, answer_bytes + answers
            found.update(struct.iter_unpack("<qd", part[16:]))
        traffic = dataclasses.replace(
            self.traffic, uplink_bytes=uplink_bytes, answer_bytes=answer_bytes
        )
        return dict(sorted(found.items())), traffic

    def shares(self, clients: Sequence[int]) -> list[float]:
        """The weights of ``clients``, made to add up to one.

        Raises:
            StateError: There are none.
        """
        if not clients:
            raise StateError(f"round {self.index} ends with no update of {len(self.cohort)} asked")
        total = sum(self.weights[client] for client in clients)
        return [self.weights[client] / total for client in clients]


class RoundServer(Server):
    """A server that has one round at a time.

    Args:
        peers: Those that it is shared by.
    """

    def __init__(self, peers: Peers = ALONE) -> None:
        super().__init__()
        self._round: Round | None = None
        self._peers = peers
        self.is_shared = peers.size > 1

    def home(self, client: int) -> int:
        """See :meth:`Server.home`."""
        return (operator.index(client) + 1) % self._peers.size

    def _expecting(self, client: int) -> Round:
        """The running round, of whose cohort the client is, and this is its home."""
        running = self._running()
        running.place(client)
        if self.home(client) != self._peers.rank:
            raise ConfigError(
                f"client {client} sends to peer {self._peers.rank}: must to {self.home(client)}"
            )
        return running

    def _gathered(
        self, running: Round, numel: int, largest: Mapping[int, float]
    ) -> tuple[dict[int, float], Traffic, ExactMean]:
        """The shares of all that arrived anywhere, the round's bytes, and a mean to add them to.

        Args:
            running: The round, which ends.
            numel: Elements of an update.
            largest: Of each client whose update is here: no element of it is larger.
        """
        arrived, traffic = running.gathered(self._peers, largest)
        shares = dict(zip(arrived, running.shares(tuple(arrived)), strict=True))
        most = max(share * arrived[client] for client, share in shares.items())
        return shares, traffic, ExactMean(numel, most, len(arrived))

    def _running(self) -> Round:
        if self._round is None:
            raise StateError("no round is running: begin() starts one")
        return self._round
