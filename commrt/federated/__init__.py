"""The federated uplink: what clients send of their updates, and how the server reads it.

    >>> uplink = parse_uplink("mbtc:bits=0.5")
    >>> layout = Layout.of(model.state_dict())
    >>> server, client = uplink.server(layout), uplink.client(layout, 7)
    >>> parameters = server.begin(0, cohort=[7])            # bytes, to go with the model
    >>> payload = client.encode(0, update, parameters[7])   # bytes, what the uplink carries
    >>> server.receive(7, payload)
    >>> mean = server.finish().mean

See :mod:`commrt.federated.uplink` for what the two ends promise.
"""

from commrt.federated.layout import Layout
from commrt.federated.parsing import parse_uplink
from commrt.federated.uplink import Aggregate, Client, Server, Traffic, Uplink

__all__ = ["Aggregate", "Client", "Layout", "Server", "Traffic", "Uplink", "parse_uplink"]
