"""The two ends of an uplink: what any framework calls. Between them go bytes and nothing else."""

import abc
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from commrt.errors import ConfigError
from commrt.federated.layout import Layout
from commrt.federated.peers import ALONE, Peers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of a round, as they were handed over: frames, tables and checks included.

    Attributes:
        uplink_bytes: From the clients, ``answer_bytes`` included.
        answer_bytes: Of these, what clients were asked for once more.
        downlink_bytes: Parameters and requests to the clients; the model itself is not among them.
    """

    uplink_bytes: int
    answer_bytes: int
    downlink_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregate:
    """What a round came to.

    Attributes:
        mean: The weighted mean of the updates that arrived, flat fp32 (N,).
        traffic: The round's bytes.
        clients: Those whose update is in the mean, in ascending order.
        report: Figures of the codec, by name.
    """

    mean: Tensor
    traffic: Traffic
    clients: tuple[int, ...]
    report: Mapping[str, float]

    @property
    def bits(self) -> float:
        """Uplink bits a weight and client."""
        return 8 * self.traffic.uplink_bytes / (self.mean.numel() * len(self.clients))


class Client(abc.ABC):
    """A client's end.

    A round is: :meth:`encode`, then :meth:`answer` for every request that comes.
    """

    @abc.abstractmethod
    def encode(
        self, round_index: int, update: Tensor, parameters: bytes, previous: Tensor | None = None
    ) -> bytes:
        """The payload of this round's update.

        To encode a round again, as when its payload was lost, replaces what was encoded before: the
        client remembers the last update of the round only, and starts from what it remembered
        before the first. So nothing is lost and nothing counts twice, whichever of an
        update's payloads arrives.

        Args:
            round_index: The round, from 0.
            update: Flat, of the layout's elements; all finite. It may be overwritten afterwards.
            parameters: What the server's ``begin`` returned for this client.
            previous: The global update of the round before, to the bit as the server has it; None
                where this client does not know it.

        Raises:
            ConfigError: The update has another shape or is not finite.
            WireFormatError: ``parameters`` is damaged or of another round or client.
        """

    @property
    def may_be_asked(self) -> bool:
        """Whether the server may ask for more of the update encoded last.

        If not, :meth:`state_dict` has all that is needed to go on, within a round as well.
        """
        return type(self).answer is not Client.answer

    def answer(self, request: bytes) -> bytes:
        """What the server lacks of the update encoded last.

        Raises:
            WireFormatError: The request is damaged or of another round or client.
        """
        raise ConfigError(f"a request of {len(request)} bytes: this codec's server sends none")

    def state_dict(self) -> dict[str, Any]:
        """What the client remembers from round to round; empty for most codecs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        if state:
            raise ConfigError(f"state has {sorted(state)}: this codec's clients remember nothing")


class Server(abc.ABC):
    """The server's end.

    A round is: :meth:`begin`; :meth:`receive` for what comes; :meth:`requests`, and ``receive`` for
    the answers, as often as there is time for; :meth:`finish`.

    Where it is shared by peers, all of them begin, ask and finish together, with the same arguments
    and results, and each receives what comes from the clients that it is home to. Where it is not,
    only the first peer may use it.

    Attributes:
        is_shared: Whether every peer decodes a part of the updates.
        histories: What this peer keeps of each client that it is home to. Another mapping, such as
            :class:`~commrt.federated.store.StateStore`, may take its place before the first round.
    """

    is_shared = False

    def __init__(self) -> None:
        self.histories: MutableMapping[int, dict[str, Any]] = {}

    def home(self, client: int) -> int:
        """The peer that decodes a client's updates."""
        del client
        return 0

    @abc.abstractmethod
    def begin(
        self,
        round_index: int,
        cohort: Sequence[int],
        *,
        weights: Mapping[int, float] | None = None,
        previous: Tensor | None = None,
    ) -> dict[int, bytes]:
        """Start a round; the parameters for each client, to be sent along with the model.

        Args:
            round_index: The round, from 0.
            cohort: The clients asked, each once.
            weights: Of the mean, positive, by client; default, equal.
            previous: The global update of the round before that clients are told. Default, the mean
                that the last ``finish`` returned.
        """

    @abc.abstractmethod
    def receive(self, client: int, payload: bytes) -> None:
        """Take a client's payload or answer.

        Raises:
            WireFormatError: It cannot be decoded. Nothing of it was used; another may come.
            ConfigError: The client is not in the cohort.
        """

    def receive_all(self, payloads: Mapping[int, bytes]) -> None:
        """Take what came of several clients; the same as one after the other, in less time.

        Raises:
            WireFormatError: One cannot be decoded; those before it were taken.
            ConfigError: As in :meth:`receive`.
        """
        for client, payload in payloads.items():
            self.receive(client, payload)

    def requests(self) -> dict[int, bytes]:
        """What to ask of which clients; empty once all that arrived is decoded."""
        return {}

    @abc.abstractmethod
    def finish(self) -> Aggregate:
        """End the round with what is there.

        What could not be decoded is left out and the weights of the rest are made to add up to one.

        Raises:
            StateError: Nothing arrived.
        """

    def state_dict(self, *, with_histories: bool = True) -> dict[str, Any]:
        """What the server remembers from round to round; of peers, the first one's counts.

        Args:
            with_histories: Or without ``histories``, for who saves and restores these.
        """
        del with_histories
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        if state:
            raise ConfigError(f"state has {sorted(state)}: this codec's server remembers nothing")


class Uplink(abc.ABC):
    """A codec of updates: immutable, and the same on both sides."""

    @property
    @abc.abstractmethod
    def spec(self) -> str:
        """The canonical spec string."""

    @abc.abstractmethod
    def client(self, layout: Layout, client: int, *, seed: int = 0) -> Client:
        """The end of client number ``client``.

        Args:
            layout: Of the updates.
            client: Its number, which the server knows it by; in [0, 2**63).
            seed: Of all that is drawn, the same for all; in [0, 2**63).
        """

    def encode(
        self,
        clients: Sequence[Client],
        round_index: int,
        updates: Tensor,
        parameters: Sequence[bytes],
        previous: Tensor | None = None,
    ) -> list[bytes]:
        """The payloads of several clients on one machine, as in a simulation.

        The same as each client's :meth:`Client.encode`, in less time.

        Args:
            clients: Ends of this uplink, with the same layout and seed.
            round_index: As there.
            updates: (K, N), one of each.
            parameters: Of each.
            previous: As there, of all.
        """
        return [
            client.encode(round_index, update, told, previous)
            for client, update, told in zip(clients, updates, parameters, strict=True)
        ]

    @abc.abstractmethod
    def server(self, layout: Layout, *, seed: int = 0, peers: Peers = ALONE) -> Server:
        """The server's end, for updates of ``layout`` and clients with the same ``seed``.

        Args:
            layout: Of the updates.
            seed: As the clients have.
            peers: Machines to decode on, each of which makes such a server; see :class:`Server`.
        """
