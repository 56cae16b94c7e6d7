"""A Flower server's end: a strategy around another, which decodes."""

from collections.abc import Iterable
from logging import WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from commrt.errors import ConfigError, WireFormatError
from commrt.federated import Layout, Server, parse_uplink
from commrt.integrations.flower.client import RECORD, number_of, only, tensors_of, weight_of

# They look at single updates, of which there is but the mean.
_NEED_EACH = {
    *("Bulyan", "FedMedian", "FedTrimmedAvg", "FedXgbBagging", "FedXgbCyclic", "Krum", "MultiKrum"),
    *("QFedAvg", "DifferentialPrivacyServerSideAdaptiveClipping"),
    "DifferentialPrivacyServerSideFixedClipping",
}


class CommrtStrategy(Strategy):  # type: ignore[misc, unused-ignore]
    """Gives a strategy, for every client's arrays, those that the mean of the updates makes.

    So whatever goes by the weighted mean is what it was: FedAvg, FedProx, FedAvgM, FedAdam and the
    like. Clients scale updates by their weights and the server divides by the sum, since it learns
    weights with the updates. Replies with errors, and those that cannot be decoded, are left out.
    Arrays of whole numbers travel as they are.

    The metrics of a training get ``uplink-bytes`` and ``uplink-bits``, a weight and client.

    Args:
        wrapped: A strategy.
        uplink: A spec, see :func:`commrt.federated.parse_uplink`. One that asks clients again is
            refused, since Flower's rounds have one message each way: MBTC needs ``joint=off``.
        weighted_by: The metric that weighs a client, as the strategy has it.
        seed: Of all that the codec draws.

    Raises:
        ConfigError: An uplink or a strategy that does not go with it; among them robust and
            differentially private ones, which need every client's own update.

    Cost: in memory a copy of the weights, and what the codec remembers of each client.
    """

    def __init__(
        self,
        wrapped: Strategy,
        uplink: str = "mbtc:nmse=0.5,joint=off",
        *,
        weighted_by: str = "num-examples",
        seed: int = 0,
    ) -> None:
        self._wrapped, self._uplink = wrapped, parse_uplink(uplink)
        self._seed, self._weighted_by = seed, weighted_by
        if getattr(self._uplink, "joint", "off") != "off":
            raise ConfigError(f"uplink {uplink} asks clients again: must have joint=off")
        if wrong := _NEED_EACH & {kind.__name__ for kind in type(wrapped).__mro__}:
            raise ConfigError(f"{min(wrong)} needs each update: must go by their weighted mean")
        self._arrays = ArrayRecord()
        self._ends: tuple[Layout, Server] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See Flower's ``Strategy``."""
        messages = list(self._wrapped.configure_train(server_round, arrays, config, grid))
        if not messages:
            return messages
        self._arrays, tensors = arrays, arrays.to_torch_state_dict()
        if self._ends is None:
            layout = Layout.of({n: t for n, t in tensors.items() if t.is_floating_point()})
            self._ends = layout, self._uplink.server(layout, seed=self._seed)
        layout, server = self._ends
        clients = [number_of(message.metadata.dst_node_id) for message in messages]
        parameters = server.begin(server_round, clients)
        told: dict[str, Any] = {"uplink": self._uplink.spec, "seed": self._seed}
        told |= {"round": server_round, "names": list(layout.shapes)}
        told["weighted_by"] = self._weighted_by
        for client, message in zip(clients, messages, strict=True):
            own = ConfigRecord({**told, "parameters": parameters[client]})
            # Their content is one object.
            message.content = RecordDict({**message.content, RECORD: own})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """See Flower's ``Strategy``."""
        replies = list(replies)
        failed = [reply for reply in replies if reply.has_error()]
        sound = (reply for reply in replies if not reply.has_error())
        arrived = {_sender(reply): reply for reply in sound if self._takes(reply)}
        if not arrived or self._ends is None:
            nothing: tuple[ArrayRecord | None, MetricRecord | None]
            nothing = self._wrapped.aggregate_train(server_round, failed)
            return nothing
        layout, server = self._ends
        aggregate = server.finish()
        decoded = [arrived[client] for client in aggregate.clients]
        total = sum(weight_of(reply, self._weighted_by) for reply in decoded)
        old = tensors_of(self._arrays, layout.shapes)
        new = layout.split(layout.flatten(old) + aggregate.mean * (len(decoded) / total))
        made = {n: Array(part.to(old[n].dtype).numpy()) for n, part in new.items()}
        for reply in decoded:
            name, kept = only(reply.content.array_records)
            # In the order of the model, which is all that arrays without names have.
            reply.content[name] = ArrayRecord({n: made.get(n, kept.get(n)) for n in self._arrays})
        arrays, metrics = self._wrapped.aggregate_train(server_round, failed + decoded)
        metrics = MetricRecord() if metrics is None else metrics
        metrics["uplink-bytes"] = aggregate.traffic.uplink_bytes
        metrics["uplink-bits"] = aggregate.bits
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See Flower's ``Strategy``."""
        messages: Iterable[Message]
        messages = self._wrapped.configure_evaluate(server_round, arrays, config, grid)
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """See Flower's ``Strategy``."""
        return self._wrapped.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """See Flower's ``Strategy``."""
        self._wrapped.summary()

    def _takes(self, reply: Message) -> bool:
        """Whether the payload of a reply is of use."""
        if self._ends is None or RECORD not in reply.content:
            raise ConfigError("a reply has no payload: commrt_mod must be among the clients' mods")
        sent: Any = reply.content.pop(RECORD)
        try:
            self._ends[1].receive(_sender(reply), sent["payload"])
        except WireFormatError as error:
            log(WARNING, "commrt: node %d is left out: %s", reply.metadata.src_node_id, error)
            return False
        return True


def _sender(reply: Message) -> int:
    return number_of(reply.metadata.src_node_id)
