"""One pretraining run: what changes from step to step, and the steps themselves. `pretrain` drives it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.data import RandomBatches
from fastgpt.generation import Generator
from fastgpt.memory import bfloat16_activations
from fastgpt.model import GPTModel
from fastgpt.tokenizer import text_to_token_ids, token_ids_to_text
from fastgpt.training.checkpoint import load_checkpoint, save_checkpoint
from fastgpt.training.corpus import Corpus, validation_batches
from fastgpt.training.loss import calc_loss_batch
from fastgpt.training.optimizer import make_adamw
from fastgpt.training.progress import Evaluation
from fastgpt.training.schedules import WarmupCosine
from fastgpt.training.settings import PretrainSettings
from fastgpt.weights.files import save_weights

LAST, BEST = "last.safetensors", "best.safetensors"


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


class Run:
    """A run in progress: what changes from step to step, and the steps themselves."""

    def __init__(self, settings: PretrainSettings, corpus: Corpus) -> None:
        self.settings, self.corpus = settings, corpus
        self.device = torch.device(settings.device)
        self.context = settings.context or int(settings.model["context_length"])
        self.first_val = corpus.split(settings.val_fraction)
        self.batches = RandomBatches(
            corpus.tokens, settings.batch_size, self.context, seed=settings.seed, stop=self.first_val
        )
        self.tokens_per_step = settings.batch_size * settings.grad_accumulation * self.context
        epoch = self.first_val / self.tokens_per_step
        self.total_steps = settings.steps or max(1, round((settings.epochs or 1) * epoch))
        self.schedule = WarmupCosine(
            settings.lr, settings.min_lr, settings.warmup_steps, self.total_steps, initial_lr=settings.min_lr
        )
        self.tokenizer = corpus.load_tokenizer() if settings.sample_prompt else None
        self.model = GPTModel(settings.model).to(self.device)
        self.generator = Generator(self.model)
        self.optimizer = make_adamw(self.model, settings.lr, settings.weight_decay, settings.betas)
        self.step = 0
        self.evaluations: list[Evaluation] = []
        self._losses: list[float] = []
        self._pending: list[Tensor] = []

    def train_step(self) -> None:
        """One update of the weights. The device is not waited for."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step)
        count = self.settings.grad_accumulation
        losses = []
        for _ in range(count):
            inputs, targets = next(self.batches)
            with self._precision():
                loss = calc_loss_batch(inputs, targets, self.model, self.device)
            (loss / count).backward()
            losses.append(loss.detach())
        if self.settings.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._pending.append(torch.stack(losses).mean())
        self.step += 1

    def newest_loss(self) -> float:
        """Training loss of the newest step; waits for the device."""
        return self._pending[-1].item() if self._pending else self._losses[-1]

    def losses(self) -> list[float]:
        """Training loss of each step; waits for the device."""
        if self._pending:
            self._losses += torch.stack(self._pending).tolist()
            self._pending.clear()
        return self._losses

    def evaluate(self) -> Evaluation:
        """Measure both losses and add the row to the history."""
        before = self.evaluations[-1].step if self.evaluations else 0
        recent = self.losses()[before:]
        train_loss = sum(recent) / len(recent)
        if not math.isfinite(train_loss):
            saved = f" The checkpoint of step {before} is still good." if before and self.settings.out_dir else ""
            raise DivergedError(
                f"The training loss is {train_loss} by step {self.step}. A lower lr (it is {self.settings.lr:g}) or "
                f"more warmup_steps ({self.settings.warmup_steps}) usually helps.{saved}"
            )
        row = Evaluation(
            step=self.step,
            tokens_seen=self.step * self.tokens_per_step,
            train_loss=train_loss,
            val_loss=self._validate(),
            lr=self.schedule.at(self.step - 1),
        )
        self.evaluations.append(row)
        return row

    @torch.no_grad()
    def _validate(self) -> float:
        settings = self.settings
        batches = validation_batches(
            self.corpus.tokens, self.first_val, self.context, settings.batch_size, settings.eval_batches
        )
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.model.eval()
        try:
            for inputs, targets in batches:
                with self._precision():
                    loss = calc_loss_batch(inputs, targets, self.model, self.device)
                total += loss * targets.numel()
                count += targets.numel()
        finally:
            self.model.train()
        return total.item() / count

    def sample(self) -> str | None:
        """A text by the model, or None when no prompt was given. Draws no random number of the run."""
        settings = self.settings
        if not settings.sample_prompt:
            return None
        prompt = text_to_token_ids(settings.sample_prompt, self.tokenizer)[0]
        rows = self.generator.generate(
            [prompt],
            settings.sample_tokens,
            temperature=settings.sample_temperature,
            seed=settings.seed,
            overflow="slide",
        )
        return token_ids_to_text(rows[0], self.tokenizer)

    def save(self) -> None:
        """Write the newest checkpoint, and the best weights when they are these."""
        if self.settings.out_dir is None:
            return
        folder = Path(self.settings.out_dir)
        info: dict[str, Any] = {
            "config": dict(self.settings.model),
            "tokenizer": self.corpus.tokenizer_name,
            "step": self.step,
            "settings": self.settings.to_dict(),
            "corpus": self.corpus.fingerprint,
            "evaluations": [dataclasses.asdict(row) for row in self.evaluations],
        }
        best = min(self.evaluations, key=lambda row: row.val_loss, default=None)
        if best is not None and best.step == self.step:
            save_weights(folder / BEST, self.model, info)
        info["batches"] = self.batches.state_dict()
        losses = torch.tensor(self.losses(), dtype=torch.float64)
        save_checkpoint(folder / LAST, self.model, self.optimizer, info=info, extra={"losses": losses})

    def restore(self, path: Path) -> None:
        """Go back to where a checkpoint was written."""
        info, extra = load_checkpoint(path, self.model, self.optimizer)
        self.step = int(info["step"])
        self.batches.load_state_dict(info["batches"])
        self.evaluations = [Evaluation(**row) for row in info["evaluations"]]
        self._losses = extra["losses"].tolist()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        keeping = bfloat16_activations() if self.settings.activations == "bfloat16" else nullcontext()
        with keeping, torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            yield


@contextmanager
def own_random_numbers(settings: PretrainSettings) -> Iterator[None]:
    """Random generators seeded with the run's seed; afterwards as they were."""
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {settings.device!r}, but torch sees no GPU here; use device='cpu'.")
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        yield
