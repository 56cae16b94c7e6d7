"""Codecs: tensors to payloads and back. They know nothing of process groups or MPI."""

from commrt.codecs.base import BlockwiseCodec, Codec, Window, derive_seed
from commrt.codecs.block import BlockCodec
from commrt.codecs.delta import DeltaCodec
from commrt.codecs.exact import ExactCodec, NoopCodec
from commrt.codecs.loco import LocoCodec
from commrt.codecs.lowrank import LowRankCodec, matrix_shape, orthonormal
from commrt.codecs.spec import parse, with_block

__all__ = [
    "BlockCodec",
    "BlockwiseCodec",
    "Codec",
    "DeltaCodec",
    "ExactCodec",
    "LocoCodec",
    "LowRankCodec",
    "NoopCodec",
    "Window",
    "derive_seed",
    "matrix_shape",
    "orthonormal",
    "parse",
    "with_block",
]
