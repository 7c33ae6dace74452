"""Chapter 6: a GPT as a classifier. The book's functions, with the head computed for the last position only.

The names calc_loss_batch, calc_loss_loader and evaluate_model exist twice in the book. Here they are chapter 6's: the
loss of one label a row, read from the logits at the last position. Chapter 5's stand in `fastgpt.training`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from fastgpt.finetuning.lora import LinearWithLoRA
from fastgpt.finetuning.optional import require
from fastgpt.fusion import is_hooked, is_plain
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast

if TYPE_CHECKING:
    import pandas as pd

# Modules that treat every position alone, so that one position can be computed without the others.
_POSITIONWISE_HEADS = (nn.Linear, LinearWithLoRA)

_LABELS = ("not spam", "spam")


def create_balanced_dataset(df: pd.DataFrame) -> pd.DataFrame:
    """As many ham as spam messages, the ham drawn with the book's seed 123, then all the spam.

    Args:
        df: columns "Label" ("ham" or "spam") and "Text".

    Returns:
        A new frame; the rows keep their index.
    """
    pandas = require("pandas", "create_balanced_dataset")
    spam = df[df["Label"] == "spam"]
    ham = df[df["Label"] == "ham"].sample(len(spam), random_state=123)
    balanced: pd.DataFrame = pandas.concat([ham, spam])
    return balanced


def random_split(
    df: pd.DataFrame, train_frac: float, validation_frac: float
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Shuffle with the book's seed 123 and cut: training, validation, and the rest for the test.

    Args:
        df: any frame.
        train_frac, validation_frac: shares; the row counts are rounded down.

    Returns:
        (training, validation, test) frames.
    """
    df = df.sample(frac=1, random_state=123).reset_index(drop=True)
    train_end = int(len(df) * train_frac)
    validation_end = train_end + int(len(df) * validation_frac)
    return df[:train_end], df[train_end:validation_end], df[validation_end:]


