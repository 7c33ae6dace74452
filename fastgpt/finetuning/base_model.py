"""The model that fine-tuning begins with, and which of its weights learn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from fastgpt.config import check_config
from fastgpt.finetuning.lora import replace_linear_with_lora
from fastgpt.finetuning.settings import FinetuneSettings
from fastgpt.model import GPTModel
from fastgpt.tokenizer import Tokenizer, get_tokenizer
from fastgpt.training.checkpoint import read_info
from fastgpt.vocabulary import GPT2_N_VOCAB
from fastgpt.weights import load_gpt, model_config

_RUN_FILES = ("best.safetensors", "last.safetensors")

# Learns the embedded messages from random weights in a minute on two cores.
SMALL: dict[str, Any] = {
    "context_length": 256,
    "emb_dim": 128,
    "n_heads": 4,
    "n_layers": 4,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


class OrdinaryTokenizer:
    """A tokenizer that takes <|endoftext|> in a text for thirteen plain characters: data is not to end its own row.

    Args:
        tokenizer: one of `get_tokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.name
        self.n_vocab = tokenizer.n_vocab
        self.eot_token = tokenizer.eot_token

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        plain: Any = self.tokenizer
        return list(plain.encode_ordinary(text))

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(ids)


def find_weights(path: str | os.PathLike[str]) -> Path:
    """The weights that a path means: the file itself, or the best (else the last) of a run's folder.

    Raises:
        FileNotFoundError: the folder holds neither.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in _RUN_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} has neither best.safetensors nor last.safetensors; is it the folder of a run?")


def begin_with(settings: FinetuneSettings) -> tuple[GPTModel, dict[str, Any], OrdinaryTokenizer]:
    """The model, its configuration and its tokenizer, on the CPU.

    Args:
        settings: `base`, `model` and `tokenizer` are read.

    Returns:
        (model, configuration, tokenizer).

    Raises:
        FileNotFoundError, ValueError: the base model cannot be read, or model and tokenizer do not go together.
    """
    if settings.base is None:
        tokenizer = OrdinaryTokenizer(get_tokenizer(settings.tokenizer))
        config = check_config({"vocab_size": tokenizer.n_vocab, **(settings.model or SMALL)})
        model: nn.Module = GPTModel(config)
    else:
        model, name = load_base(settings.base, settings.tokenizer)
        tokenizer = OrdinaryTokenizer(get_tokenizer(name))
        config = model_config(model)
    assert isinstance(model, GPTModel)
    if config["vocab_size"] < tokenizer.n_vocab:
        raise ValueError(
            f"The tokenizer {tokenizer.name!r} has {tokenizer.n_vocab:,} ids, but the model's vocab_size is "
            f"{config['vocab_size']:,}; choose the tokenizer that the model was trained with."
        )
    return model, config, tokenizer


def load_base(path: str | os.PathLike[str], tokenizer: str = "auto") -> tuple[nn.Module, str]:
    """A model, and the name of its tokenizer.

    Args:
        path: the folder of a run, or what `fastgpt.weights.load_gpt` opens.
        tokenizer: the name that is taken where neither the file nor the size of the vocabulary tells.

    Raises:
        FileNotFoundError, ValueError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir() and any((path / name).is_file() for name in _RUN_FILES):
        path = find_weights(path)
    model: Any = load_gpt(path)
    own = read_info(path).get("tokenizer") if path.suffix == ".safetensors" and path.is_file() else None
    if own is None and model.tok_emb.weight.shape[0] == GPT2_N_VOCAB:
        own = "gpt2"
    return model, own or tokenizer


def choose_trainable(model: Any, settings: FinetuneSettings) -> None:
    """Freeze what is not to learn, and add LoRA layers when asked for.

    Args:
        model: changed in place; its head must be in place already.
        settings: `trainable` (not "auto") and the LoRA settings are read.
    """
    model.requires_grad_(settings.trainable == "all")
    if settings.trainable == "lora":
        replace_linear_with_lora(model, settings.lora_rank, settings.lora_alpha, scaling=settings.lora_scaling)
    if settings.trainable in ("head", "last_block"):
        model.out_head.requires_grad_(True)
    if settings.trainable == "last_block":
        model.final_norm.requires_grad_(True)
        if len(model.trf_blocks):
            model.trf_blocks[-1].requires_grad_(True)
