"""What a person sees of a training run: a progress bar on a terminal, sparse lines anywhere else, or nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_BARS = 0.2


@dataclass(frozen=True)
class Evaluation:
    """One row of a run's history.

    Attributes:
        step: steps done.
        tokens_seen: tokens trained on.
        train_loss: mean of the training losses since the evaluation before.
        val_loss: loss on the validation part, without dropout.
        lr: learning rate of the last step.
    """

    step: int
    tokens_seen: int
    train_loss: float
    val_loss: float
    lr: float


class Reporter:
    """Hears what a run does. This one is silent; subclasses override what they want to show."""

    def encoding(self, done: int, total: int) -> None:
        """Characters of the text that have been encoded."""

    def begin(self, step: int, total_steps: int, tokens_per_step: int) -> None:
        """Training begins after `step` steps of `total_steps`."""

    def step(self, step: int, loss: Callable[[], float], lr: float) -> None:
        """A step is done. `loss()` waits for the device, so call it only to show the number."""

    def evaluation(self, row: Evaluation) -> None:
        """The model has been evaluated."""

    def sample(self, text: str) -> None:
        """The model has written a text."""

    def stopping(self) -> None:
        """Ctrl-C: the run ends after this step. Called in a signal handler."""

    def message(self, text: str) -> None:
        """A sentence for the user."""

    def end(self) -> None:
        """The run is over, for whatever reason."""


class LineReporter(Reporter):
    """One plain line for each evaluation, and for the newest step every ten seconds.

    Args:
        write: receives each line, without its end; `logger.info` and `print` will do.
    """

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write = write
        self._total = self._tokens_per_step = self._shown_step = 0
        self._shown_at = 0.0

    def begin(self, step: int, total_steps: int, tokens_per_step: int) -> None:
        self._total, self._tokens_per_step = total_steps, tokens_per_step
        self._shown_step, self._shown_at = step, time.perf_counter()

    def step(self, step: int, loss: Callable[[], float], lr: float) -> None:
        elapsed = time.perf_counter() - self._shown_at
        if elapsed < _SECONDS_BETWEEN_LINES:
            return
        rate = (step - self._shown_step) / elapsed
        left = (self._total - step) / rate
        self._write(
            f"step {step}/{self._total}: loss {loss():.3f}, {rate * self._tokens_per_step:,.0f} tokens/s, "
            f"about {duration(left)} left"
        )
        self._shown_step, self._shown_at = step, time.perf_counter()

    def evaluation(self, row: Evaluation) -> None:
        self._write(evaluation_line(row, self._total))
        # The next speed is that of training alone.
        self._shown_step, self._shown_at = row.step, time.perf_counter()

    def sample(self, text: str) -> None:
        self._write(f"  {text!r}")

    def message(self, text: str) -> None:
        self._write(text)


class BarReporter(Reporter):
    """A tqdm bar with loss, tokens/s and time left; evaluations, samples and messages stand above it.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None
        self._tokens_per_step = self._total = 0
        self._refresh_at = 0.0

    def encoding(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._make_bar(desc="encoding", total=total, unit="char")
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def begin(self, step: int, total_steps: int, tokens_per_step: int) -> None:
        self.end()
        self._total, self._tokens_per_step = total_steps, tokens_per_step
        self._bar = self._make_bar(
            desc="training", total=total_steps * tokens_per_step, initial=step * tokens_per_step, unit="tok"
        )

    def step(self, step: int, loss: Callable[[], float], lr: float) -> None:
        self._bar.update(self._tokens_per_step)
        now = time.perf_counter()
        if now >= self._refresh_at:
            self._refresh_at = now + _SECONDS_BETWEEN_BARS
            self._bar.set_description(f"step {step}/{self._total}", refresh=False)
            self._bar.set_postfix_str(f"loss {loss():.3f}, lr {lr:.1e}")

    def evaluation(self, row: Evaluation) -> None:
        self.message(evaluation_line(row, self._total))

    def sample(self, text: str) -> None:
        self.message(f"  {text!r}")

    def stopping(self) -> None:
        # Python's own streams take a lock that the interrupted code may hold.
        os.write(self._stream.fileno(), b"\nStopping after this step; press Ctrl-C again to stop at once.\n")

    def message(self, text: str) -> None:
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _make_bar(self, **settings: Any) -> Any:
        from tqdm import tqdm

        return tqdm(file=self._stream, unit_scale=True, dynamic_ncols=True, smoothing=0.1, leave=False, **settings)


def terminal_reporter(stream: TextIO | None = None) -> Reporter:
    """A bar when `stream` (standard error by default) is a terminal, else plain lines on it."""
    out = sys.stderr if stream is None else stream
    if out.isatty():
        return BarReporter(out)
    return LineReporter(lambda line: print(line, file=out, flush=True))


def evaluation_line(row: Evaluation, total_steps: int) -> str:
    """The line that reporters show for an evaluation."""
    return (
        f"step {row.step}/{total_steps}: training loss {row.train_loss:.3f}, validation loss {row.val_loss:.3f}, "
        f"{row.tokens_seen:,} tokens"
    )


def duration(seconds: float) -> str:
    """A length of time as "42 s", "3 min 20 s" or "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
