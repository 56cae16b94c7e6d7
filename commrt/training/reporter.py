"""What a run tells: rows for the sinks, and a progress bar or lines for a person."""

from __future__ import annotations

import sys
from typing import Any

from commrt.metrics import JsonLines, Row, Sink, TensorBoard, to_json
from commrt.training.config import METRICS_FILE, SUMMARY_FILE, TrainConfig


class Reporter:
    """Takes the rows of a run. On ranks other than 0 it does nothing.

    Args:
        config: The run.
        rank: This rank.
        first_step: Steps that are done already; rows of later ones, of a run that got further and
            is now resumed, are dropped from the metrics.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, config: TrainConfig, *, rank: int, first_step: int) -> None:
        self._config = config
        self._speaks = rank == 0
        self._sinks: list[Sink] = []
        self._bar = None
        if not self._speaks:
            return
        # A summary stands for a finished run, so an earlier one goes before this one begins.
        (config.out / SUMMARY_FILE).unlink(missing_ok=True)
        self._sinks.append(JsonLines(config.out / METRICS_FILE, first_step or None))
        if config.tensorboard:
            self._sinks.append(TensorBoard(config.out))
        if sys.stderr.isatty() and not config.no_progress:
            self._bar = _progress_bar(config.steps, first_step)

    def write(self, row: Row) -> None:
        """Passes a row to the sinks and shows it."""
        if not self._speaks:
            return
        for sink in self._sinks:
            sink.write(row)
        if row["kind"] == "train":
            self._show_step(row)
        elif row["kind"] == "val":
            self.say(f"step {row['step']}: validation loss {row['val_loss']:.4f} nats/byte")

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._speaks:
            print(text, flush=True)

    def finish(self, summary: Row, report: str) -> None:
        """Writes the summary of a run that took all its steps, and prints a report."""
        if self._speaks:
            path = self._config.out / SUMMARY_FILE
            path.write_text(to_json(summary, indent=2) + "\n", encoding="utf-8")
            self.say(report)

    def close(self) -> None:
        """Ends the bar and closes the sinks."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        for sink in self._sinks:
            sink.close()

    def _show_step(self, row: Row) -> None:
        loss, rate, ratio = row["loss"], row["tokens_per_s"], row["ratio"]
        if self._bar is not None:
            state = f"loss {loss:.3f}, {rate:,.0f} tokens/s, ratio {ratio:.2f}"
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update()
        elif row["step"] % self._config.log_every == 0:
            print(
                f"step {row['step']}/{self._config.steps}  loss {loss:.4f}  lr {row['lr']:.2e}  "
                f"{row['step_ms']:.0f} ms  {rate:,.0f} tokens/s  ratio {ratio:.2f}",
                flush=True,
            )


def _progress_bar(steps: int, first_step: int) -> Any:
    """Returns a tqdm bar, None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)
