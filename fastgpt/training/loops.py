"""The book's training loops: chapter 5's simple one, and appendix D's with warmup, cosine decay and clipping.

They print the book's lines and nothing else. `fastgpt.training.pretrain` is the loop for longer runs: it saves and
resumes, and shows its progress.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt.memory import kept_memory
from fastgpt.training.evaluation import evaluate_model, generate_and_print_sample
from fastgpt.training.loss import calc_loss_batch
from fastgpt.training.schedules import WarmupCosine

_MAX_GRADIENT_NORM = 1.0


@kept_memory()
def train_model_simple(
    model: torch.nn.Module,
    train_loader: Any,
    val_loader: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str | int,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int | None,
    start_context: str,
    tokenizer: Any,
) -> tuple[list[float], list[float], list[int]]:
    """Train over a loader, evaluate every `eval_freq` steps from step 0, print a sample after each epoch (chapter 5).

    Args:
        model: token ids to logits; has `pos_emb`.
        train_loader, val_loader: give (input_batch, target_batch), (batch, n_tokens) int64.
        optimizer: holds the model's parameters.
        device: where the model is.
        num_epochs: passes over `train_loader`.
        eval_freq: steps from one evaluation to the next.
        eval_iter: batches an evaluation reads of each loader.
        start_context: the text that samples go on from.
        tokenizer: see `fastgpt.get_tokenizer`.

    Returns:
        (training losses, validation losses, tokens seen), one entry an evaluation.
    """
    log = _Log(model, train_loader, val_loader, device, eval_freq, eval_iter, word="Step")
    for epoch, step, inputs, targets in _batches(model, train_loader, num_epochs, device, start_context, tokenizer):
        optimizer.zero_grad()
        calc_loss_batch(inputs, targets, model, device).backward()
        optimizer.step()
        log.after_step(epoch, step, inputs)
    return log.train_losses, log.val_losses, log.track_tokens_seen


@kept_memory()
def train_model(
    model: torch.nn.Module,
    train_loader: Any,
    val_loader: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str | int,
    n_epochs: int,
    eval_freq: int,
    eval_iter: int | None,
    start_context: str,
    tokenizer: Any,
    warmup_steps: int,
    initial_lr: float = 3e-05,
    min_lr: float = 1e-6,
    orig_book_version: bool = False,
) -> tuple[list[float], list[float], list[int], list[float]]:
    """`train_model_simple` with a learning-rate schedule and gradient clipping (appendix D).

    Args:
        model, train_loader, val_loader, device, eval_freq, eval_iter, start_context, tokenizer: as there.
        optimizer: holds the model's parameters; its learning rate is the peak of the schedule.
        n_epochs: passes over `train_loader`.
        warmup_steps: steps over which the rate rises from `initial_lr` to the peak; 0 begins at the peak.
        initial_lr, min_lr: where the rate begins, and what it falls to; see `WarmupCosine`.
        orig_book_version: begin to clip one step later, as the printed book does.

    Returns:
        (training losses, validation losses, tokens seen, learning rates); the rates are one a step.
    """
    peak_lr = optimizer.param_groups[0]["lr"]
    schedule = WarmupCosine(peak_lr, min_lr, warmup_steps, len(train_loader) * n_epochs, initial_lr)
    first_clipped = warmup_steps + 1 if orig_book_version else warmup_steps
    track_lrs: list[float] = []
    log = _Log(model, train_loader, val_loader, device, eval_freq, eval_iter, word="Iter")
    for epoch, step, inputs, targets in _batches(model, train_loader, n_epochs, device, start_context, tokenizer):
        optimizer.zero_grad()
        track_lrs.append(schedule.at(step))
        for group in optimizer.param_groups:
            group["lr"] = track_lrs[-1]
        calc_loss_batch(inputs, targets, model, device).backward()
        if step >= first_clipped:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=_MAX_GRADIENT_NORM)
        optimizer.step()
        log.after_step(epoch, step, inputs)
    return log.train_losses, log.val_losses, log.track_tokens_seen, track_lrs


def find_highest_gradient(model: torch.nn.Module) -> Tensor | None:
    """The largest gradient value of all parameters (not its size: signs count), as a scalar; None without gradients."""
    largest = [parameter.grad.detach().max() for parameter in model.parameters() if parameter.grad is not None]
    return torch.stack(largest).max() if largest else None


def _batches(
    model: torch.nn.Module,
    train_loader: Any,
    n_epochs: int,
    device: torch.device | str | int,
    start_context: str,
    tokenizer: Any,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(epoch from 1, step from 0, inputs, targets) of all epochs; each epoch ends with a printed sample."""
    step = 0
    for epoch in range(1, n_epochs + 1):
        model.train()
        for inputs, targets in train_loader:
            yield epoch, step, inputs, targets
            step += 1
        generate_and_print_sample(model, tokenizer, device, start_context)


class _Log:
    """The evaluations of a run: prints each as one of the book's lines and keeps it."""

    def __init__(
        self,
        model: torch.nn.Module,
        train_loader: Any,
        val_loader: Any,
        device: torch.device | str | int,
        eval_freq: int,
        eval_iter: int | None,
        word: str,
    ) -> None:
        self.train_losses: list[float] = []
        self.val_losses: list[float] = []
        self.track_tokens_seen: list[int] = []
        self._tokens_seen = 0
        self._arguments = (model, train_loader, val_loader, device, eval_iter)
        self._eval_freq = eval_freq
        self._word = word

    def after_step(self, epoch: int, step: int, inputs: Tensor) -> None:
        """Count the tokens of a step, and evaluate when it is time."""
        self._tokens_seen += inputs.numel()
        if step % self._eval_freq:
            return
        train_loss, val_loss = evaluate_model(*self._arguments)
        self.train_losses.append(train_loss)
        self.val_losses.append(val_loss)
        self.track_tokens_seen.append(self._tokens_seen)
        print(f"Ep {epoch} ({self._word} {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
