"""Seeds that the generator cannot take are refused by name."""

import pytest
import torch

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import BlockFormat

FMT = BlockFormat(bits=4, block=32)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    """By both encoders, before anything is written."""
    payload = torch.zeros(FMT.payload_bytes(1), dtype=torch.uint8)
    residual = torch.zeros(34, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=rf"seed={seed}: must be in \[0, 2\*\*63\)"):
        ops.block_encode(torch.ones(32), payload, FMT, seed=seed)
    with pytest.raises(ConfigError, match=rf"seed={seed}: must be in \[0, 2\*\*63\)"):
        ops.loco_encode(torch.ones(32), residual, payload, FMT, seed=seed)
    assert not payload.any()
