"""Pretraining for longer runs: checkpoints, exact resumption, progress, Ctrl-C. `fastgpt train` and `fastgpt demo`.

    settings = PretrainSettings(model=cfg, data="book.txt", out_dir="run", steps=1000)
    result = pretrain(settings, reporter=terminal_reporter())
    result = resume("run")

The folder of a run:

| file              | what                                                                              |
|-------------------|-----------------------------------------------------------------------------------|
| settings.json     | the settings, for people                                                          |
| tokens.bin        | the text, encoded once (a token file)                                             |
| last.safetensors  | the newest checkpoint, all that `resume` needs                                    |
| best.safetensors  | the weights with the lowest validation loss; `fastgpt.weights.load_model` opens it |
| loss.png          | the curves                                                                        |

A resumed run takes the same batches and random numbers as one that was never interrupted, so on the CPU, with the same
build and number of threads, every loss is the same to the last bit.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from pathlib import Path

from fastgpt.memory import kept_memory
from fastgpt.model import GPTModel
from fastgpt.training.checkpoint import read_info
from fastgpt.training.corpus import open_corpus, reopen_corpus
from fastgpt.training.interrupt import StopRequest
from fastgpt.training.plots import save_loss_plot
from fastgpt.training.progress import Evaluation, Reporter
from fastgpt.training.run import LAST, Run, own_random_numbers
from fastgpt.training.settings import PretrainSettings, resolve
from fastgpt.weights.files import CheckpointError, write_text

SETTINGS, PLOT = "settings.json", "loss.png"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """What a run has come to.

    Attributes:
        model: trained, in training mode, on the run's device.
        settings: with everything filled in.
        total_steps: steps that the settings ask for.
        losses: training loss of each step.
        evaluations: the history, one row an evaluation.
        interrupted: Ctrl-C ended it early.
        seconds, tokens_per_second: training alone, without evaluations, in this process.
    """

    model: GPTModel
    settings: PretrainSettings
    total_steps: int
    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    interrupted: bool
    seconds: float
    tokens_per_second: float

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def best_val_loss(self) -> float:
        """The lowest validation loss; nan before the first evaluation."""
        return min((row.val_loss for row in self.evaluations), default=math.nan)


def pretrain(settings: PretrainSettings, *, reporter: Reporter | None = None) -> PretrainResult:
    """Train a new model from settings.

    torch's random generators are seeded for the run, and afterwards as they were before.

    Args:
        settings: see `PretrainSettings`.
        reporter: hears what happens; silent when None. `terminal_reporter()` shows it.

    Returns:
        The trained model and its history. After Ctrl-C: those so far, saved.

    Raises:
        FileExistsError: `out_dir` holds a run already.
        FileNotFoundError, KeyError, TypeError, ValueError: the data or a setting cannot be used.
        DivergedError: the loss has become nan or infinite.
    """
    reporter = reporter or Reporter()
    if settings.out_dir is not None:
        folder = Path(settings.out_dir)
        if (folder / LAST).exists():
            raise FileExistsError(
                f"{folder} holds a run already. Go on with it (fastgpt train --resume {folder}, or "
                f"fastgpt.training.resume({str(folder)!r})), or choose another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
    try:
        corpus = open_corpus(settings, reporter.encoding)
    finally:
        reporter.end()
    settings = resolve(settings, n_vocab=corpus.n_vocab, tokenizer=corpus.tokenizer_name)
    if settings.out_dir is not None:
        write_text(Path(settings.out_dir) / SETTINGS, settings.to_json() + "\n")
    with own_random_numbers(settings):
        return _train(Run(settings, corpus), reporter)


def resume(
    out_dir: str | os.PathLike[str], *, reporter: Reporter | None = None, device: str | None = None
) -> PretrainResult:
    """Go on with an interrupted run, from its newest checkpoint and with its own settings.

    Args:
        out_dir: the folder of the run; it may have been moved.
        reporter: as for `pretrain`.
        device: another device than before.

    Returns:
        As `pretrain`; the history begins with the first step of the run. A finished run is returned as it is.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: the checkpoint is damaged, or the tokens are not those of the run.
    """
    path = Path(out_dir) / LAST
    info = read_info(path)
    if "settings" not in info:
        raise CheckpointError(f"{path} is not a checkpoint of fastgpt.training.pretrain.")
    settings = PretrainSettings.from_dict(info["settings"])
    settings = dataclasses.replace(settings, out_dir=str(out_dir), device=device or settings.device)
    corpus = reopen_corpus(settings)
    if corpus.fingerprint != info["corpus"]:
        raise CheckpointError(
            f"The tokens in {getattr(corpus.tokens, 'path', '')} are not those that the run in {out_dir} began with."
        )
    with own_random_numbers(settings):
        run = Run(settings, corpus)
        run.restore(path)
        return _train(run, reporter or Reporter())


@kept_memory()
def _train(run: Run, reporter: Reporter) -> PretrainResult:
    settings, first_step, seconds = run.settings, run.step, 0.0
    run.model.train()
    reporter.begin(run.step, run.total_steps, run.tokens_per_step)
    try:
        with StopRequest(reporter.stopping) as stop:
            began = time.perf_counter()
            while run.step < run.total_steps and not stop.made:
                run.train_step()
                reporter.step(run.step, run.newest_loss, run.schedule.at(run.step - 1))
                due = run.step % settings.eval_every == 0 or run.step == run.total_steps
                if due or stop.made:
                    run.losses()
                    seconds += time.perf_counter() - began
                    _after_interval(run, reporter, evaluate=due)
                    began = time.perf_counter()
        interrupted = run.step < run.total_steps
        if run.step > first_step:
            _close(run, reporter, interrupted)
    finally:
        reporter.end()
    return PretrainResult(
        model=run.model,
        settings=settings,
        total_steps=run.total_steps,
        losses=tuple(run.losses()),
        evaluations=tuple(run.evaluations),
        interrupted=interrupted,
        seconds=seconds,
        tokens_per_second=(run.step - first_step) * run.tokens_per_step / seconds if seconds else 0.0,
    )


def _after_interval(run: Run, reporter: Reporter, *, evaluate: bool) -> None:
    if evaluate:
        reporter.evaluation(run.evaluate())
        text = run.sample()
        if text is not None:
            reporter.sample(text)
    run.save()


def _close(run: Run, reporter: Reporter, interrupted: bool) -> None:
    folder = run.settings.out_dir
    if folder is not None:
        train = [(i + 1, loss) for i, loss in enumerate(run.losses())]
        val = [(row.step, row.val_loss) for row in run.evaluations]
        if save_loss_plot(Path(folder) / PLOT, train, val) is None:
            logger.info("loss.png was not drawn: matplotlib is not installed")
    if interrupted:
        how = f"saved; go on with: fastgpt train --resume {folder}" if folder else "not saved: the run has no out_dir"
        reporter.message(f"Stopped after step {run.step} of {run.total_steps}, {how}")
