"""loco_encode: payloads and residuals are bit-identical on every path; nothing may differ."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import FLOAT_DTYPES, BlockFormat
from tests.native import cases
from tests.native.cases import (
    assert_same_bits,
    blocks,
    decode,
    empty_payload,
    empty_residual,
    encode,
    floats,
    format_id,
    unpack,
)

BLOCK4 = BlockFormat(bits=4, block=32)
VARIANTS = list(itertools.product(FLOAT_DTYPES, (8, 4), (False, True)))


def loco(grad: Tensor, residual: Tensor, fmt: BlockFormat, **options: Any) -> Tensor:
    """The payload of a whole gradient, the same from every path; updates the residual."""
    payload = empty_payload(fmt, fmt.num_blocks(grad.numel()))
    cases.run_everywhere(ops.loco_encode, grad, residual, payload, fmt, **options)
    return payload


def decode_residual(residual: Tensor, bits: int, block: int, numel: int) -> Tensor:
    return decode(residual, BlockFormat(bits=bits, block=block), numel)


@pytest.mark.parametrize("fmt", cases.formats(), ids=format_id)
def test_every_path_equals_the_specification(fmt: BlockFormat) -> None:
    """Payload and residual: bit-identical over three steps, for every dtype, size and option."""
    sizes, betas = itertools.cycle(cases.sizes(fmt.block)), itertools.cycle((0.8, 0.0, 0.95))
    for dtype, residual_bits, stochastic in VARIANTS:
        for numel in (next(sizes), next(sizes)):
            residual = empty_residual(residual_bits, fmt.block, numel)
            for step in range(3):
                loco(
                    cases.sample(numel, fmt.block, dtype, seed=3 * step + 1),
                    residual,
                    fmt,
                    beta=next(betas),
                    residual_bits=residual_bits,
                    stochastic=stochastic and fmt.bits > 1,
                    seed=step,
                )


@pytest.mark.parametrize("value", [-1e-40, 1e-40])
@pytest.mark.parametrize("fmt", cases.formats((32,)), ids=format_id)
def test_a_block_too_small_for_a_scale_is_sent_as_zero(fmt: BlockFormat, value: float) -> None:
    """Payload: the bytes of a block of zeros; the residual keeps nothing so small either."""
    residual = empty_residual(8, 32, 40)
    payload = loco(torch.full((40,), value), residual, fmt)
    assert torch.equal(payload, encode(torch.zeros(40), fmt))
    assert residual.eq(0).all()


@settings(max_examples=60)
@given(
    grads=st.tuples(floats(), floats()),
    kind=st.sampled_from(cases.KINDS),
    residual_bits=st.sampled_from((8, 4)),
    beta=st.floats(0, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_no_residual_ever_holds_a_non_finite_number(
    grads: tuple[Tensor, Tensor],
    kind: tuple[int, str],
    residual_bits: int,
    beta: float,
    seed: int,
) -> None:
    """Exactly the blocks of g + e that are not finite are sent as NaN and keep their residual.

    Payload and residual: bit-identical on every path.
    """
    fmt = BlockFormat(bits=kind[0], block=32, levels=kind[1])
    residual_fmt = BlockFormat(bits=residual_bits, block=32)
    numel = max(grad.numel() for grad in grads)
    residual = empty_residual(residual_bits, 32, numel)
    for grad in grads:
        grad = torch.nn.functional.pad(grad, (0, numel - grad.numel()))
        compensated = grad + decode_residual(residual, residual_bits, 32, numel)
        is_finite_B = blocks(compensated, 32).isfinite().all(dim=1)
        before_codes, before_scale = unpack(residual.clone(), residual_fmt)
        payload = loco(grad, residual, fmt, beta=beta, residual_bits=residual_bits, seed=seed)
        _, scale_B = unpack(payload, fmt)
        assert torch.equal(scale_B.isfinite(), is_finite_B)
        is_nan = (~is_finite_B).repeat_interleave(32)[:numel]
        assert torch.equal(decode(payload, fmt, numel).isnan(), is_nan)
        codes, scale = unpack(residual, residual_fmt)
        assert torch.equal(codes[~is_finite_B], before_codes[~is_finite_B])
        assert_same_bits(scale[~is_finite_B], before_scale[~is_finite_B])
        assert decode_residual(residual, residual_bits, 32, numel).isfinite().all()


@pytest.mark.parametrize("fmt", cases.formats((64,)), ids=format_id)
@pytest.mark.parametrize(("dtype", "residual_bits", "stochastic"), VARIANTS)
def test_windows_give_what_one_call_gives(
    fmt: BlockFormat, dtype: torch.dtype, residual_bits: int, stochastic: bool
) -> None:
    """Payload and residual: bit-identical; bytes outside the windows stay."""
    numel, total = 7 * 64 - 9, 7
    residual_fmt = BlockFormat(bits=residual_bits, block=64)
    start = encode(torch.linspace(-0.3, 0.5, numel), residual_fmt)
    grad = cases.sample(numel, 64, dtype, seed=2)
    options: dict[str, Any] = {
        "residual_bits": residual_bits,
        "stochastic": stochastic and fmt.bits > 1,
        "seed": 11,
    }
    whole_residual = start.clone()
    whole = unpack(loco(grad, whole_residual, fmt, **options), fmt)
    whole_state = unpack(whole_residual, residual_fmt)
    residual, payload = start.clone(), empty_payload(fmt, total + 2)
    expected = unpack(payload.clone(), fmt)
    expected_state = unpack(start.clone(), residual_fmt)
    for first, count in ((4, 2), (0, 3), (6, 1)):
        cases.run_everywhere(
            ops.loco_encode,
            grad,
            residual,
            payload,
            fmt,
            first_block=first,
            num_blocks=count,
            at_block=first + 2,
            **options,
        )
        for into, source in zip(expected, whole, strict=True):
            into[first + 2 : first + 2 + count] = source[first : first + count]
        for into, source in zip(expected_state, whole_state, strict=True):
            into[first : first + count] = source[first : first + count]
        for actual, wanted in zip(
            (*unpack(payload, fmt), *unpack(residual, residual_fmt)),
            (*expected, *expected_state),
            strict=True,
        ):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", cases.formats((32, 1024)), ids=format_id)
@pytest.mark.parametrize("residual_bits", [8, 4])
def test_unaligned_pointers(fmt: BlockFormat, residual_bits: int) -> None:
    """Payload and residual: bit-identical to the aligned ones, where no address is aligned."""
    aligned = empty_residual(residual_bits, fmt.block, 3001)
    residual = cases.unaligned(aligned)
    for step, dtype in enumerate(FLOAT_DTYPES):
        grad = cases.sample(3001, fmt.block, dtype, seed=step)
        expected = loco(grad, aligned, fmt, residual_bits=residual_bits)
        payload = cases.unaligned(torch.zeros_like(expected))
        cases.run_everywhere(
            ops.loco_encode,
            cases.unaligned(grad),
            residual,
            payload,
            fmt,
            residual_bits=residual_bits,
        )
        assert torch.equal(payload, expected)
        assert torch.equal(residual, aligned)


@pytest.mark.parametrize("fmt", cases.formats((64,)), ids=format_id)
def test_an_empty_residual_sends_what_block_encode_sends(fmt: BlockFormat) -> None:
    """Payload: bit-identical to block_encode's with the same seed."""
    flat = cases.sample(3001, 64, torch.float32, seed=0)
    seed = None if fmt.bits == 1 else 3
    payload = loco(
        flat, empty_residual(8, 64, 3001), fmt, stochastic=seed is not None, seed=seed or 0
    )
    assert torch.equal(payload, encode(flat, fmt, seed))


