"""Spec strings: what users type, and what they are told when it is wrong."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commrt.codecs import (
    BlockCodec,
    Codec,
    DeltaCodec,
    ExactCodec,
    LocoCodec,
    NoopCodec,
    parse,
    with_block,
)
from commrt.errors import ConfigError
from commrt.ops.format import BLOCKS, MAX_BETA

BITS_AND_LEVELS = [(1, "mean"), (2, "mean"), (2, "absmax"), (4, "absmax"), (8, "absmax")]


@st.composite
def codecs(draw: st.DrawFn) -> Codec:
    bits, levels = draw(st.sampled_from(BITS_AND_LEVELS))
    roundings = ["nearest"] if bits == 1 else ["nearest", "stochastic"]
    shared: dict[str, Any] = {
        "bits": bits,
        "block": draw(st.sampled_from(BLOCKS)),
        "levels": levels,
        "rounding": draw(st.sampled_from(roundings)),
    }
    if draw(st.booleans()):
        return BlockCodec(**shared)
    return LocoCodec(
        **shared,
        beta=draw(st.floats(0, MAX_BETA)),
        residual=draw(st.sampled_from((4, 8))),
        reset=draw(st.integers(0, 10**9)),
    )


@given(
    codec=codecs()
    | st.just(ExactCodec())
    | st.just(NoopCodec())
    | st.builds(DeltaCodec, bits=st.sampled_from((2, 4, 8)), block=st.sampled_from(BLOCKS))
)
def test_a_codec_survives_its_spec(codec: Codec) -> None:
    assert parse(codec.spec) == codec
    assert parse(codec.spec).spec == codec.spec


@pytest.mark.parametrize(
    ("spec", "codec"),
    [
        ("none", ExactCodec()),
        ("noop", NoopCodec()),
        ("block8", BlockCodec(bits=8)),
        ("block4:block=64", BlockCodec(bits=4, block=64)),
        ("block2:levels=absmax", BlockCodec(bits=2, levels="absmax")),
        ("block4:rounding=stochastic", BlockCodec(bits=4, rounding="stochastic")),
        ("delta4", DeltaCodec(bits=4, block=128)),
        ("delta8:block=32", DeltaCodec(bits=8, block=32)),
        ("loco1", LocoCodec(bits=1)),
        ("loco2:beta=0.9", LocoCodec(bits=2, beta=0.9)),
        ("loco4", LocoCodec(bits=4, block=128, beta=0.8, residual=8, reset=0)),
        ("loco4:beta=0", LocoCodec(bits=4, beta=0.0)),
        (
            "loco4:residual=4,reset=512,block=256",
            LocoCodec(bits=4, residual=4, reset=512, block=256),
        ),
    ],
)
def test_what_a_spec_means(spec: str, codec: Codec) -> None:
    assert parse(spec) == codec
    assert type(parse(spec)) is type(codec)


def test_a_block_codec_is_not_a_loco_codec() -> None:
    assert parse("loco4") != parse("block4")


def test_noop_is_not_none() -> None:
    assert parse("noop") != parse("none")
    assert with_block("noop", 64) == NoopCodec(block=64)


def test_a_codec_is_returned_as_it_is() -> None:
    codec = LocoCodec(bits=2)
    assert parse(codec) is codec
    assert with_block(codec, 64) is codec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "codec='': must be a spec such as 'loco4'"),
        ("loco", "codec='loco': must be a spec such as 'loco4'"),
        ("4", "codec='4': must be a spec such as"),
        ("qsgd4", "codec='qsgd4': must be a spec such as"),
        ("LoCo4", "codec='LoCo4': must be a spec such as"),
        (" loco4", "codec=' loco4': must be a spec such as"),
        ("loco4\n", r"codec='loco4\\n': must be a spec such as"),
        ("loco-4", "codec='loco-4': must be a spec such as"),
        ("loco4;block=64", "codec='loco4;block=64': must be a spec such as"),
        ("none:block=64", "codec='none:block=64': must be a spec such as"),
        ("noop:block=64", "codec='noop:block=64': must be a spec such as"),
        ("noop1", "codec='noop1': must be a spec such as"),
        (None, "codec=None: must be a spec string such as 'loco4'.*or a Codec"),
        (4, "codec=4: must be a spec string such as"),
        (b"loco4", "codec=b'loco4': must be a spec string such as"),
        ("loco3", r"codec='loco3' has 3 bits: must be one of \(1, 2, 4, 8\)"),
        ("block16", r"codec='block16' has 16 bits: must be one of \(1, 2, 4, 8\)"),
        ("loco4:size=64", r"option 'size': must be one of \['beta', 'block', 'levels', 'res"),
        ("block4:beta=0.9", r"option 'beta': must be one of \['block', 'levels', 'rounding'\]"),
        ("loco4:bits=8", "option 'bits': must be one of"),
        ("loco4:fmt=x", "option 'fmt': must be one of"),
        ("loco4:block=64,", "option '': must be one of"),
        ("loco4:block=many", "codec='loco4:block=many': block='many' is not a number"),
        ("loco4:block=", "block='' is not a number"),
        ("loco4:block", "block='' is not a number"),
        ("loco4:block=64.0", "block='64.0' is not a number"),
        ("loco4:beta=high", "beta='high' is not a number"),
        ("loco4:reset=1.5", "reset='1.5' is not a number"),
        ("loco4:block=100", r"block=100: must be one of \(32, 64, 128, 256, 512, 1024\)"),
        ("loco4:levels=mean", "levels='mean' with bits=4: only 1 and 2"),
        ("loco1:levels=absmax", "levels='absmax' with bits=1"),
        ("loco4:levels=max", r"levels='max': must be one of \('absmax', 'mean'\)"),
        ("loco4:rounding=down", r"rounding='down': must be one of \('nearest', 'stochastic'\)"),
        ("loco1:rounding=stochastic", "rounding='stochastic' with bits=1: needs 2, 4 or 8"),
        ("loco4:levels=", "'levels' must have one value"),
        ("loco4:block=64,block=128", "'block' must have one value"),
        ("loco04", "must be a spec such as"),
        ("loco4:", "must be a spec such as"),
        ("loco4:beta=1", r"beta=1.0: must be in \[0, 1\)"),
        ("loco4:beta=nan", r"beta=nan: must be in \[0, 1\)"),
        ("loco4:residual=16", "residual=16: must be 4 or 8"),
        ("loco4:reset=-1", "reset=-1: must be 0"),
    ],
)
def test_what_is_wrong_is_named(spec: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "block"),
    [
        ("loco4", 64),
        ("loco4:beta=0.9", 64),
        ("block8", 64),
        ("none", 64),
        ("noop", 64),
        ("loco4:block=256", 256),
        ("loco4:beta=0.9,block=256", 256),
    ],
)
def test_with_block_fills_in_what_is_left_open(spec: str, block: int) -> None:
    codec = with_block(spec, 64)
    assert codec.block == block
    assert type(codec) is type(parse(spec))
    if "beta" in spec:
        assert isinstance(codec, LocoCodec)
        assert codec.beta == 0.9


@pytest.mark.parametrize(
    ("spec", "block", "message"),
    [
        ("loco4", 100, "block=100: must be one of"),
        ("loco5", 64, "has 5 bits: must be one of"),
        ("", 64, "must be a spec such as"),
        ("loco4:size=3", 64, "option 'size': must be one of"),
    ],
)
def test_with_block_names_what_is_wrong(spec: str, block: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_block(spec, block)
