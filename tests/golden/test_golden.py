"""Payloads and residuals of every format are, byte for byte, those of the files beside this one.

A difference means that ranks of two versions cannot talk to each other, and that residuals in old
checkpoints are misread. See tests/golden/make.py.
"""

import json

import pytest
import torch

from commrt.codecs import BlockCodec, LocoCodec, parse
from tests.golden import make
from tests.native.cases import KINDS

BLOCK = json.loads(make.BLOCK_FILE.read_text())
LOCO = json.loads(make.LOCO_FILE.read_text())


@pytest.mark.parametrize("spec", make.BLOCK_SPECS)
def test_block_payload(spec: str) -> None:
    assert make.block_payload(spec) == BLOCK[spec]


@pytest.mark.parametrize("spec", make.LOCO_SPECS)
def test_loco_payload_and_residual(spec: str) -> None:
    assert make.loco_steps(spec) == LOCO[spec]


def test_every_format_is_there_and_nothing_else() -> None:
    assert set(BLOCK) == set(make.BLOCK_SPECS)
    assert set(LOCO) == set(make.LOCO_SPECS)
    blocks = [parse(spec) for spec in BLOCK]
    assert {(c.bits, c.levels) for c in blocks if isinstance(c, BlockCodec)} == set(KINDS)
    locos = [codec for codec in map(parse, LOCO) if isinstance(codec, LocoCodec)]
    assert {codec.bits for codec in locos} == {1, 2, 4, 8}
    assert {codec.residual for codec in locos} == {4, 8}


def test_the_input_is_what_it_was() -> None:
    """Exact numbers, so that a failure above is the codec's."""
    first = [-1.0, 1980281 / 2**24, -4428045 / 2**25, 5940845 / 2**26]
    assert make.gradient(32, 0)[:4].tolist() == first
    assert make.gradient(32, 0).isinf().nonzero().tolist() == [[67]]
    assert torch.equal(make.gradient(32, 0)[32:64], torch.zeros(32))
    assert not torch.equal(make.gradient(32, 0)[:32], make.gradient(32, 1)[:32])