@pytest.mark.parametrize("beta", [0.0, 0.8])
@pytest.mark.parametrize("fmt", cases.formats((64,)), ids=format_id)
def test_the_residual_is_the_moving_average_of_what_was_missed(
    fmt: BlockFormat, beta: float
) -> None:
    """Stored e is within half its scale of beta e + (1 - beta)(h - Q(h)).

    At beta = 0 that is classic error feedback: e is h - Q(h).
    """
    numel, residual_fmt = 1000, BlockFormat(bits=8, block=64)
    generator = torch.Generator().manual_seed(0)
    residual = empty_residual(8, 64, numel)
    error = torch.zeros(numel, dtype=torch.float64)
    beta32 = torch.tensor(beta).double()
    for _ in range(5):
        grad = torch.randn(numel, generator=generator)
        sent = decode(loco(grad, residual, fmt, beta=beta), fmt, numel).double()
        exact = beta32 * error + (1 - beta32) * (grad + error - sent)
        error = decode_residual(residual, 8, 64, numel).double()
        half_scale = unpack(residual, residual_fmt)[1].double().repeat_interleave(64)[:numel] / 2
        assert ((error - exact).abs() <= half_scale + 1e-6).all()


def trajectory(
    fmt: BlockFormat, *, num_steps: int, seed: int, beta: float = 0.8, **options: Any
) -> tuple[Tensor, Tensor]:
    """What was lost in ``num_steps`` random steps, and the stored scales of e, (steps, N), in fp64.

    e <- beta e + (1 - beta)(h - Q(h)) + d, where d is the rounding of e as it is stored, adds up to
    sum of Q(h) + e / (1 - beta) - sum of g = sum of d / (1 - beta): that is what was lost.
    """
    numel, residual_bits = 512, options.get("residual_bits", 8)
    residual_fmt = BlockFormat(bits=residual_bits, block=fmt.block)
    generator = torch.Generator().manual_seed(1)
    residual = empty_residual(residual_bits, fmt.block, numel)
    payload = empty_payload(fmt, fmt.num_blocks(numel))
    output, lost = torch.empty(numel), torch.zeros(numel, dtype=torch.float64)
    scales = torch.empty(num_steps, residual_fmt.num_blocks(numel))
    for step in range(num_steps):
        grad = torch.randn(numel, generator=generator) * (1 + step % 3)
        step_seed = seed * num_steps + step
        ops.loco_encode(grad, residual, payload, fmt, beta=beta, seed=step_seed, **options)
        ops.block_decode(payload, output, fmt)
        lost += output.double() - grad.double()
        scales[step] = unpack(residual, residual_fmt)[1]
    ops.block_decode(residual, output, residual_fmt)
    lost += output.double() / (1 - torch.tensor(beta).double())
    return lost, scales.double().repeat_interleave(fmt.block, dim=1)


