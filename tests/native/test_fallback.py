"""Without the native module the specification serves: same bytes, said once, with the reason."""

import json

import pytest
import torch

from commrt import ops
from commrt.ops import BlockFormat
from tests.native import cases
from tests.native.isolated import run_python

PROGRAM = """
import json, sys, warnings

{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from commrt import codecs, ops

    fmt = ops.BlockFormat(bits=4, block=32)
    grad = torch.linspace(-3, 5, 100)
    residual, payload = torch.zeros(136, dtype=torch.uint8), torch.zeros(72, dtype=torch.uint8)
    for _ in range(2):
        ops.loco_encode(grad, residual, payload, fmt)
said = [str(one.message) for one in caught if "commrt" in str(one.message)]
print(json.dumps({{"status": ops.status(), "said": said, "payload": payload.tolist()}}))
"""


@pytest.mark.parametrize(
    ("before", "environment", "reason"),
    [
        ("", {"COMMRT_NATIVE": "0"}, "COMMRT_NATIVE=0"),
        ("sys.modules['commrt._C'] = None", {}, "commrt._C could not be imported"),
    ],
)
def test_the_reference_serves_and_says_so_once(
    before: str, environment: dict[str, str], reason: str
) -> None:
    """Payload: bit-identical to that of the native module here."""
    seen = json.loads(run_python(PROGRAM.format(before=before), **environment).stdout)
    assert seen["status"].startswith(f"reference ({reason}")
    assert len(seen["said"]) == 1
    assert reason in seen["said"][0]
    fmt = BlockFormat(bits=4, block=32)
    grad, residual = torch.linspace(-3, 5, 100), cases.empty_residual(8, 32, 100)
    payload = cases.empty_payload(fmt, 4)
    for _ in range(2):
        ops.loco_encode(grad, residual, payload, fmt)
    assert seen["payload"] == payload.tolist()
