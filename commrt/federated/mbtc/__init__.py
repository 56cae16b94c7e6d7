"""MBTC: a cohort's updates as one lossy source, coded separately and decoded jointly."""

from commrt.federated.mbtc.spec import Mbtc

__all__ = ["Mbtc"]
