"""rescale_: scales bit-identical on every path, codes untouched."""

import pytest
import torch

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import BlockFormat
from tests.native import cases

FMT = BlockFormat(bits=8, block=64)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 3.0, 1 / 3, 2.0**-120, 2.0**120])
def test_every_path_equals_the_specification(bits: int, ratio: float) -> None:
    fmt = BlockFormat(bits=bits, block=64)
    for numel in (0, 1, 3001, 100_000):
        flat = cases.sample(numel, fmt.block, torch.float32, seed=1).nan_to_num(0, 0, 0)
        payload = cases.encode(flat, fmt)
        for place in (payload, cases.unaligned(payload)):
            cases.run_everywhere(ops.rescale_, place, torch.tensor(ratio), fmt)


def test_elements_are_multiplied() -> None:
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    payload = cases.encode(flat, FMT)
    before = cases.decode(payload, FMT, 1000)
    ops.rescale_(payload, torch.tensor(0.25), FMT)
    assert torch.equal(cases.decode(payload, FMT, 1000), before * 0.25)


@pytest.mark.parametrize("ratio", [torch.ones(2), torch.ones((), dtype=torch.float64)])
def test_ratios_that_are_none(ratio: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="must be a float32 scalar"):
        ops.rescale_(cases.empty_payload(FMT, 1), ratio, FMT)
