"""A GPT becomes a classifier of messages: `finetune_classifier` trains one, `load_classifier` opens it (chapter 6).

result = finetune_classifier(ClassifierSettings(out_dir="runs/spam"), reporter=terminal_reporter())
classifier = load_classifier("runs/spam")
classifier.classify(["Free entry in our weekly draw!"])        # ["spam"]
"""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgpt.finetuning.base_model import OrdinaryTokenizer, begin_with, choose_trainable, find_weights
from fastgpt.finetuning.classification import last_logits, pad
from fastgpt.finetuning.datasets import (
    Message,
    balance,
    classes_of,
    load_messages,
    read_messages,
    split_messages,
)
from fastgpt.finetuning.loop import FinetuneEvaluation, Loop, Task, own_random_numbers
from fastgpt.finetuning.settings import ClassifierSettings, resolve
from fastgpt.model import GPTModel
from fastgpt.tokenizer import get_tokenizer
from fastgpt.training import Reporter
from fastgpt.weights.files import CheckpointError, is_weight, load_tensors, read_tensors

_EVALUATION_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
        model: its head has one output a class.
        tokenizer: encodes as in training.
        classes: their names, in the order of the outputs.
        max_length: tokens a row.
        pad_token_id: what fills the rows.
    """

    model: GPTModel
    tokenizer: OrdinaryTokenizer
    classes: tuple[str, ...]
    max_length: int
    pad_token_id: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Rows of token ids, (n_texts, max_length), int64, on the CPU; longer texts are cut."""
        rows = [pad(self.tokenizer.encode(text), self.max_length, self.pad_token_id) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), self.max_length)

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Probability of each class for each text, (n_texts, n_classes), float32, on the CPU."""
        if isinstance(texts, str):
            raise TypeError("classify takes a list of texts; put the one text into a list.")
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            logits = [last_logits(self.model, rows) for rows in self._batches(self.encode(texts))]
        finally:
            for module, mode in modes.items():
                module.training = mode
        return torch.cat(logits).float().softmax(dim=-1).cpu() if logits else torch.empty(0, len(self.classes))

    def classify(self, texts: Sequence[str]) -> list[str]:
        """The likeliest class of each text, by name."""
        return [self.classes[i] for i in self.probabilities(texts).argmax(dim=-1).tolist()]

    def _batches(self, rows: Tensor) -> Iterator[Tensor]:
        device = self.model.tok_emb.weight.device
        return (part.to(device) for part in rows.split(_EVALUATION_ROWS) if len(part))


@dataclasses.dataclass(frozen=True)
class ClassifierResult:
    """What a run has come to.

    Attributes:
        classifier: with the best weights; after an interruption, with the newest.
        settings: with everything filled in.
        n_train, n_validation, n_test: messages of each part.
        losses: training loss of each step.
        evaluations: the history.
        train_accuracy, validation_accuracy, test_accuracy: of `classifier`; nan after an interruption.
        majority_share: the accuracy on the test part of always naming its most frequent class.
        interrupted: Ctrl-C ended it early.
        seconds: training alone, without evaluations, in this process.
    """

    classifier: Classifier
    settings: ClassifierSettings
    n_train: int
    n_validation: int
    n_test: int
    losses: tuple[float, ...]
    evaluations: tuple[FinetuneEvaluation, ...]
    train_accuracy: float
    validation_accuracy: float
    test_accuracy: float
    majority_share: float
    interrupted: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Part:
    """Encoded messages: rows (n, max_length) and labels (n,), int64."""

    rows: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def finetune_classifier(
    settings: ClassifierSettings, *, reporter: Reporter | None = None, resume: bool = False
) -> ClassifierResult:
    """Train a classifier of messages.

    torch's random generators are seeded for the run, and afterwards as they were before.

    Args:
        settings: see `ClassifierSettings`.
        reporter: hears what happens; silent when None. `fastgpt.training.terminal_reporter()` shows it.
        resume: go on with the run in `out_dir`, which has these settings.

    Returns:
        The classifier, its accuracies and its history.

    Raises:
        FileExistsError: `out_dir` holds a run already, and `resume` is False.
        FileNotFoundError, ValueError: the data, the base model or a setting cannot be used.
        DivergedError: the loss has become nan or infinite.
    """
    settings = resolve(settings, trainable_with_base="last_block")
    messages = load_messages() if settings.data is None else read_messages(settings.data)
    classes = classes_of(messages)
    parts = split_messages(
        balance(messages) if settings.balance else messages, settings.train_frac, settings.validation_frac
    )
    _check_parts(parts)
    with own_random_numbers(settings.seed, settings.device):
        classifier, info = _make_classifier(settings, classes, parts[0])
        train, validation, test = (_encode(classifier, part) for part in parts)
        model, device = classifier.model, torch.device(settings.device)

        def loss(rows: Sequence[int]) -> Tensor:
            index = torch.tensor(rows)
            logits = last_logits(model, train.rows[index].to(device))
            return functional.cross_entropy(logits, train.labels[index].to(device))

        task = Task(
            n_rows=len(train),
            tokens_per_row=classifier.max_length,
            loss=loss,
            measure=lambda: _measure(model, validation, device),
            info={**info, "data_crc32": zlib.crc32(repr(messages).encode())},
            also=("out_head.linear.weight", "out_head.linear.bias"),
        )
        loop = Loop(settings, model, task, reporter or Reporter())
        interrupted = loop.run(resume=resume)
        accuracies = (
            [math.nan] * 3 if interrupted else [_accuracy(model, part, device) for part in (train, validation, test)]
        )
    return ClassifierResult(
        classifier=classifier,
        settings=settings,
        n_train=len(train),
        n_validation=len(validation),
        n_test=len(test),
        losses=tuple(loop.losses()),
        evaluations=tuple(loop.evaluations),
        train_accuracy=accuracies[0],
        validation_accuracy=accuracies[1],
        test_accuracy=accuracies[2],
        majority_share=max(Counter(test.labels.tolist()).values()) / len(test),
        interrupted=interrupted,
        seconds=loop.seconds,
    )


def load_classifier(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Classifier:
    """Open a classifier that `finetune_classifier` has saved.

    Args:
        path: the folder of the run, or its best.safetensors.
        device: where to put the model.

    Returns:
        The classifier, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or no classifier.
    """
    file = find_weights(path)
    tensors, info = read_tensors(file, wanted=is_weight)
    classes = info.get("classes")
    if info.get("task") != ClassifierSettings.task or not isinstance(classes, list):
        raise CheckpointError(f"{file} is no classifier; train one with fastgpt finetune classify.")
    with torch.device("meta"):
        model = make_classifier_model(GPTModel(info["config"]), len(classes))
    model = model.to_empty(device="cpu")
    load_tensors(file, model, tensors)
    return Classifier(
        model=model.to(device).eval(),
        tokenizer=OrdinaryTokenizer(get_tokenizer(info["tokenizer"])),
        classes=tuple(classes),
        max_length=int(info["max_length"]),
        pad_token_id=int(info["pad_token_id"]),
    )


def make_classifier_model(model: GPTModel, n_classes: int) -> GPTModel:
    """Give a GPT a new random head with one output a class (with a bias, as in chapter 6); changed in place."""
    head = model.out_head
    model.out_head = nn.Linear(head.in_features, n_classes).to(device=head.weight.device, dtype=head.weight.dtype)
    return model


def _make_classifier(
    settings: ClassifierSettings, classes: tuple[str, ...], train: Sequence[Message]
) -> tuple[Classifier, dict[str, Any]]:
    """The untrained classifier on its device, and what a file must say about it."""
    model, config, tokenizer = begin_with(settings)
    context = config["context_length"]
    longest = max(len(tokenizer.encode(message.text)) for message in train)
    max_length = min(longest, context) if settings.max_length is None else settings.max_length
    if max_length > context:
        raise ValueError(f"max_length is {max_length}, but the model's context_length is {context}.")
    make_classifier_model(model, len(classes))
    choose_trainable(model, settings)
    classifier = Classifier(
        model=model.to(settings.device),
        tokenizer=tokenizer,
        classes=classes,
        max_length=max_length,
        pad_token_id=tokenizer.eot_token,
    )
    info = {
        "task": settings.task,
        "config": config,
        "tokenizer": tokenizer.name,
        "classes": list(classes),
        "max_length": max_length,
        "pad_token_id": tokenizer.eot_token,
    }
    return classifier, info


def _encode(classifier: Classifier, messages: Sequence[Message]) -> _Part:
    number = {name: i for i, name in enumerate(classifier.classes)}
    labels = torch.tensor([number[message.label] for message in messages], dtype=torch.int64)
    return _Part(classifier.encode([message.text for message in messages]), labels)


def _logits(model: GPTModel, part: _Part, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, labels in zip(part.rows.split(_EVALUATION_ROWS), part.labels.split(_EVALUATION_ROWS), strict=True):
        yield last_logits(model, rows.to(device)), labels.to(device)


def _measure(model: GPTModel, part: _Part, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy over all rows."""
    losses, hits = 0.0, 0
    for logits, labels in _logits(model, part, device):
        losses += functional.cross_entropy(logits, labels, reduction="sum").item()
        hits += int((logits.argmax(dim=-1) == labels).sum())
    return losses / len(part), hits / len(part)


@torch.no_grad()
def _accuracy(model: GPTModel, part: _Part, device: torch.device) -> float:
    return _measure(model, part, device)[1]


def _check_parts(parts: Sequence[Sequence[Message]]) -> None:
    names = ("training", "validation", "test")
    for name, part in zip(names, parts, strict=True):
        if not part:
            sizes = ", ".join(f"{n} {len(p)}" for n, p in zip(names, parts, strict=True))
            raise ValueError(f"The {name} part is empty ({sizes} messages); give more messages or other shares.")
