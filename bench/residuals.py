"""Memory and time of residuals: 8 or 4 bits, on the device or in host memory.

FSDP2's residuals are of the whole model on every rank. Two ranks train the main job's model, each
variant in turn, a few steps each, in one run. Bytes are counted from the buffers. Without a GPU the
device's memory is the host's too: then "host" stands for the copies, made in place of the transfers
of a GPU, and nothing overlaps with them (emulated).

    python -m bench.residuals -o bench/results/residuals.json
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import commrt
from bench import harness
from commrt.testing import run_ranks
from commrt.training.config import PRESETS, ModelConfig
from commrt.training.model import GPT, next_byte_losses
from commrt.training.parallel import shard_blocks

VARIANTS = {
    "8 bits, device": ("loco4", "device"),
    "4 bits, device": ("loco4:residual=4", "device"),
    "8 bits, host": ("loco4", "host"),
    "4 bits, host": ("loco4:residual=4", "host"),
}
COLUMNS = (
    *("residuals", "device_bytes", "host_bytes", "bytes_a_parameter", "copied_a_step"),
    *("step_ms", "p90_ms", "codec_ms"),
)


class Job:
    """One variant's model and its measurements."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        codec, self.place = VARIANTS[name]
        preset = dataclasses.asdict(PRESETS[args.preset])
        shape = {field: preset[field] for field in ("dim", "num_layers", "num_heads")}
        torch.manual_seed(0)
        model = GPT(ModelConfig(**shape, seq_len=args.seq_len))
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.model = shard_blocks(model, mesh)
        self.comm = commrt.attach(self.model, codec, residuals=self.place)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.tokens = torch.randint(0, 256, (1, args.seq_len + 1))
        self.durations: list[float] = []

    def step(self) -> None:
        """Forward, backward and AdamW."""
        began = time.perf_counter()
        logits = self.model(self.tokens[:, :-1])
        next_byte_losses(logits, self.tokens[:, 1:]).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.durations.append(1e3 * (time.perf_counter() - began))

    def results(self, num_warm: int) -> dict[str, Any]:
        """Bytes of this rank, and its times."""
        stats = self.comm.stats()
        of_units = [
            sum(
                residual.numel()
                for name, residual in self.comm.state_dict()["residuals"].items()
                if name in unit.parameters
            )
            for unit in self.comm.units
        ]
        is_on_host = self.place == "host"
        durations = self.durations[num_warm:]
        return {
            "residuals": self.name,
            "device_bytes": sum(sorted(of_units)[-2:]) if is_on_host else stats.residual_bytes,
            "host_bytes": stats.residual_bytes if is_on_host else 0,
            "bytes_a_parameter": stats.residual_bytes / self.num_params,
            "copied_a_step": 2 * stats.residual_bytes if is_on_host else 0,
            "step_ms": statistics.median(durations),
            "p90_ms": statistics.quantiles(durations, n=10)[-1],
            "codec_ms": 1e3 * stats.codec_s / stats.steps,
        }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """On one rank."""
    torch.set_num_threads(1)
    jobs = [Job(name, args) for name in VARIANTS]
    for _ in range(args.rounds + 1):  # the first is not counted
        for job in jobs:
            for _ in range(args.steps):
                job.step()
    return [job.results(args.steps) for job in jobs]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="25m", choices=PRESETS)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a variant in a round")
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    args = parser.parse_args()
    rows = run_ranks(measure, args, world_size=2, timeout_s=1800)[0]
    harness.print_table(COLUMNS, rows)
    if args.output:
        config = {name: value for name, value in vars(args).items() if name != "output"}
        harness.save(args.output, config=config, results=rows)


if __name__ == "__main__":
    main()
