"""The training loop: steps, validations, checkpoints, and an end on which all ranks agree."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from commrt.metrics import Row
from commrt.training.trainer import Trainer


class Exchange:
    """Averages the loss over the ranks and spreads a wish to stop, one step late.

    The one small all-reduce of a step is awaited after the next step, by when it has long
    arrived: ranks agree on the step to stop at, and none waits for it.

    Attributes:
        stopping: Whether any rank wished to stop, in a step that was settled. Equal on all ranks
            after the same call.
    """

    def __init__(self) -> None:
        self.stopping = False
        self._pending: tuple[dist.Work, Tensor, Row] | None = None

    def post(self, loss: Tensor, row: Row, *, stop: bool) -> None:
        """Starts the exchange of a step. Ranks: all must call.

        Args:
            loss: This rank's loss, a scalar.
            row: The step's other measurements.
            stop: Whether this rank wishes to stop.
        """
        message = torch.stack((loss.double(), loss.new_tensor(stop, dtype=torch.float64)))
        work = dist.all_reduce(message, async_op=True)
        assert work is not None
        self._pending = (work, message, row)

    def settle(self) -> list[Row]:
        """Ends what `post` started: its row with the mean loss, nothing if none is pending."""
        if self._pending is None:
            return []
        work, message, row = self._pending
        self._pending = None
        work.wait()
        loss_sum, num_stops = message.tolist()
        self.stopping = self.stopping or num_stops > 0
        return [{**row, "loss": loss_sum / dist.get_world_size()}]


class Loop:
    """Takes the steps of a run and reports each.

    Args:
        trainer: What to train.
        write: Takes the rows.
        wants_stop: Whether this rank was asked to stop; called after each step.
    """

    def __init__(
        self, trainer: Trainer, write: Callable[[Row], None], wants_stop: Callable[[], bool]
    ) -> None:
        self._trainer = trainer
        self._write = write
        self._wants_stop = wants_stop
        self._exchange = Exchange()

    def run(self) -> bool:
        """Trains and validates to the last step, or to a checkpoint where a rank was stopped.

        Returns:
            Whether the last step was reached; the same on all ranks.

        Ranks: all must call.
        """
        trainer, config = self._trainer, self._trainer.config
        while trainer.step < config.steps:
            self._take_step()
            validates = self._is_due(config.eval_every or config.steps)
            saves = config.checkpoint_every > 0 and self._is_due(config.checkpoint_every)
            if validates or saves:
                self._settle()
            if self._exchange.stopping and trainer.step < config.steps:
                trainer.save()
                break
            if validates:
                self._write(self._validation_row())
            if saves:
                trainer.save()
        self._settle()
        return trainer.step == config.steps

    def _is_due(self, every: int) -> bool:
        step = self._trainer.step
        return step % every == 0 or step == self._trainer.config.steps

    def _take_step(self) -> None:
        trainer, began = self._trainer, time.perf_counter()
        before = trainer.comm.stats()
        loss = trainer.train_step()
        self._settle()
        stats = trainer.comm.stats()
        duration = time.perf_counter() - began
        row = {
            "kind": "train",
            "step": trainer.step,
            "loss": None,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "tokens_per_s": trainer.tokens_per_step / duration,
            "step_ms": 1000 * duration,
            "codec_ms": 1000 * (stats.codec_s - before.codec_s),
            "network_ms": 1000 * (stats.network_s - before.network_s),
            "bytes_sent": stats.wire_bytes - before.wire_bytes,
            "node_bytes": stats.node_bytes - before.node_bytes,
            "dense_bytes": stats.dense_bytes - before.dense_bytes,
            "ratio": stats.ratio,
        }
        self._exchange.post(loss, row, stop=self._wants_stop())

    def _settle(self) -> None:
        for row in self._exchange.settle():
            self._write(row)

    def _validation_row(self) -> Row:
        return {
            "kind": "val",
            "step": self._trainer.step,
            "val_loss": self._trainer.validate(),
            "residual_norm": self._trainer.comm.residual_norm(),
        }
