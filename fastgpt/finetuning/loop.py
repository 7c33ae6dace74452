"""The loop that both kinds of fine-tuning share: steps, evaluations, checkpoints, Ctrl-C, exact resumption.

| file of a run's folder | what                                                                                     |
|------------------------|------------------------------------------------------------------------------------------|
| settings.json          | the settings, for people                                                                 |
| last.safetensors       | the newest checkpoint, all that a resumed run needs                                      |
| best.safetensors       | the weights of the best evaluation, LoRA layers folded in                                |
| adapter.safetensors    | with LoRA: the adapter of the same evaluation, see `fastgpt.finetuning.load_adapter`     |

The order of the rows depends on the seed and the epoch alone, so a resumed run takes the same steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt.finetuning.adapters import save_adapter
from fastgpt.finetuning.lora import lora_layers, merge_lora, merged_tensors
from fastgpt.finetuning.settings import FinetuneSettings
from fastgpt.memory import kept_memory
from fastgpt.training import DivergedError, Evaluation, Reporter, WarmupCosine, make_adamw
from fastgpt.training.checkpoint import load_checkpoint, read_info, save_checkpoint
from fastgpt.training.interrupt import StopRequest
from fastgpt.weights.files import CheckpointError, load_tensors, read_tensors, write_tensors, write_text

LAST, BEST, ADAPTER, SETTINGS = "last.safetensors", "best.safetensors", "adapter.safetensors", "settings.json"

# Share of the steps over which the learning rate rises; it falls to a tenth at the end.
_WARMUP, _END = 0.05, 0.1


@dataclasses.dataclass(frozen=True)
class FinetuneEvaluation(Evaluation):
    """One row of the history.

    Attributes:
        val_accuracy: share of validation rows with the right class; None for instructions.
    """

    val_accuracy: float | None = None

    @property
    def badness(self) -> tuple[float, float]:
        """Lower is better: accuracy decides where there is one, then the loss."""
        return (-(self.val_accuracy or 0.0), self.val_loss)


class Task(NamedTuple):
    """What the loop needs to know.

    Attributes:
        n_rows: rows of the training part.
        tokens_per_row: for the progress bar.
        loss: rows to a scalar with a graph.
        measure: () to (validation loss, validation accuracy or None), without gradients; the model is in eval mode.
        info: kept in every file, as JSON; what a reader needs to build the model again.
        also: names of frozen tensors that an adapter needs, beside the LoRA layers.
    """

    n_rows: int
    tokens_per_row: int
    loss: Callable[[Sequence[int]], Tensor]
    measure: Callable[[], tuple[float, float | None]]
    info: Mapping[str, Any]
    also: tuple[str, ...] = ()


class Loop:
    """One run.

    Args:
        settings: resolved.
        model: its trainable parameters are taken; on the run's device.
        task: see `Task`.
        reporter: hears what happens.
    """

    def __init__(self, settings: FinetuneSettings, model: nn.Module, task: Task, reporter: Reporter) -> None:
        self.settings, self.model, self.task, self.reporter = settings, model, task, reporter
        self.batch_size = min(settings.batch_size, task.n_rows)
        # As the book's loaders do, the last batch of an epoch is left out when it is smaller.
        self.steps_per_epoch = task.n_rows // self.batch_size
        self.total_steps = settings.epochs * self.steps_per_epoch
        lr = settings.peak_lr
        warmup = round(_WARMUP * self.total_steps)
        self.schedule = WarmupCosine(lr, _END * lr, warmup, self.total_steps, initial_lr=_END * lr)
        self.optimizer = make_adamw(model, lr, settings.weight_decay)
        self.step = 0
        self.evaluations: list[FinetuneEvaluation] = []
        self.seconds = 0.0
        self._losses: list[float] = []
        self._pending: list[Tensor] = []
        self._best: dict[str, Tensor] = {}

    @property
    def folder(self) -> Path | None:
        """The folder of the run."""
        return None if self.settings.out_dir is None else Path(self.settings.out_dir)

    @kept_memory()
    def run(self, *, resume: bool = False) -> bool:
        """Train to the end, or until Ctrl-C; then put the best weights into the model, without LoRA layers.

        Args:
            resume: go on from the newest checkpoint in the folder of the run.

        Returns:
            True when it was interrupted; the model then has its newest weights.

        Raises:
            FileExistsError: the folder holds a run already, and `resume` is False.
            FileNotFoundError, CheckpointError: there is no checkpoint to go on from, or it is of another run.
        """
        if resume:
            self._restore()
        else:
            open_folder(self.settings)
        self.model.train()
        self.reporter.begin(self.step, self.total_steps, self.batch_size * self.task.tokens_per_row)
        try:
            with StopRequest(self.reporter.stopping) as stop:
                began = time.perf_counter()
                while self.step < self.total_steps and not stop.made:
                    self._train_step()
                    self.reporter.step(self.step, self._newest_loss, self.schedule.at(self.step - 1))
                    due = self._evaluation_is_due()
                    if due or stop.made:
                        self.losses()
                        self.seconds += time.perf_counter() - began
                        if due:
                            self._evaluate()
                        self._save()
                        began = time.perf_counter()
        finally:
            self.reporter.end()
        if self.step < self.total_steps:
            self.reporter.message(f"Stopped after step {self.step} of {self.total_steps}.")
            return True
        self._take_best()
        return False

    def losses(self) -> list[float]:
        """Training loss of each step; waits for the device."""
        if self._pending:
            self._losses += torch.stack(self._pending).tolist()
            self._pending.clear()
        return self._losses

    def _restore(self) -> None:
        if self.folder is None:
            raise ValueError("A run without out_dir keeps nothing that could be resumed.")
        path = self.folder / LAST
        saved = read_info(path)
        for name, what in (("task", "another kind of run"), ("data_crc32", "other data"), ("config", "another model")):
            if saved.get(name) != self.task.info[name]:
                raise CheckpointError(f"{path} belongs to {what}; nothing was loaded.")
        info, extra = load_checkpoint(path, self.model, self.optimizer)
        self.step = int(info["step"])
        self.evaluations = [FinetuneEvaluation(**row) for row in info["evaluations"]]
        self._losses = extra["losses"].tolist()

    def _rows(self) -> list[int]:
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        order = torch.randperm(self.task.n_rows, generator=generator).tolist()
        rows: list[int] = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return rows

    def _train_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step)
        loss = self.task.loss(self._rows())
        loss.backward()
        if self.settings.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._pending.append(loss.detach())
        self.step += 1

    def _newest_loss(self) -> float:
        return self._pending[-1].item() if self._pending else self._losses[-1]

    def _evaluation_is_due(self) -> bool:
        every = self.settings.eval_every or self.steps_per_epoch
        return self.step % every == 0 or self.step == self.total_steps

    def _evaluate(self) -> None:
        recent = self.losses()[self.evaluations[-1].step if self.evaluations else 0 :]
        train_loss = sum(recent) / len(recent)
        if not math.isfinite(train_loss):
            raise DivergedError(
                f"The training loss is {train_loss} by step {self.step}; a lower lr (it is {self.settings.peak_lr:g}) "
                "usually helps."
            )
        self.model.eval()
        try:
            with torch.no_grad():
                val_loss, accuracy = self.task.measure()
        finally:
            self.model.train()
        row = FinetuneEvaluation(
            step=self.step,
            tokens_seen=self.step * self.batch_size * self.task.tokens_per_row,
            train_loss=train_loss,
            val_loss=val_loss,
            lr=self.schedule.at(self.step - 1),
            val_accuracy=accuracy,
        )
        self.evaluations.append(row)
        self.reporter.evaluation(row)
        if accuracy is not None:
            self.reporter.message(f"  validation accuracy {accuracy:.1%}")
        if row is min(self.evaluations, key=lambda row: row.badness):
            self._keep_best()

    def _keep_best(self) -> None:
        tensors = merged_tensors(self.model)
        if self.folder is None:
            self._best = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            return
        info = {**self.task.info, "step": self.step, "settings": self.settings.to_dict()}
        write_tensors(self.folder / BEST, tensors, info)
        if any(True for _ in lora_layers(self.model)):
            save_adapter(self.folder / ADAPTER, self.model, also=self.task.also, info=info)

    def _save(self) -> None:
        if self.folder is None:
            return
        info = {
            **self.task.info,
            "step": self.step,
            "settings": self.settings.to_dict(),
            "evaluations": [dataclasses.asdict(row) for row in self.evaluations],
        }
        losses = torch.tensor(self.losses(), dtype=torch.float64)
        save_checkpoint(self.folder / LAST, self.model, self.optimizer, info=info, extra={"losses": losses})

    def _take_best(self) -> None:
        merge_lora(self.model)
        self.model.eval()
        tensors = self._best if self.folder is None else read_tensors(self.folder / BEST)[0]
        load_tensors("the best weights" if self.folder is None else self.folder / BEST, self.model, tensors)


def open_folder(settings: FinetuneSettings) -> None:
    """Make the folder of a new run and write its settings.

    Raises:
        FileExistsError: it holds a run already.
    """
    if settings.out_dir is None:
        return
    folder = Path(settings.out_dir)
    if (folder / LAST).exists():
        raise FileExistsError(
            f"{folder} holds a run already. Go on with it (fastgpt.finetuning.resume_finetuning({str(folder)!r})), or "
            "choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SETTINGS, json.dumps(settings.to_dict(), indent=2) + "\n")


@contextmanager
def own_random_numbers(seed: int, device: str) -> Iterator[None]:
    """Random generators with the run's seed; afterwards as they were."""
    where = torch.device(device)
    with torch.random.fork_rng(devices=[where.index or 0] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
