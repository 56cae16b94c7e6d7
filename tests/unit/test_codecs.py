"""Codec objects: sizes, windows, what they hand to the ops. The ops' bits are in tests/native."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.codecs import BlockCodec, Codec, ExactCodec, LocoCodec, Window, derive_seed
from commrt.errors import ConfigError

CODECS = [
    *(BlockCodec(bits=bits, block=32) for bits in (1, 2, 4, 8)),
    BlockCodec(bits=4, block=32, rounding="stochastic"),
    *(LocoCodec(bits=bits, block=32) for bits in (1, 2, 4, 8)),
    LocoCodec(bits=4, block=32, residual=4, rounding="stochastic"),
    ExactCodec(block=32),
]


def spec_of(codec: Codec) -> str:
    return codec.spec


def encode(codec: Codec, flat: Tensor, seed: int = 0, residual: Tensor | None = None) -> Tensor:
    num_blocks = codec.num_blocks(flat.numel())
    payload = torch.full((codec.payload_bytes(num_blocks),), 0xA5, dtype=torch.uint8)
    if residual is None:
        residual = torch.zeros(codec.residual_bytes(flat.numel()), dtype=torch.uint8)
    codec.encode(flat, payload, Window(0, num_blocks, 0), residual=residual, seed=seed)
    return payload


def decode(codec: Codec, payload: Tensor, numel: int) -> Tensor:
    flat = torch.full((numel,), 42.0)
    codec.decode(payload, flat, Window(0, codec.num_blocks(numel), 0))
    return flat


@pytest.mark.parametrize("codec", CODECS, ids=spec_of)
@pytest.mark.parametrize("numel", [0, 1, 31, 33, 500])
def test_decoding_comes_near(codec: Codec, numel: int) -> None:
    """And every element of the output is written."""
    flat = torch.linspace(-1, 1, numel)
    error = (decode(codec, encode(codec, flat), numel) - flat).abs()
    assert error.le(0.0 if isinstance(codec, ExactCodec) else 1.0).all()


@pytest.mark.parametrize("codec", CODECS, ids=spec_of)
def test_windows_land_where_they_should(codec: Codec) -> None:
    """Payload, residual and output: bit-identical to one call for all blocks."""
    flat = torch.linspace(-1, 1, 250)
    residual = torch.zeros(codec.residual_bytes(250), dtype=torch.uint8)
    expected = decode(codec, encode(codec, flat, seed=3), 250)
    parts = torch.full((250,), 42.0)
    for first, count in ((5, 3), (0, 4), (4, 1)):
        payload = torch.zeros(codec.payload_bytes(6), dtype=torch.uint8)
        codec.encode(flat, payload, Window(first, count, 2), residual=residual, seed=3)
        codec.decode(payload, parts, Window(first, count, 2))
    assert torch.equal(parts, expected)


def test_exact_payloads_are_fp32_values_padded_with_zeros() -> None:
    codec = ExactCodec(block=32)
    flat = torch.linspace(-1, 1, 40, dtype=torch.bfloat16)
    payload = encode(codec, flat).view(torch.float32)
    assert torch.equal(payload[:40], flat.float())
    assert torch.equal(payload[40:], torch.zeros(24))


@pytest.mark.parametrize(
    "target", [BlockCodec(bits=8, block=32), ExactCodec(block=32)], ids=spec_of
)
def test_encode_average(target: Codec) -> None:
    """Payload: bit-identical to that of the mean."""
    source = LocoCodec(bits=4, block=32)
    flats = torch.linspace(-1, 1, 3 * 96).view(3, 96)
    payloads = torch.stack([encode(source, flat) for flat in flats])
    mean = torch.zeros(96)
    ops.decode_average(payloads, mean, source.fmt)
    output = torch.zeros(target.payload_bytes(3), dtype=torch.uint8)
    target.encode_average(payloads, source, output)
    assert torch.equal(output, encode(target, mean))


@pytest.mark.parametrize(
    ("codec", "payload_bytes", "residual_bytes"),
    [
        (BlockCodec(bits=1), 18, 0),
        (BlockCodec(bits=8, block=1024), 1026, 0),
        (LocoCodec(bits=4), 66, 130),
        (LocoCodec(bits=2, residual=4), 34, 66),
        (ExactCodec(), 512, 0),
    ],
    ids=str,
)
def test_sizes(codec: Codec, payload_bytes: int, residual_bytes: int) -> None:
    """Of one block, and of as many as a tensor needs."""
    assert codec.payload_bytes(1) == payload_bytes
    assert codec.payload_bytes(7) == 7 * payload_bytes
    assert codec.residual_bytes(codec.block) == residual_bytes
    assert codec.residual_bytes(6 * codec.block + 1) == 7 * residual_bytes
    assert codec.residual_bytes(0) == 0


def test_loco4_sends_at_most_four_and_a_quarter_bits_an_element() -> None:
    codec = LocoCodec(bits=4)
    assert encode(codec, torch.ones(1 << 14)).numel() * 8 / (1 << 14) <= 4.25


@pytest.mark.parametrize(
    ("bits", "levels", "beta"),
    [(1, "mean", 0.95), (2, "mean", 0.95), (4, "absmax", 0.8), (8, "absmax", 0.8)],
)
def test_defaults_follow_the_bits(bits: int, levels: str, beta: float) -> None:
    assert BlockCodec(bits=bits).levels == levels
    assert LocoCodec(bits=bits).fmt.levels == levels
    assert LocoCodec(bits=bits).beta == beta
    assert LocoCodec(bits=bits, beta=0.5).beta == 0.5


def test_the_seed_counts_only_where_rounding_is_stochastic() -> None:
    flat = torch.linspace(-1, 1, 500)
    for codec in CODECS:
        is_same = torch.equal(encode(codec, flat, seed=1), encode(codec, flat, seed=2))
        assert is_same == ("rounding=stochastic" not in codec.spec)
        assert torch.equal(encode(codec, flat, seed=1), encode(codec, flat, seed=1))


def test_loco_hands_its_settings_to_the_op() -> None:
    """Payload and residual: bit-identical to the op's, over two steps."""
    codec = LocoCodec(bits=4, block=32, beta=0.5, residual=4, rounding="stochastic")
    flat = torch.linspace(-1, 1, 500)
    residual = torch.zeros(codec.residual_bytes(500), dtype=torch.uint8)
    expected_residual, expected = residual.clone(), torch.zeros(16 * 18, dtype=torch.uint8)
    for seed in (3, 4):
        payload = encode(codec, flat, seed, residual)
        ops.loco_encode(
            flat,
            expected_residual,
            expected,
            codec.fmt,
            beta=0.5,
            residual_bits=4,
            stochastic=True,
            seed=seed,
        )
        assert torch.equal(payload, expected)
        assert torch.equal(residual, expected_residual)
    error, wanted = torch.zeros(500), torch.zeros(500)
    codec.decode_residual(residual, error)
    ops.block_decode(residual, wanted, ops.BlockFormat(bits=4, block=32))
    assert torch.equal(error, wanted)
    assert error.abs().sum() > 0


