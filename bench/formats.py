"""Error of every format on the gradients of the main job: how block sizes and levels were chosen.

Trains the main job's model on one process in full precision and codes each step's gradient with
every format side by side (open loop: the coded gradients are not used). For each format:

    step_err   mean over steps of |Q - g| / |g|, of one rank's matrix gradients
    sum_err    |sum of Q - sum of g| / |sum of g|: what is lost for good

    python -m bench.formats --steps 300 -o bench/results/formats.json
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import harness
from commrt.codecs import BlockCodec, LocoCodec, Window, derive_seed, parse
from commrt.training.config import TrainConfig
from commrt.training.data import load_corpus, train_batch
from commrt.training.model import GPT, next_byte_losses
from commrt.training.optimizer import learning_rate, make_optimizer

SPECS = [
    *[
        f"{name}:block={block}"
        for name in ("block8", "block4", "loco4")
        for block in (32, 64, 128, 256, 1024)
    ],
    *[f"loco4:block=128,beta={beta}" for beta in (0.0, 0.5, 0.9, 0.95)],
    "loco4:block=128,residual=4",
    "loco4:block=128,rounding=stochastic",
    "block4:block=128,rounding=stochastic",
    *[
        f"{name}:block={block},levels={levels}"
        for name in ("block2", "loco2")
        for levels in ("absmax", "mean")
        for block in (32, 64, 128, 256)
    ],
    *[f"loco2:block=128,beta={beta}" for beta in (0.5, 0.8, 0.9)],
    "loco2:block=128,residual=4",
    *[f"{name}:block={block}" for name in ("block1", "loco1") for block in (32, 128)],
]  # fmt: skip


@dataclasses.dataclass
class Candidate:
    """A codec's running totals over the steps."""

    codec: BlockCodec
    residuals: list[Tensor]
    sent: Tensor
    step_error: float = 0.0

    def take(self, grads: list[Tensor], step: int) -> None:
        """Code one step's gradients."""
        decoded = []
        for index, (grad, residual) in enumerate(zip(grads, self.residuals, strict=True)):
            blocks = self.codec.num_blocks(grad.numel())
            payload = torch.empty(self.codec.payload_bytes(blocks), dtype=torch.uint8)
            window = Window(0, blocks, 0)
            seed = derive_seed(step, index)
            self.codec.encode(grad, payload, window, residual=residual, seed=seed)
            decoded.append(torch.empty_like(grad))
            self.codec.decode(payload, decoded[-1], window)
        sent, exact = torch.cat(decoded), torch.cat(grads)
        self.sent += sent
        self.step_error += float((sent - exact).norm() / exact.norm())


def run(steps: int, preset: str) -> list[dict[str, object]]:
    """Train and code; one row a format."""
    config = TrainConfig.make(preset=preset, steps=steps)
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    optimizer = make_optimizer(model, config)
    corpus = load_corpus()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    total = torch.zeros(sum(matrix.numel() for matrix in matrices))
    candidates = [_candidate(spec, matrices, total) for spec in SPECS]
    for step in range(steps):
        inputs, targets = train_batch(
            corpus.train,
            seed=config.seed,
            step=step,
            rank=0,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
        )
        next_byte_losses(model(inputs), targets).mean().backward()
        grads = [matrix.grad.reshape(-1).clone() for matrix in matrices if matrix.grad is not None]
        total += torch.cat(grads)
        for candidate in candidates:
            candidate.take(grads, step)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
    return [
        {
            "codec": spec,
            "bits": 8 * candidate.codec.fmt.block_bytes / candidate.codec.block,
            "step_err": candidate.step_error / steps,
            "sum_err": float((candidate.sent - total).norm() / total.norm()),
        }
        for spec, candidate in zip(SPECS, candidates, strict=True)
    ]


def _candidate(spec: str, matrices: list[nn.Parameter], total: Tensor) -> Candidate:
    codec = parse(spec)
    assert isinstance(codec, BlockCodec)
    sizes = [
        codec.residual_bytes(matrix.numel()) if isinstance(codec, LocoCodec) else 0
        for matrix in matrices
    ]
    residuals = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    return Candidate(codec, residuals, torch.zeros_like(total))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--preset", default="1m")
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(args.steps, args.preset)
    harness.print_table(["codec", "bits", "step_err", "sum_err"], rows)
    if args.output:
        harness.save(args.output, config={"steps": args.steps, "preset": args.preset}, results=rows)


if __name__ == "__main__":
    main()
