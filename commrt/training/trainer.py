"""One rank's part of the job: model, optimizer, gradient communication, and their checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.errors import StateError
from commrt.optim import StepOptimizer
from commrt.training import checkpoint, parallel
from commrt.training.checkpoint import Checkpoint
from commrt.training.config import TrainConfig
from commrt.training.data import Corpus, train_batch, validation_batches
from commrt.training.model import GPT, next_byte_losses
from commrt.training.optimizer import learning_rate, make_optimizer

# Fields that may differ between a run and its continuation. A new number of steps moves the
# learning rate schedule, on purpose.
_FREE_FIELDS = {
    "steps", "data", "out", "resume", "device", "timeout_s", "eval_every", "eval_windows",
    "checkpoint_every", "log_every", "tensorboard", "no_progress", "offload", "link_rate",
}  # fmt: skip


class Trainer:
    """Trains a GPT data-parallel, its gradients averaged by commrt.

    Attributes:
        model: The bare model; with FSDP2 the wrapped one.
        wrapped: The model as ranks share it.
        num_params: Parameters of the model, tied ones counted once.
        comm: What ``commrt.attach`` returned.
        step: Finished optimizer steps.

    Args:
        config: The run.
        corpus: Its text, the same on all ranks.
        device: Where to compute.

    Ranks: all must construct one, after ``init_process_group``.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, device: torch.device) -> None:
        self.config = config
        self.corpus = corpus
        self.device = device
        self.step = 0
        torch.manual_seed(config.seed)
        self.model = GPT(config.model).to(device)
        self.num_params = sum(parameter.numel() for parameter in self.model.parameters())
        self.wrapped = parallel.wrap(self.model, config, device)
        if config.parallel == "ddp":
            self._settle_buckets()
        self.comm = parallel.attach(self.wrapped, config)
        self.optimizer = make_optimizer(self.wrapped, config)

    def _settle_buckets(self) -> None:
        """Makes DDP lay out its buckets for good.

        It does so after its first backward. Done here, ahead of any gradient that counts, a
        resumed run adds its gradients up in the same order as one that was never stopped.
        """
        self.wrapped(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).sum().backward()
        self.wrapped.zero_grad()

    @property
    def tokens_per_step(self) -> int:
        """Bytes of text that all ranks together train on in a step."""
        return self.config.batch_size * self.config.seq_len * dist.get_world_size()

    def train_step(self) -> Tensor:
        """Takes one optimizer step and returns this rank's mean loss (a scalar, detached)."""
        config = self.config
        inputs, targets = train_batch(
            self.corpus.train,
            seed=config.seed,
            step=self.step,
            rank=dist.get_rank(),
            batch_size=config.batch_size,
            seq_len=config.seq_len,
        )
        logits = self.wrapped(inputs.to(self.device))
        loss = next_byte_losses(logits, targets.to(self.device)).mean()
        loss.backward()
        if config.clip and not isinstance(self.optimizer, StepOptimizer):  # they clip as they step
            parallel.clip_gradients(self.wrapped, config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Returns the mean validation loss in nats per byte, the same on every rank.

        Ranks: all must call.
        """
        config = self.config
        model = self.model if config.parallel == "ddp" else self.wrapped
        losses = torch.zeros(config.eval_windows, dtype=torch.float64, device=self.device)
        for indices, inputs, targets in validation_batches(
            self.corpus.validation,
            num_windows=config.eval_windows,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            batch_size=config.batch_size,
            seq_len=config.seq_len,
        ):
            logits = model(inputs.to(self.device))
            window_losses = next_byte_losses(logits, targets.to(self.device)).mean(dim=1)
            losses[indices.to(self.device)] = window_losses.double()
        # Ranks fill different entries of zeros, so this sum is exact in any order.
        dist.all_reduce(losses)
        return float(losses.mean())

    def report(self) -> str:
        """What was sent, and what the state of the optimizer took."""
        offloaded = getattr(self.optimizer, "offloaded", None)
        own = "" if offloaded is None else f"\n\nstate of the optimizer\n{offloaded.report()}"
        return self.comm.report() + own

    def save(self) -> Path:
        """Writes a checkpoint into the run's folder and returns it. Ranks: all must call."""
        shared = {
            **parallel.state_dicts(self.wrapped, self.optimizer),
            "config": self.config.to_dict(),
            "train_bytes": len(self.corpus.train),
        }
        own = self.comm.state_dict()
        return checkpoint.save(self.config.out, step=self.step, shared=shared, own=own)

    def load(self, found: Checkpoint) -> None:
        """Goes on from a checkpoint: exactly where it was written, if by as many ranks.

        With another number of ranks what their residuals hold is shared out among those there are.

        Raises:
            StateError: The checkpoint belongs to another run, whose configuration or text differs,
                or is at the last step already. The message names what.

        Ranks: all must call.
        """
        self._check_same_run(found)
        self._check_step(found)
        parallel.load_state_dicts(self.wrapped, self.optimizer, found.shared)
        self.comm.load_state_dict(found.states[0] if found.is_own else found.states)
        self.step = found.step

    def _check_same_run(self, found: Checkpoint) -> None:
        free = _FREE_FIELDS
        if found.world_size != dist.get_world_size():
            free = free | {"batch_size", "hierarchy"}
        if found.shared["config"]["parallel"] != self.config.parallel:
            free = free | {"parallel", "hierarchy", "gather", "keep_gathered"}
        saved = {**found.shared["config"], "train_bytes": found.shared["train_bytes"]}
        now = {**self.config.to_dict(), "train_bytes": len(self.corpus.train)}
        changed = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in now.items()
            if name not in free and saved.get(name) != value
        ]
        if changed:
            raise StateError(f"{found.folder} belongs to another run: {', '.join(changed)}")

    def _check_step(self, found: Checkpoint) -> None:
        """A run killed after its last checkpoint, before its summary, has but that to write."""
        steps = self.config.steps
        is_same_end = found.step == steps == found.shared["config"]["steps"]
        is_in_out = found.folder.parent.resolve() == self.config.out.resolve()
        if found.step >= steps and not (is_same_end and is_in_out):
            raise StateError(f"{found.folder} is at step {found.step}: steps must be larger")
