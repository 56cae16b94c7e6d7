"""Codecs that others have published, each client on its own: what the uplink is compared with."""

from commrt.federated.baselines.blockwise import BlockwiseCodec
from commrt.federated.baselines.correlated import CorrelatedCodec, SpreadCodec
from commrt.federated.baselines.eden import EdenCodec
from commrt.federated.baselines.floats import FloatCodec
from commrt.federated.baselines.pvq import PvqCodec
from commrt.federated.baselines.qsgd import QsgdCodec
from commrt.federated.baselines.sign import SignCodec
from commrt.federated.baselines.spec import parse_baseline
from commrt.federated.baselines.topk import TopKCodec

__all__ = [
    "BlockwiseCodec",
    "CorrelatedCodec",
    "EdenCodec",
    "FloatCodec",
    "PvqCodec",
    "QsgdCodec",
    "SignCodec",
    "SpreadCodec",
    "TopKCodec",
    "parse_baseline",
]
