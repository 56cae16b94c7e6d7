"""Golden payloads: what today's codecs make of inputs that no random generator can change.

Regenerate with ``python -m tests.golden.make`` from the repository's root, and only when the
payload format is meant to change: ranks of two versions could no longer talk to each other.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from commrt.codecs import LocoCodec, Window, parse
from tests.native.cases import run_everywhere

BLOCK_FILE = Path(__file__).with_name("block.json")
LOCO_FILE = Path(__file__).with_name("loco.json")

BLOCK_SPECS = (
    "block1:block=32,levels=mean,rounding=nearest",
    "block1:block=128,levels=mean,rounding=nearest",
    "block2:block=32,levels=mean,rounding=nearest",
    "block2:block=128,levels=mean,rounding=nearest",
    "block2:block=128,levels=mean,rounding=stochastic",
    "block2:block=32,levels=absmax,rounding=nearest",
    "block2:block=128,levels=absmax,rounding=nearest",
    "block2:block=128,levels=absmax,rounding=stochastic",
    "block4:block=32,levels=absmax,rounding=nearest",
    "block4:block=128,levels=absmax,rounding=nearest",
    "block4:block=1024,levels=absmax,rounding=nearest",
    "block4:block=128,levels=absmax,rounding=stochastic",
    "block8:block=32,levels=absmax,rounding=nearest",
    "block8:block=128,levels=absmax,rounding=nearest",
    "block8:block=128,levels=absmax,rounding=stochastic",
)
LOCO_SPECS = (
    "loco1:block=64,levels=mean,rounding=nearest,beta=0.8,residual=8,reset=0",
    "loco2:block=64,levels=mean,rounding=nearest,beta=0.8,residual=8,reset=0",
    "loco4:block=64,levels=absmax,rounding=nearest,beta=0.8,residual=8,reset=0",
    "loco4:block=64,levels=absmax,rounding=stochastic,beta=0.5,residual=4,reset=0",
    "loco8:block=64,levels=absmax,rounding=nearest,beta=0.0,residual=8,reset=0",
)
NUM_STEPS = 3


def gradient(block: int, step: int) -> Tensor:
    """Three blocks and five elements, exact in fp32.

    In step 0 block 1 is zero; in steps 0 and 2 block 2 has an infinity.
    """
    index = torch.arange(3 * block + 5) + 7919 * step
    hashed = index * 2654435761 % 2**32 >> 8
    value = (hashed - 2**23).float() / 2.0 ** (23 + index % 5)
    if step == 0:
        value[block : 2 * block] = 0
    if step != 1:
        value[2 * block + 3] = torch.inf
    return value


def block_payload(spec: str) -> str:
    """Hex, the same from every path."""
    codec = parse(spec)
    payload = torch.zeros(codec.payload_bytes(4), dtype=torch.uint8)
    window = Window(0, 4, 0)
    run_everywhere(codec.encode, gradient(codec.block, 0), payload, window, residual=None, seed=1)
    return payload.numpy().tobytes().hex()


def loco_steps(spec: str) -> list[dict[str, str]]:
    """Hex of payload and residual after each of three steps, the same from every path."""
    codec = parse(spec)
    assert isinstance(codec, LocoCodec)
    payload = torch.zeros(codec.payload_bytes(4), dtype=torch.uint8)
    residual = torch.zeros(codec.residual_bytes(3 * codec.block + 5), dtype=torch.uint8)
    steps = []
    for step in range(NUM_STEPS):
        grad = gradient(codec.block, step)
        run_everywhere(
            codec.encode, grad, payload, Window(0, 4, 0), residual=residual, seed=2**40 + step
        )
        tensors = {"payload": payload, "residual": residual}
        steps.append({name: t.numpy().tobytes().hex() for name, t in tensors.items()})
    return steps


def main() -> None:
    made = {
        BLOCK_FILE: {spec: block_payload(spec) for spec in BLOCK_SPECS},
        LOCO_FILE: {spec: loco_steps(spec) for spec in LOCO_SPECS},
    }
    for path, content in made.items():
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