def conserving() -> Iterator[object]:
    for fmt in cases.formats((128,)):
        for beta in (0.8, 0.0):
            yield pytest.param(fmt, beta, False, id=f"{format_id(fmt)}-{beta}")
    yield pytest.param(BLOCK4, 0.8, True, id="4bit-stochastic")


@pytest.mark.parametrize(("fmt", "beta", "stochastic"), [*conserving()])
def test_nothing_is_lost_in_1000_steps(fmt: BlockFormat, beta: float, stochastic: bool) -> None:
    """Sum of Q(h) + e / (1 - beta) = sum of g, up to the rounding of e in storage.

    Each step rounds e by at most half its scale, so the difference is at most the sum of these
    halves over 1 - beta. Independent roundings, uniform over a scale, do not add up to that but to
    a random walk of variance sum of scale^2 / 12: the difference measured is of that size.
    """
    lost, scales = trajectory(fmt, num_steps=1000, seed=0, beta=beta, stochastic=stochastic)
    bound = scales.sum(dim=0) / 2 / (1 - beta)
    walk = (scales.square().sum(dim=0) / 12).sqrt() / (1 - beta)
    assert (lost.abs() <= bound).all()
    ratio = (lost / walk).square().mean().sqrt()
    assert 0.7 < ratio < 1.3
    assert (walk < bound / 20).all()


def test_nothing_is_lost_on_average_by_the_4_bit_residual() -> None:
    """Stochastic rounding of e: over 40 seeds what is lost averages out as independent draws do.

    A step's draw has a variance of at most scale^2 / 4, so the mean over seeds has the root mean
    square of a random walk with that variance over sqrt(40), at most.
    """
    num_seeds = 40
    runs = [
        trajectory(BLOCK4, num_steps=100, seed=seed, residual_bits=4) for seed in range(num_seeds)
    ]
    lost = torch.stack([run[0] for run in runs])
    walk = torch.stack([run[1] for run in runs]).square().sum(dim=1).div(4).sqrt() / (1 - 0.8)
    assert (lost.abs() < 6 * walk).all()
    spread = lost.square().mean().sqrt()
    mean = lost.mean(dim=0).square().mean().sqrt()
    assert 0.4 * walk.mean() < spread < walk.mean()
    assert mean < 1.3 * spread / num_seeds**0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.0}, r"beta=1.0: must be in \[0, 1\)"),
        ({"beta": -0.1}, r"beta=-0.1: must be in \[0, 1\)"),
        ({"beta": float("nan")}, r"beta=nan: must be in \[0, 1\)"),
        ({"residual_bits": 2}, "residual_bits=2: must be 4 or 8"),
        ({"residual_bits": 4}, "residual has 68 bytes: must be 36"),
        ({"residual": torch.zeros(34, dtype=torch.uint8)}, "residual has 34 bytes: must be 68"),
        ({"residual": torch.zeros(68)}, r"residual is torch.float32 \(68,\): must be 1-D uint8"),
        ({"grad": torch.zeros(64, dtype=torch.int64)}, "int64: must be one of"),
        ({"grad": torch.zeros(128)[::2]}, r"\(64,\): must be 1-D and contiguous"),
        ({"payload": torch.zeros(35, dtype=torch.uint8)}, "35 bytes: must be a multiple of 18"),
        ({"payload": torch.zeros(18, dtype=torch.uint8)}, r"\[0, 2\) do not lie in a payload of 1"),
        ({"first_block": 3}, r"\[3, 2\) do not lie in a tensor of 2"),
        ({"num_blocks": 3}, r"\[0, 3\) do not lie in a tensor of 2"),
        ({"at_block": 1}, r"\[1, 3\) do not lie in a payload of 2"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    """A ConfigError with the value and what is allowed; nothing is written."""
    residual, payload = empty_residual(8, 32, 64), empty_payload(BLOCK4, 2)
    arguments: dict[str, Any] = {
        "grad": torch.ones(64),
        "residual": residual,
        "payload": payload,
        "fmt": BLOCK4,
    }
    with pytest.raises(ConfigError, match=message):
        ops.loco_encode(**(arguments | change))
    assert residual.eq(0).all()
    assert payload.eq(cases.FILL).all()


def test_one_bit_cannot_be_stochastic() -> None:
    fmt = BlockFormat(bits=1, block=32, levels="mean")
    with pytest.raises(ConfigError, match="bits=1: needs 2, 4 or 8"):
        ops.loco_encode(
            torch.zeros(32),
            empty_residual(8, 32, 32),
            empty_payload(fmt, 1),
            fmt,
            stochastic=True,
        )