def test_reset_comes_every_so_many_steps_but_never_first() -> None:
    codec = LocoCodec(bits=4, reset=3)
    assert [step for step in range(10) if codec.is_reset(step)] == [3, 6, 9]
    assert not any(LocoCodec(bits=4).is_reset(step) for step in range(2000))


@pytest.mark.parametrize("codec", CODECS, ids=spec_of)
def test_codecs_are_values(codec: Codec) -> None:
    assert dataclasses.is_dataclass(codec)
    assert codec == dataclasses.replace(codec)
    assert hash(codec) == hash(dataclasses.replace(codec))
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.block = 64


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (BlockCodec, {"bits": 3}, r"bits=3: must be one of \(1, 2, 4, 8\)"),
        (BlockCodec, {"bits": 4, "block": 100}, r"block=100: must be one of \(32, 64"),
        (BlockCodec, {"bits": 4, "levels": "mean"}, "levels='mean' with bits=4: only 1 and 2 bits"),
        (BlockCodec, {"bits": 1, "levels": "absmax"}, "levels='absmax' with bits=1"),
        (BlockCodec, {"bits": 4, "rounding": "up"}, r"rounding='up': must be one of \('nearest', "),
        (BlockCodec, {"bits": 1, "rounding": "stochastic"}, "bits=1: needs 2, 4 or 8 bits"),
        (LocoCodec, {"bits": 3}, "bits=3: must be one of"),
        (LocoCodec, {"bits": 4, "beta": 1.0}, r"beta=1.0: must be in \[0, 1\)"),
        (LocoCodec, {"bits": 4, "beta": -1e-9}, r"beta=-1e-09: must be in \[0, 1\)"),
        (LocoCodec, {"bits": 4, "beta": float("nan")}, r"beta=nan: must be in \[0, 1\)"),
        (LocoCodec, {"bits": 4, "residual": 2}, "residual=2: must be 4 or 8"),
        (LocoCodec, {"bits": 4, "reset": -1}, r"reset=-1: must be 0 \(never\)"),
    ],
)
def test_bad_settings_are_named(
    kind: type[BlockCodec], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_derived_seeds_are_the_same_everywhere_and_differ() -> None:
    """The constant is what blake2b gives on any machine; every seed fits the ops' range."""
    assert derive_seed("layer.weight", 7, 0) == 4_712_127_765_132_440_701
    seeds = {derive_seed(name, step) for name in ("a", "b", "ab") for step in range(300)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("a", "bc") != derive_seed("ab", "c")
    assert derive_seed(1) != derive_seed("1")
