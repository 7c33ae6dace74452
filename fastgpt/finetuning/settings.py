"""What a fine-tuning run is made of: frozen records that go into its checkpoints as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fastgpt.finetuning.lora import check_lora

TRAINABLE = ("auto", "all", "last_block", "head", "lora")


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """What both kinds of runs share.

    Attributes:
        data: path of the data; None for what ships with fastgpt.
        base: the model to begin with: a file or the folder of a `fastgpt train` run, or a folder in Hugging Face's
            form. None begins with random weights.
        model: the configuration of a model with random weights; None for a small one. Not together with `base`.
        tokenizer: name for `fastgpt.get_tokenizer`; a base model that knows its own goes before it.
        out_dir: folder of the run; None keeps nothing.
        trainable: which weights learn: "all", "last_block" (with the last norm and the head, as in chapter 6), "head",
            "lora" (appendix E: all linear layers get a LoRA layer, nothing else learns), or "auto", which is "all" for
            random weights and what suits the task for a base model.
        lora_rank, lora_alpha, lora_scaling: see `fastgpt.finetuning.replace_linear_with_lora`.
        epochs: passes over the training part.
        batch_size: rows a step.
        lr: peak learning rate; None for 5e-5 with a base model, 5e-4 with LoRA or with random weights.
        weight_decay: of AdamW, on matrices.
        grad_clip: largest norm of all gradients together; 0 for no limit.
        eval_every: steps from one evaluation (and checkpoint) to the next; None for once an epoch.
        seed: of new weights, the order of the batches and dropout. The split has the book's own seed.
        device: "cpu", "cuda", "cuda:1" ...; "auto" for a GPU if there is one.
    """

    task: ClassVar[str] = ""

    data: str | None = None
    base: str | None = None
    model: Mapping[str, Any] | None = None
    tokenizer: str = "auto"
    out_dir: str | None = None
    trainable: str = "auto"
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_scaling: str = "alpha/rank"
    epochs: int = 5
    batch_size: int = 8
    lr: float | None = None
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eval_every: int | None = None
    seed: int = 123
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the setting, when a value cannot work."""
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_count("eval_every", self.eval_every, optional=True)
        for name in ("lr", "weight_decay", "grad_clip"):
            value = getattr(self, name)
            if value is None and name == "lr":
                continue
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0; got {value!r}.")
        if self.trainable not in TRAINABLE:
            raise ValueError(f"trainable must be one of {', '.join(TRAINABLE)}; got {self.trainable!r}.")
        check_lora(self.lora_rank, self.lora_alpha, self.lora_scaling)
        if self.base is not None and self.model is not None:
            raise ValueError("Give base (a trained model) or model (a configuration), not both.")
        if self.base is None and self.trainable in ("head", "last_block"):
            raise ValueError(
                f"trainable is {self.trainable!r}, but without a base model the frozen weights would stay random. "
                "Give base, or use trainable='all'."
            )
        if not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 62):
            raise ValueError(f"seed must be a whole number from 0 to 2**62 - 1; got {self.seed!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dict that JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"model": None if self.model is None else dict(self.model)}

    @property
    def peak_lr(self) -> float:
        """The learning rate that is used."""
        if self.lr is not None:
            return self.lr
        return 5e-4 if self.base is None or self.trainable == "lora" else 5e-5


@dataclasses.dataclass(frozen=True)
class ClassifierSettings(FinetuneSettings):
    """Settings of `finetune_classifier`; see `FinetuneSettings` for the rest.

    Attributes:
        max_length: tokens a row; None: as long as the longest training message, at most the model's context.
        balance: draw as many messages of each label as the rarest has.
        train_frac, validation_frac: shares of the messages; the rest is for the test.
    """

    task: ClassVar[str] = "classify"

    max_length: int | None = None
    balance: bool = True
    train_frac: float = 0.7
    validation_frac: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError, naming the setting, when a value cannot work."""
        super().__post_init__()
        check_count("max_length", self.max_length, optional=True)
        check_shares(train_frac=self.train_frac, validation_frac=self.validation_frac)


@dataclasses.dataclass(frozen=True)
class InstructionSettings(FinetuneSettings):
    """Settings of `finetune_instructions`; see `FinetuneSettings` for the rest.

    Attributes:
        epochs: passes over the training part.
        max_length: longer rows are cut to it; None for the model's context.
        train_frac, test_frac: shares of the entries; the rest is for validation.
        answers: how many entries of the test part the model answers at the end; None for all.
        answer_tokens: the longest answer.
    """

    task: ClassVar[str] = "instruct"

    epochs: int = 2
    max_length: int | None = None
    train_frac: float = 0.85
    test_frac: float = 0.1
    answers: int | None = None
    answer_tokens: int = 256

    def __post_init__(self) -> None:
        """Raise ValueError, naming the setting, when a value cannot work."""
        super().__post_init__()
        check_count("max_length", self.max_length, optional=True)
        check_count("answer_tokens", self.answer_tokens)
        if self.answers is not None and not (isinstance(self.answers, int) and self.answers >= 0):
            raise ValueError(f"answers must be a whole number of at least 0, or None for all; got {self.answers!r}.")
        check_shares(train_frac=self.train_frac, test_frac=self.test_frac)


def resolve(settings: FinetuneSettings, trainable_with_base: str) -> Any:
    """The settings with "auto" replaced.

    Args:
        settings: as the user gave them.
        trainable_with_base: what "auto" stands for when there is a base model.
    """
    trainable, device = settings.trainable, settings.device
    if trainable == "auto":
        trainable = "all" if settings.base is None else trainable_with_base
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no GPU here; use device='cpu'.")
    return dataclasses.replace(settings, trainable=trainable, device=device)


def check_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise ValueError unless the value is a whole number of at least 1, or None where that is allowed."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")


def check_shares(**shares: float) -> None:
    """Raise ValueError unless all shares are above 0 and leave something over."""
    if not all(isinstance(share, (int, float)) and 0 < share < 1 for share in shares.values()):
        raise ValueError(f"Shares are between 0 and 1; got {shares}.")
    if sum(shares.values()) >= 1:
        raise ValueError(f"{' + '.join(shares)} must stay below 1, so that a third part is left; got {shares}.")
