"""What a pretraining run is made of: one frozen record that goes into every checkpoint as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from fastgpt.config import check_config

DTYPES = ("float32", "bfloat16")

_OPTIONAL_COUNTS = ("context", "steps", "eval_batches")
_COUNTS = ("batch_size", "grad_accumulation", "eval_every", "sample_tokens", *_OPTIONAL_COUNTS)
_AMOUNTS = ("lr", "min_lr", "weight_decay", "grad_clip", "warmup_steps", "sample_temperature")


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """Settings of `fastgpt.training.pretrain`.

    Attributes:
        model: the book's configuration; without "vocab_size" that of the tokenizer is filled in.
        data: path of a UTF-8 text or of a token file; None for the story that ships with fastgpt.
        tokenizer: name for `fastgpt.get_tokenizer`. A token file knows its own.
        out_dir: folder of the checkpoints; None keeps nothing.
        batch_size: rows a batch.
        context: tokens a row; None for the model's `context_length`.
        grad_accumulation: batches whose gradients are added up to one step.
        steps, epochs: how long; give one. An epoch is as many tokens as the training part has.
        lr, min_lr, warmup_steps: peak, end and rise of the learning rate, see `WarmupCosine`.
        weight_decay, betas: of AdamW; only matrices decay.
        grad_clip: largest norm of all gradients together; 0 for no limit.
        eval_every: steps from one evaluation (and checkpoint) to the next; the last step always has one.
        eval_batches: batches of an evaluation, spread evenly over the validation part; None for all of it.
        val_fraction: share of the tokens, at the end of the text, that is kept for validation.
        sample_prompt: text that the model goes on from at each evaluation; None writes none.
        sample_tokens, sample_temperature: length and temperature of these texts.
        seed: of the weights, the batches, dropout and samples.
        device: "cpu", "cuda", "cuda:1" ...; "auto" for a GPU if there is one.
        dtype: "float32", or "bfloat16": float32 weights, products in bfloat16 (autocast).
        activations: "float32", or "bfloat16": what backward reads is kept in half the memory, gradients are about 0.4 %
            off (see `fastgpt.memory.bfloat16_activations`).
    """

    model: Mapping[str, Any]
    data: str | None = None
    tokenizer: str = "auto"
    out_dir: str | None = None
    batch_size: int = 8
    context: int | None = None
    grad_accumulation: int = 1
    steps: int | None = None
    epochs: float | None = None
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    eval_every: int = 50
    eval_batches: int | None = 32
    val_fraction: float = 0.1
    sample_prompt: str | None = None
    sample_tokens: int = 50
    sample_temperature: float = 0.8
    seed: int = 123
    device: str = "auto"
    dtype: str = "float32"
    activations: str = "float32"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the setting, when a value cannot work."""
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_COUNTS:
                continue
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
        for name in _AMOUNTS:
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0; got {value!r}.")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"Give steps or epochs, one of them; got steps={self.steps}, epochs={self.epochs}.")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be above 0; got {self.epochs!r}.")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1; got {self.val_fraction!r}.")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1; got {self.seed!r}.")
        for name in ("dtype", "activations"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}; got {getattr(self, name)!r}.")

    def to_json(self) -> str:
        """The settings as JSON, indented, one a line."""
        return json.dumps(self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dict that JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"model": dict(self.model), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainSettings:
        """The settings of `to_dict`.

        Raises:
            ValueError: there is a setting that this version of fastgpt does not know, or a value cannot work.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"Unknown settings: {', '.join(unknown)}. Were they written by a newer fastgpt?")
        return cls(**{**values, "betas": tuple(values.get("betas", cls.betas))})


def resolve(settings: PretrainSettings, *, n_vocab: int, tokenizer: str) -> PretrainSettings:
    """Replace what stands for something else: "auto", a missing vocabulary size, a missing context.

    Args:
        settings: as the user gave them.
        n_vocab, tokenizer: size and name of the tokenizer of the data.

    Returns:
        Settings that mean the same on any machine.

    Raises:
        KeyError, TypeError, ValueError: the model's configuration does not work, or does not fit the data.
    """
    config = check_config({"vocab_size": n_vocab, **settings.model})
    context = config["context_length"] if settings.context is None else settings.context
    if config["vocab_size"] < n_vocab:
        raise ValueError(
            f"The tokenizer {tokenizer!r} has {n_vocab:,} ids, but the model's vocab_size is {config['vocab_size']:,}. "
            f"Leave vocab_size out of the configuration, or set it to {n_vocab}."
        )
    if context > config["context_length"]:
        raise ValueError(f"context is {context}, but the model's context_length is {config['context_length']}.")
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return dataclasses.replace(settings, model=config, context=context, tokenizer=tokenizer, device=device)
