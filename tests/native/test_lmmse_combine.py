"""lmmse_combine: fused multiply-adds in the order of the rows, bit-identical on every path."""

import pytest
import torch
from torch import Tensor

from commrt import ops
from commrt.errors import ConfigError
from tests.native import cases
from tests.native.test_threads import threads


def make(count: int, numel: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(count, numel, generator=generator)
    return stack, torch.randn(count, generator=generator)


def combined(stack: Tensor, weights: Tensor) -> Tensor:
    out = torch.full((stack.shape[1],), 42.0)
    ops.lmmse_combine(stack, weights, out)
    return out


@pytest.mark.parametrize("count", [1, 2, 4, 7, 16, 1024])
def test_every_path_equals_the_specification(count: int) -> None:
    for seed, numel in enumerate((0, 1, 7, 16, 17, 127, 1025) if count < 100 else (5, 130)):
        stack, weights = make(count, numel, seed)
        out = torch.full((numel,), 42.0)
        cases.run_everywhere(ops.lmmse_combine, stack, weights, out)
        apart = stack.new_full((count, numel + 3), torch.nan)[:, 1 : numel + 1]
        apart.copy_(stack)
        cases.run_everywhere(ops.lmmse_combine, apart, weights, cases.unaligned(out))


def test_special_values_pass() -> None:
    special = (0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38, 1e-30)
    stack = torch.cartesian_prod(*[torch.tensor(special)] * 2).T.contiguous()
    for weights in ((1.0, 1.0), (0.5, -1.0), (1e-20, 3e38), (torch.inf, 0.0)):
        out = torch.zeros(stack.shape[1])
        cases.run_everywhere(ops.lmmse_combine, stack, torch.tensor(weights), out)


def test_each_product_and_sum_is_rounded_once() -> None:
    """As no product that is rounded by itself would be."""
    near_one = 1.0 + 2.0**-12
    stack = torch.tensor([[1.0], [near_one]])
    weights = torch.tensor([-(near_one**2), near_one])
    exact = near_one**2 - float(weights[0].abs())
    assert exact != 0
    assert combined(stack, weights).item() == exact


def test_the_sum_is_that_of_fp64_but_for_rounding() -> None:
    stack, weights = make(300, 2000)
    exact = (weights.double()[:, None] * stack.double()).sum(dim=0)
    assert (combined(stack, weights).double() - exact).abs().max() < 1e-4


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_threads(count: int) -> None:
    stack, weights = make(3, 100_001)
    expected = combined(stack, weights)
    with threads(count):
        assert torch.equal(combined(stack, weights), expected)


def test_tensors_that_do_not_serve() -> None:
    stack, weights = make(3, 10)
    out = torch.zeros(10)
    with pytest.raises(ConfigError, match=r"stack is torch\.float64 \(3, 10\): must be"):
        ops.lmmse_combine(stack.double(), weights, out)
    with pytest.raises(ConfigError, match="of 1 to 1024 rows"):
        ops.lmmse_combine(torch.zeros(1025, 2), torch.zeros(1025), out[:2])
    with pytest.raises(ConfigError, match="of 1 to 1024 rows"):
        ops.lmmse_combine(stack[:0], weights[:0], out)
    with pytest.raises(ConfigError, match="stack has strided rows"):
        ops.lmmse_combine(torch.zeros(10, 3).T, weights, out)
    with pytest.raises(ConfigError, match="weights has 2 elements: must have 3"):
        ops.lmmse_combine(stack, weights[:2], out)
    with pytest.raises(ConfigError, match="out has 9 elements: must have 10"):
        ops.lmmse_combine(stack, weights, out[:9])
    with pytest.raises(ConfigError, match="out is on meta: must be on cpu, as stack is"):
        ops.lmmse_combine(stack, weights, out.to("meta"))