class SpamDataset(Dataset[tuple[Tensor, Tensor]]):
    """Messages as rows of token ids of one length, padded on the right.

    Args:
        csv_file: a path or an open file with the columns "Label" (whole numbers) and "Text".
        tokenizer: see `fastgpt.get_tokenizer`.
        max_length: tokens a row; longer messages are cut. None: as long as the longest message.
        pad_token_id: what fills the rows.

    Attributes:
        data: the pandas frame.
        max_length: tokens a row.
        encoded_texts: a list of token ids for each row, padded.

    Raises:
        ImportError: pandas is not installed.
        ValueError: a column is missing, or a label is no whole number.
    """

    def __init__(
        self,
        csv_file: str | os.PathLike[str],
        tokenizer: Any,
        max_length: int | None = None,
        pad_token_id: int = 50256,
    ) -> None:
        pandas = require("pandas", "SpamDataset")
        # A message that says "NA" or "null" is a text, not a missing value.
        self.data: pd.DataFrame = pandas.read_csv(csv_file, keep_default_na=False)
        missing = [column for column in ("Label", "Text") if column not in self.data.columns]
        if missing:
            raise ValueError(
                f"{csv_file} has no column {missing[0]!r}; wanted the columns Label and Text, "
                f"got {', '.join(map(str, self.data.columns))}."
            )
        texts = [tokenizer.encode(text) for text in self.data["Text"].astype(str)]
        self.max_length: int = max(map(len, texts), default=0) if max_length is None else max_length
        self.encoded_texts: list[list[int]] = [pad(ids, self.max_length, pad_token_id) for ids in texts]
        self._labels: list[int] = self.data["Label"].tolist()
        if not all(isinstance(label, int) for label in self._labels):
            raise ValueError(
                f"The labels in {csv_file} must be whole numbers; got {self._labels[0]!r}. "
                'Chapter 6 makes them so: df["Label"] = df["Label"].map({"ham": 0, "spam": 1})'
            )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Row `index`: token ids (max_length,) and its label, a scalar, both int64."""
        ids = torch.tensor(self.encoded_texts[index], dtype=torch.long)
        return ids, torch.tensor(self._labels[index], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.encoded_texts)


def pad(ids: list[int], length: int, pad_token_id: int) -> list[int]:
    """The first `length` ids, filled up on the right."""
    return ids[:length] + [pad_token_id] * (length - len(ids))


def last_logits(model: Callable[[Tensor], Tensor], input_batch: Tensor) -> Tensor:
    """Logits at the last position, `model(input_batch)[:, -1, :]`, without computing the head for the others.

    Where the model is fastgpt's own and nothing in it could tell the difference, the head runs on one position a row.
    For everything else the model is called as it is.

    Args:
        model: token ids (batch, n_tokens) to logits (batch, n_tokens, n_classes).
        input_batch: (batch, n_tokens) int64, on the model's device.

    Returns:
        (batch, n_classes).
    """
    if not _head_may_run_alone(model):
        return model(input_batch)[:, -1, :]
    assert isinstance(model, (GPTModel, GPTModelFast))
    logits: Tensor = model.out_head(model.hidden_states(input_batch)[:, -1, :])
    return logits


def _head_may_run_alone(model: Any) -> bool:
    if not (is_plain(model, GPTModel) or is_plain(model, GPTModelFast)):
        return False
    # A hook of the user's wants to see what the book's forward shows it.
    return type(model.out_head) in _POSITIONWISE_HEADS and not any(map(is_hooked, model.out_head.modules()))


def calc_loss_batch(
    input_batch: Tensor,
    target_batch: Tensor,
    model: Callable[[Tensor], Tensor],
    device: torch.device | str | int,
) -> Tensor:
    """Mean cross-entropy of the labels of a batch, from the logits at the last position.

    Args:
        input_batch: token ids, (batch, n_tokens), int64.
        target_batch: labels, (batch,), int64.
        model: token ids to logits, (batch, n_tokens, n_classes).
        device: where the model is.

    Returns:
        A scalar with a graph.
    """
    logits = last_logits(model, input_batch.to(device))
    return functional.cross_entropy(logits, target_batch.to(device))


def calc_loss_loader(
    data_loader: Any,
    model: Callable[[Tensor], Tensor],
    device: torch.device | str | int,
    num_batches: int | None = None,
) -> float:
    """Mean of the batch means over (the first batches of) a loader; chapter 6's loss.

    Args:
        data_loader: gives (input_batch, target_batch), see `calc_loss_batch`; has a length.
        model: token ids to logits.
        device: where the model is.
        num_batches: how many batches to read, at most those there are; None for all.

    Returns:
        A float; nan for an empty loader.
    """
    losses = [
        calc_loss_batch(inputs, targets, model, device).detach() for inputs, targets in _first(data_loader, num_batches)
    ]
    return sum(torch.stack(losses).tolist()) / len(losses) if losses else float("nan")


@torch.no_grad()
def calc_accuracy_loader(
    data_loader: Any, model: nn.Module, device: torch.device | str | int, num_batches: int | None = None
) -> float:
    """Share of rows whose label is the likeliest class. Leaves the model in evaluation mode, as the book does.

    Args:
        data_loader, model, device, num_batches: as for `calc_loss_loader`.

    Returns:
        A float from 0 to 1; nan for an empty loader.
    """
    model.eval()
    hits = [
        last_logits(model, inputs.to(device)).argmax(dim=-1) == targets.to(device)
        for inputs, targets in _first(data_loader, num_batches)
    ]
    if not hits:
        return float("nan")
    joined = torch.cat(hits)
    return int(joined.sum()) / len(joined)


def evaluate_model(
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    device: torch.device | str | int,
    eval_iter: int | None,
) -> tuple[float, float]:
    """Chapter 6's loss on both loaders, without dropout and gradients; leaves the model in training mode.

    Args:
        model: token ids to logits.
        train_loader, val_loader: see `calc_loss_loader`.
        device: where the model is.
        eval_iter: batches to read of each loader; None for all.

    Returns:
        (training loss, validation loss), floats.
    """
    model.eval()
    try:
        with torch.no_grad():
            train_loss = calc_loss_loader(train_loader, model, device, num_batches=eval_iter)
            val_loss = calc_loss_loader(val_loader, model, device, num_batches=eval_iter)
    finally:
        model.train()
    return train_loss, val_loss


def train_classifier_simple(
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str | int,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int | None,
) -> tuple[list[float], list[float], list[float], list[float], int]:
    """Train over a loader, evaluate every `eval_freq` steps from step 0, print the accuracies after each epoch.

    Args:
        model: token ids to logits; what is frozen stays frozen.
        train_loader, val_loader: give (input_batch, target_batch), see `calc_loss_batch`.
        optimizer: holds the parameters to train.
        device: where the model is.
        num_epochs: passes over `train_loader`.
        eval_freq: steps from one evaluation to the next.
        eval_iter: batches that an evaluation reads of each loader.

    Returns:
        (training losses, validation losses), one entry an evaluation, (training accuracies, validation accuracies),
        one an epoch, and the number of examples seen.
    """
    train_losses: list[float] = []
    val_losses: list[float] = []
    train_accs: list[float] = []
    val_accs: list[float] = []
    examples_seen, step = 0, 0
    for epoch in range(1, num_epochs + 1):
        model.train()
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            calc_loss_batch(inputs, targets, model, device).backward()
            optimizer.step()
            examples_seen += inputs.shape[0]
            if step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                print(f"Ep {epoch} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
            step += 1
        train_accs.append(calc_accuracy_loader(train_loader, model, device, num_batches=eval_iter))
        val_accs.append(calc_accuracy_loader(val_loader, model, device, num_batches=eval_iter))
        print(f"Training accuracy: {train_accs[-1] * 100:.2f}% | Validation accuracy: {val_accs[-1] * 100:.2f}%")
    return train_losses, val_losses, train_accs, val_accs, examples_seen


def classify_review(
    text: str,
    model: nn.Module,
    tokenizer: Any,
    device: torch.device | str | int,
    max_length: int | None = None,
    pad_token_id: int = 50256,
) -> str:
    """Whether a message is spam. Leaves the model in evaluation mode.

    Args:
        text: the message.
        model: a classifier with two classes, 1 for spam; has `pos_emb`.
        tokenizer: the one that the model was trained with.
        device: where the model is.
        max_length: tokens a row, the training set's; the message is padded or cut to it.
        pad_token_id: what fills the row.

    Returns:
        "spam" or "not spam".

    Raises:
        TypeError: there is no max_length.
        IndexError: max_length is larger than the model's context.
    """
    if max_length is None:
        raise TypeError("classify_review needs max_length, the row length of training: train_dataset.max_length.")
    model.eval()
    ids = torch.tensor([pad(tokenizer.encode(text), max_length, pad_token_id)], device=device)
    with torch.no_grad():
        label = int(last_logits(model, ids).argmax(dim=-1))
    return _LABELS[label == 1]


def plot_values(epochs_seen: Any, examples_seen: Any, train_values: Any, val_values: Any, label: str = "loss") -> None:
    """Chapter 6's figure: values over epochs, with examples on a second axis. Saves {label}-plot.pdf and shows it.

    Args:
        epochs_seen, examples_seen: where each value was measured.
        train_values, val_values: the values.
        label: "loss" or "accuracy".

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", "plot_values")
    import matplotlib.pyplot as plt

    figure, by_epoch = plt.subplots(figsize=(5, 3))
    by_epoch.plot(epochs_seen, train_values, label=f"Training {label}")
    by_epoch.plot(epochs_seen, val_values, linestyle="-.", label=f"Validation {label}")
    by_epoch.set_xlabel("Epochs")
    by_epoch.set_ylabel(label.capitalize())
    by_epoch.legend()
    by_example = by_epoch.twiny()
    # Invisible: it only gives the second axis its range.
    by_example.plot(examples_seen, train_values, alpha=0)
    by_example.set_xlabel("Examples seen")
    figure.tight_layout()
    plt.savefig(f"{label}-plot.pdf")
    plt.show()


def _first(data_loader: Any, num_batches: int | None) -> Any:
    count = len(data_loader) if num_batches is None else min(num_batches, len(data_loader))
    return itertools.islice(data_loader, count) if count > 0 else ()
