"""patch_encode, patch_apply_: weights arrive to the bit; patches are the same bytes everywhere.

Tensors are made of random bits: NaNs of every kind, infinities, subnormals and both zeros.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops.format import FLOAT_DTYPES
from commrt.ops.patches import header_bytes
from tests.native import cases
from tests.native.test_threads import threads

SIZES = (0, 1, 2, 7, 70, 1023, 1024, 1025, 5 * 1024 + 3)
SHARES = (0.0, 0.001, 0.08, 0.4, 1.0)
SPECIAL = (0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan)


def as_int(flat: Tensor) -> Tensor:
    return flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])


def random_bits(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def changed(old: Tensor, share: float, seed: int) -> Tensor:
    """Bits moved up or down by up to ten, and a tenth of them to anything."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(old.numel(), generator=generator)
    near = torch.randint(-10, 11, (old.numel(),), generator=generator)
    anything = as_int(random_bits(old.numel(), old.dtype, seed + 1))
    bits = torch.where(kind < share, as_int(old) + near, as_int(old)).to(anything.dtype)
    return torch.where(kind < share / 10, anything, bits).view(old.dtype)


def stepped(numel: int, learning_rate: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights after and before a step of Adam, whose updates have a size of about 0.3."""
    generator = torch.Generator().manual_seed(0)
    master = 0.02 * torch.randn(numel, generator=generator)
    update = 0.3 * learning_rate * torch.randn(numel, generator=generator)
    return (master - update).to(dtype), master.to(dtype)


def empty_payload(flat: Tensor) -> Tensor:
    capacity = ops.patch_capacity(flat.numel(), flat.dtype)
    return torch.full((capacity,), cases.FILL, dtype=torch.uint8)


def encoded(new: Tensor, old: Tensor) -> Tensor:
    payload = empty_payload(new)
    ops.patch_encode(new, old, payload)
    return payload[: ops.patch_bytes(payload)].clone()


def applied(patch: Tensor, old: Tensor) -> Tensor:
    weights = old.clone()
    ops.patch_apply_(weights, patch)
    return weights


def everywhere() -> dict[str, AbstractContextManager[None]]:
    return cases.paths() | {"specification": cases.using_specification()}


def check_everywhere(new: Tensor, old: Tensor) -> Tensor:
    """The patch that every path writes, with nothing behind it; every path applies it."""
    payload = empty_payload(new)
    cases.run_everywhere(ops.patch_encode, new, old, payload)
    patch = payload[: ops.patch_bytes(payload)].clone()
    for path, use in everywhere().items():
        aligned, shifted = old.clone(), cases.unaligned(as_int(old))
        around = shifted.new_empty(0).set_(shifted.untyped_storage())
        with use:
            ops.patch_apply_(aligned, patch)
            ops.patch_apply_(shifted.view(old.dtype), patch)
        assert torch.equal(as_int(aligned), as_int(new)), path
        assert torch.equal(shifted, as_int(new)), path
        assert around[0] == around[-1] == cases.FILL, path
    return patch


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_every_path_equals_the_specification(dtype: torch.dtype, share: float) -> None:
    """Payload: bit-identical; weights: bit-identical to ``new``."""
    for seed, numel in enumerate(SIZES):
        old = random_bits(numel, dtype, seed)
        check_everywhere(changed(old, share, seed), old)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_step_of_many_groups(dtype: torch.dtype) -> None:
    check_everywhere(*stepped(100_000, 1e-5, dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_values_become_each_other(dtype: torch.dtype) -> None:
    special = torch.tensor(SPECIAL, dtype=dtype)
    new, old = special.repeat(len(SPECIAL)), special.repeat_interleave(len(SPECIAL))
    check_everywhere(new.repeat(30), old.repeat(30))
    check_everywhere(-new.repeat(30), old.repeat(30))


def test_the_layout() -> None:
    """Byte by byte, as commrt/ops/patches.py tells it."""
    old = torch.zeros(3 * 1024 + 100, dtype=torch.bfloat16)
    new = old.clone()
    new[1024] = -0.0  # a step down
    as_int(new)[1026] = 1  # a step up
    as_int(new)[1033] = 7
    new[1040] = -1.0  # 0xbf80
    new[-100:] = 1.0  # 0x3f80
    patch = check_everywhere(new, old).tolist()
    at, body = 8 + 4 * 4, 128 + 4 + 4
    total = at + body + 200
    entries = [*[0] * 4, at + 1, *[0] * 3, *[0] * 4, at + body + 2, *[0] * 3]
    assert patch[:at] == [total % 256, total // 256, *[0] * 6, *entries]
    assert patch[at : at + 128] == [0b101, 0b10, 0b1, *[0] * 125]
    assert patch[at + 128 : at + body] == [0x10, 0xFD, 0, 0, 0x80, 0xBF, 0, 0]
    assert patch[at + body :] == [0x80, 0x3F] * 100


def test_nothing_changed() -> None:
    """The header alone."""
    old = random_bits(10_000, torch.bfloat16, seed=0)
    assert encoded(old.clone(), old).numel() == header_bytes(10_000) == 8 + 4 * 10


def test_everything_changed() -> None:
    """All as it is: the capacity, and no more."""
    old, new = (random_bits(1023, torch.bfloat16, seed) for seed in (1, 2))
    assert encoded(new, old).numel() == ops.patch_capacity(1023, torch.bfloat16) == 12 + 2048


@pytest.mark.parametrize(
    ("learning_rate", "most_bits"), [(1e-6, 1.2), (1e-5, 1.5), (1e-4, 3.2), (1e-3, 16.05)]
)
def test_bits_of_a_step(learning_rate: float, most_bits: float) -> None:
    """Of bfloat16 weights, where a raw copy has 16."""
    new, old = stepped(200_000, learning_rate, torch.bfloat16)
    patch = encoded(new, old)
    assert 8 * patch.numel() / 200_000 < most_bits
    assert torch.equal(applied(patch, old), new)


def test_patches_follow_each_other() -> None:
    """Weights that only get patches stay equal to those that are updated."""
    generator = torch.Generator().manual_seed(0)
    master = 0.02 * torch.randn(30_000, generator=generator)
    mirror = master.bfloat16()
    for _ in range(5):
        before = master.bfloat16()
        master -= 1e-4 * torch.randn(30_000, generator=generator)
        ops.patch_apply_(mirror, encoded(master.bfloat16(), before))
        assert torch.equal(mirror, master.bfloat16())


@pytest.mark.parametrize("count", [2, 3, 16])
def test_any_number_of_threads(count: int) -> None:
    """Payload and weights: bit-identical to one thread."""
    new, old = stepped(300_001, 1e-4, torch.bfloat16)
    new[50_000:90_000] = random_bits(40_000, torch.bfloat16, seed=0)
    expected = encoded(new, old)
    with threads(count):
        for _ in range(20):
            assert torch.equal(encoded(new, old), expected)
        assert torch.equal(as_int(applied(expected, old)), as_int(new))


# -- damaged payloads -----------------------------------------------------------------------------


def patch_of(*, is_raw: bool) -> tuple[Tensor, Tensor]:
    """A patch of 1,100 elements, whose last group has 76 of them, and the weights."""
    old = random_bits(1100, torch.bfloat16, seed=0)
    return encoded(changed(old, 1.0 if is_raw else 0.2, seed=1), old), old


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "cut short": lambda patch: patch[:-4],
    "a total past the end": lambda patch: patch.index_add(0, *_byte(1, 16)),
    "a huge total": lambda patch: patch.index_fill(0, torch.tensor(7), 255),
    "a total within the header": lambda patch: patch.index_fill(0, torch.arange(8), 0),
    "a body past the end": lambda patch: patch.index_fill(0, torch.tensor(11), 255),
    "a body within the header": lambda patch: patch.index_fill(0, torch.tensor(9), 0).index_fill(
        0, torch.tensor(8), 5
    ),
    "an unknown kind": lambda patch: patch.index_fill(0, torch.tensor(8), int(patch[8]) | 3),
    "more changes than there are codes": lambda patch: patch.index_fill(
        0, torch.arange(16, 144), 255
    ),
}


def _byte(index: int, value: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([index]), torch.tensor([value], dtype=torch.uint8)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_payloads_raise(kind: str) -> None:
    patch, old = patch_of(is_raw=False)
    damaged = DAMAGE[kind](patch)
    for path, use in everywhere().items():
        if "cuda" in path:  # which does not look
            continue
        with use, pytest.raises(ConfigError, match="payload is damaged"):
            ops.patch_apply_(old.clone(), damaged)


def test_random_damage_raises_or_ends_well() -> None:
    """Both ways of reading agree which."""
    for seed in range(150):
        patch, old = patch_of(is_raw=seed % 3 == 0)
        generator = torch.Generator().manual_seed(seed)
        where = torch.randint(patch.numel() if seed % 2 else 150, (3,), generator=generator)
        patch[where] = torch.randint(256, (3,), dtype=torch.uint8, generator=generator)
        ends = {}
        for path, use in everywhere().items():
            if "cuda" in path:
                continue
            weights = old.clone()
            with use:
                try:
                    ops.patch_apply_(weights, patch)
                    ends[path] = as_int(weights).tolist()
                except ConfigError:
                    ends[path] = None
        assert len({str(end) for end in ends.values()}) == 1, seed


# -- what is refused ------------------------------------------------------------------------------


def test_tensors_that_do_not_serve() -> None:
    flat, payload = torch.zeros(100), torch.zeros(1000, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"old is torch\.bfloat16 of 100 elements: must be"):
        ops.patch_encode(flat, flat.bfloat16(), payload)
    with pytest.raises(ConfigError, match=r"new is torch\.float64"):
        ops.patch_encode(flat.double(), flat, payload)
    with pytest.raises(ConfigError, match="must be 1-D and contiguous"):
        ops.patch_encode(flat[::2], flat[::2], payload)
    with pytest.raises(ConfigError, match="payload has 400 bytes: must be at least 412"):
        ops.patch_encode(flat, flat, payload[:400])
    with pytest.raises(ConfigError, match="payload has 11 bytes: must be at least 12"):
        ops.patch_apply_(flat, payload[:11])
    with pytest.raises(ConfigError, match="must be a multiple of 4"):
        ops.patch_apply_(flat, payload[1:])
    with pytest.raises(ConfigError, match="payload is on meta: must be on cpu"):
        ops.patch_apply_(flat, payload.to("meta"))
    with pytest.raises(ConfigError, match="old is on meta: must be on cpu, as new is"):
        ops.patch_encode(flat, flat.to("meta"), payload)
    with pytest.raises(ConfigError, match="is no patch"):
        ops.patch_bytes(payload[:7])


def test_more_than_an_entry_can_name() -> None:
    ops.patch_capacity((1 << 31) - (1 << 23), torch.bfloat16)
    with pytest.raises(ConfigError, match="must be at most 4294967296"):
        ops.patch_capacity(1 << 31, torch.bfloat16)
