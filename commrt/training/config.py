"""What a training run is made of: presets, the configuration and its command line options."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import typing
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any

from commrt.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model.

    Attributes:
        dim: Width of the residual stream, a multiple of ``num_heads``.
        num_layers: Number of blocks.
        num_heads: Attention heads a block.
        seq_len: Longest sequence in bytes. Positions are learned, so it adds parameters.
    """

    dim: int
    num_layers: int
    num_heads: int
    seq_len: int


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model size with the sequence length, batch size and learning rate that suit it."""

    dim: int
    num_layers: int
    num_heads: int
    seq_len: int
    batch_size: int
    lr: float


# Names are the usual ones, true counts are smaller since 256 bytes need no large embedding:
# 0.84 M, 7.2 M, 25.5 M, and 86.0 M in the shape of GPT-2 small (124 M with its 50,257 tokens).
PRESETS = {
    "1m": Preset(dim=128, num_layers=4, num_heads=4, seq_len=128, batch_size=8, lr=2e-3),
    "7m": Preset(dim=384, num_layers=4, num_heads=6, seq_len=128, batch_size=8, lr=1e-3),
    "25m": Preset(dim=512, num_layers=8, num_heads=8, seq_len=256, batch_size=8, lr=6e-4),
    "124m": Preset(dim=768, num_layers=12, num_heads=12, seq_len=1024, batch_size=4, lr=6e-4),
}


# What each optimizer's learning rate is, of AdamW's.
OPTIMIZERS = {
    "adamw": 1.0,
    "adam-mini": 1.0,
    "adamw8": 1.0,
    "lion": 0.15,
    "adan": 1.0,
    "mofo": 1.0,
}
MOMENTA = ("fp32", "bf16", "int8")

OFFLOAD = ("stream", "cpu", "auto")
PARALLEL = ("ddp", "fsdp1", "fsdp2", "hsdp")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Every field is a command line option of the same name.

    ``TrainConfig.make`` fills in what the preset decides and is the usual way to build one.

    Raises:
        ConfigError: A value is out of range. The message names the option, the value and the range.
    """

    preset: Annotated[str, f"model size: {', '.join(PRESETS)}"]
    parallel: Annotated[str, f"how ranks share the model: {', '.join(PARALLEL)}"] = "ddp"
    keep_gathered: Annotated[bool, "FSDP2 keeps weights from forward to backward"] = False
    codec: Annotated[str, "gradient codec, none for full precision"] = "loco4"
    gather: Annotated[str | None, "codec of the return leg, or of FSDP2's weights"] = None
    small: Annotated[str, "codec of biases, norms and small matrices"] = "none"
    codec_warmup: Annotated[int, "steps at full precision before the codec sets in"] = 0
    hierarchy: Annotated[int, "ranks a node, or of HSDP's shard groups; 0 for one level"] = 0
    intra: Annotated[str, "codec inside nodes, with a hierarchy"] = "none"
    steps: Annotated[int, "optimizer steps"] = 1000
    batch_size: Annotated[int, "sequences a rank and step (default: the preset's)"]
    seq_len: Annotated[int, "bytes a sequence (default: the preset's)"]
    optim: Annotated[str, f"optimizer: {', '.join(OPTIMIZERS)}"] = "adamw"
    momentum: Annotated[str | None, "its first moment: fp32, bf16, int8 (default: its own)"] = None
    offload: Annotated[str | None, f"its state in host memory: {', '.join(OFFLOAD)}"] = None
    link_rate: Annotated[str | None, "emulated link to the host, as 12GB/s, with offload"] = None
    lr: Annotated[float, "peak learning rate (default: the preset's, times the optimizer's)"]
    warmup: Annotated[int, "steps of linear warm-up"] = 100
    weight_decay: Annotated[float, "decay of matrices; vectors are never decayed"] = 0.1
    clip: Annotated[float, "largest gradient norm, 0 for no clipping"] = 1.0
    seed: Annotated[int, "seed of the weights and of the samples"] = 0
    data: Annotated[Path | None, "a text file or a folder (default: Python's own library)"] = None
    eval_every: Annotated[int, "steps between validations, 0 for one at the end"] = 100
    eval_windows: Annotated[int, "number of validation sequences"] = 128
    checkpoint_every: Annotated[int, "steps between checkpoints, 0 for none but on a signal"] = 500
    log_every: Annotated[int, "steps between lines where there is no progress bar"] = 10
    out: Annotated[Path, "folder for all that is written (default: runs/PRESET-CODEC-seedSEED)"]
    resume: Annotated[Path | None, "go on from a run's or checkpoint's folder; alone: --out"] = None
    device: Annotated[str, "where to compute: auto, cpu, cuda"] = "auto"
    timeout_s: Annotated[int, "seconds after which a rank gives up waiting for another"] = 600
    tensorboard: Annotated[bool, "write TensorBoard events too"] = False
    no_progress: Annotated[bool, "print lines even on a terminal"] = False

    @classmethod
    def make(cls, *, preset: str = "1m", **options: Any) -> TrainConfig:
        """Builds a configuration from a preset and what differs from it.

        Args:
            preset: A key of ``PRESETS``.
            **options: Fields of this class. ``resume=True`` stands for the folder ``out``.

        Raises:
            ConfigError: The preset is unknown or a value is out of range.
        """
        if preset not in PRESETS:
            raise ConfigError(f"preset is {preset!r}: it must be one of {', '.join(PRESETS)}")
        chosen = PRESETS[preset]
        for name in ("seq_len", "batch_size"):
            options.setdefault(name, getattr(chosen, name))
        optim = options.get("optim", "adamw")
        options.setdefault("lr", chosen.lr * OPTIMIZERS.get(optim, 1.0))
        codec = re.sub(r"[^\w.]+", "-", options.get("codec", "loco4"))
        parallel = options.get("parallel", "ddp")
        name = codec if parallel == "ddp" else f"{parallel}-{codec}"
        name += "" if optim == "adamw" else f"-{optim}"
        options.setdefault("out", Path("runs", f"{preset}-{name}-seed{options.get('seed', 0)}"))
        if options.get("resume") is True:
            options["resume"] = options["out"]
        return cls(preset=preset, **options)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "eval_windows", "log_every", "timeout_s"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            *("codec_warmup", "hierarchy", "warmup", "seed"),
            *("eval_every", "checkpoint_every"),
        ):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("weight_decay", "clip"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        self._require("optim", self.optim in OPTIMIZERS, ", ".join(OPTIMIZERS))
        self._require("momentum", self.momentum in (None, *MOMENTA), ", ".join(MOMENTA))
        if self.optim == "adamw":
            self._require("momentum", self.momentum is None, "unset with optim=adamw")
        self._require("offload", self.offload in (None, *OFFLOAD), ", ".join(OFFLOAD))
        if self.link_rate is not None:
            self._require("link_rate", self.offload is not None, "unset without offload")
        self._require("parallel", self.parallel in PARALLEL, ", ".join(PARALLEL))
        if self.parallel == "hsdp":
            self._require("hierarchy", self.hierarchy >= 1, "at least 1 with parallel=hsdp")
        self._require("device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
        self._require("seed", self.seed < 2**63, "below 2^63")
        self._require("lr", 0 < self.lr < math.inf, "above 0 and finite")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"{name} is {getattr(self, name)}: it must be {allowed}")

    @property
    def model(self) -> ModelConfig:
        """The model's shape."""
        chosen = PRESETS[self.preset]
        return ModelConfig(
            dim=chosen.dim,
            num_layers=chosen.num_layers,
            num_heads=chosen.num_heads,
            seq_len=self.seq_len,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values, fit for JSON and for checkpoints."""
        fields = dataclasses.asdict(self)
        return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser one option for each field of `TrainConfig`; absent ones stay unset."""
    hints = typing.get_type_hints(TrainConfig, include_extras=True)
    for entry in dataclasses.fields(TrainConfig):
        kind, text = typing.get_args(hints[entry.name])
        if entry.default is not MISSING and entry.default is not None and kind is not bool:
            text += f" (default: {entry.default})"
        argument: dict[str, Any] = {"action": "store_true"}
        if kind is not bool:
            argument = {"type": (*typing.get_args(kind), kind)[0], "metavar": "VALUE"}
        if entry.name == "resume":
            argument |= {"nargs": "?", "const": True}
        flag = "--" + entry.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **argument)
