"""Federated uplinks: clients' updates in few bytes, of which a server decodes the mean."""
