"""A Flower client's end: a mod, which encodes what a training changed."""

import io
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from commrt.errors import ConfigError
from commrt.federated import Layout, parse_uplink

RECORD = "commrt"
"""Name of what is added to messages and to a client's state."""


def commrt_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Sends the update of a training as a payload of the uplink, in place of arrays.

    Put it first among the mods, so that others see arrays. What the codec remembers is in
    ``context.state``. Messages that are no training pass as they are.

    Raises:
        ConfigError: The server's strategy is no :class:`CommrtStrategy`; or the reply lacks arrays
            or the weight, or its update is not finite.

    Cost: on the client the codec's memory, and the weights once more while it trains.
    """
    if message.metadata.message_type.partition(".")[0] != "train":
        return call_next(message, context)
    if RECORD not in message.content:
        raise ConfigError("commrt_mod got no parameters: the strategy must be a CommrtStrategy")
    told: Any = message.content.pop(RECORD)
    begun = tensors_of(only(message.content.array_records)[1], told["names"])
    layout = Layout.of(begun)
    before = layout.flatten(begun)
    number = number_of(message.metadata.dst_node_id)
    client = parse_uplink(told["uplink"]).client(layout, number, seed=told["seed"])
    if RECORD in context.state:
        memory: Any = context.state[RECORD]
        client.load_state_dict(torch.load(io.BytesIO(memory["state"]), weights_only=True))
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    name, arrays = only(reply.content.array_records)
    update = layout.flatten(tensors_of(arrays, told["names"])) - before
    payload = client.encode(
        told["round"], update * weight_of(reply, told["weighted_by"]), told["parameters"]
    )
    torch.save(client.state_dict(), buffer := io.BytesIO())
    context.state[RECORD] = ConfigRecord({"state": buffer.getvalue()})
    coded = set(told["names"])
    reply.content[name] = ArrayRecord({n: a for n, a in arrays.items() if n not in coded})
    reply.content[RECORD] = ConfigRecord({"payload": payload})
    return reply


def number_of(node: int) -> int:
    """The client that a node is: nodes have random numbers of 64 bits, clients of 63."""
    return node % 2**63


def only(records: Any) -> tuple[str, Any]:
    """Name and record, of a message's ArrayRecords, where there is one."""
    if len(records) != 1:
        raise ConfigError(f"a message has ArrayRecords {list(records)}: must have one")
    [(name, record)] = records.items()
    return name, record


def tensors_of(arrays: ArrayRecord, names: Iterable[str]) -> dict[str, Tensor]:
    """Some of the arrays."""
    return {name: torch.from_numpy(arrays[name].numpy()) for name in names}


def weight_of(reply: Message, key: str) -> float:
    """How much a client counts, as its reply says."""
    for metrics in reply.content.metric_records.values():
        if key in metrics:
            value: Any = metrics[key]
            return float(value)
    raise ConfigError(f"a reply has no metric {key!r}, which weighs the clients")
