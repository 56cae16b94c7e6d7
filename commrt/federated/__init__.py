"""The federated uplink: what clients send of their updates, and how the server reads it."""
