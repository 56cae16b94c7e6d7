"""Codecs: tensors to payloads and back. They know nothing of process groups or MPI."""

from commrt.codecs.base import Codec, Window, derive_seed
from commrt.codecs.block import BlockCodec
from commrt.codecs.exact import ExactCodec, NoopCodec
from commrt.codecs.loco import LocoCodec
from commrt.codecs.spec import parse, with_block

__all__ = [
    "BlockCodec",
    "Codec",
    "ExactCodec",
    "LocoCodec",
    "NoopCodec",
    "Window",
    "derive_seed",
    "parse",
    "with_block",
]
