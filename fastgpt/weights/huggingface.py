"""Hugging Face's GPT-2, in and out, without the transformers package.

In:  a folder with config.json and model.safetensors (or pytorch_model.bin, or shards of either), or a model in memory.
Out: a folder that transformers' GPT2LMHeadModel.from_pretrained loads.

Two rules of writing. GPT-2 in transformers always has biases of queries, keys and values: a model that was built with
qkv_bias=False is written with biases of 0, which compute the same. A head that equals the token embedding is written as
tied (tie_word_embeddings true, no lm_head.weight); any other one as a head of its own (false, lm_head.weight).

Source: Raschka, chapter 5 and its bonus material on Hugging Face weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.config import check_config
from fastgpt.weights.checkpoint_files import read_weights
from fastgpt.weights.errors import WeightsError
from fastgpt.weights.files import write_tensors, write_text
from fastgpt.weights.layouts import to_book, to_huggingface
from fastgpt.weights.models import book_views, build_model, copy_weights, model_config
from fastgpt.weights.safetensors_files import read_json

# Names of the same tanh form of GELU.
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast")
# Vocabularies whose last id is <|endoftext|>: GPT-2's, and that of bytes.
_KNOWN_VOCABULARIES = (50257, 257)


def load_huggingface(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a Hugging Face GPT-2.

    Args:
        folder: with config.json and the weights; or a file of weights with config.json beside it.
        model: where to load to, see `load_weights_file`; by default a new `GPTModel` with qkv_bias=True, in the dtype
            of the token embedding.

    Returns:
        The model; a new one is on the CPU in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        WeightsError: a file is damaged, or describes another model than a GPT-2 of the book's kind.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path} (looked from {Path.cwd()}).")
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"There is no {config}; it tells the number of heads, which the weights do not.")
    try:
        cfg = config_from_huggingface(read_json(config))
    except WeightsError as error:
        raise WeightsError(f"{config}: {error}") from None
    weights = read_weights(path)
    if model is None:
        return build_model(path, weights, cfg)
    copy_weights(path, weights, model)
    return model


def save_huggingface(model: nn.Module, folder: str | os.PathLike[str], *, eot_token: int | None = None) -> None:
    """Write model.safetensors, config.json and generation_config.json for transformers' GPT2LMHeadModel.

    Args:
        model: as for `load_weights_file`; attention must be `GPTModel`'s, with `num_heads`.
        folder: where; made if it is not there. Each file appears whole or not at all.
        eot_token: the id that begins and ends a text; by default the last id of GPT-2's vocabulary and of the bytes',
            for any other vocabulary none.

    Raises:
        WeightsError: the model has tensors that GPT2LMHeadModel has no place for, such as the bias of a classifier.
    """
    folder = Path(folder)
    weights = book_views(model)
    # Equal in value is tied: transformers gives both one tensor, as the released GPT-2 has it.
    embedding, head = weights.get("tok_emb.weight"), weights.get("out_head.weight")
    tied = embedding is not None and head is not None and embedding.shape == head.shape and torch.equal(embedding, head)
    tensors = to_huggingface(weights, tied=tied)
    cfg = model_config(model)
    if eot_token is None and cfg["vocab_size"] in _KNOWN_VOCABULARIES:
        eot_token = cfg["vocab_size"] - 1
    config = huggingface_config(cfg, tied=tied, eot_token=eot_token)
    config["torch_dtype"] = str(weights["tok_emb.weight"].dtype).removeprefix("torch.")
    generation = {"_from_model_config": True, "bos_token_id": eot_token, "eos_token_id": eot_token}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors, {})
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2, sort_keys=True) + "\n")


def huggingface_config(cfg: Mapping[str, Any], *, tied: bool = True, eot_token: int | None = 50256) -> dict[str, Any]:
    """A book configuration as the content of transformers' config.json.

    Args:
        cfg: see `fastgpt.config.check_config`.
        tied: whether the head is the token embedding.
        eot_token: the id that begins and ends a text, or None.
    """
    cfg = check_config(cfg)
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": cfg["drop_rate_attn"],
        "bos_token_id": eot_token,
        "embd_pdrop": cfg["drop_rate_emb"],
        "eos_token_id": eot_token,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": cfg["context_length"],
        "n_embd": cfg["emb_dim"],
        "n_head": cfg["n_heads"],
        "n_inner": None,
        "n_layer": cfg["n_layers"],
        "n_positions": cfg["context_length"],
        "resid_pdrop": cfg["drop_rate_shortcut"],
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": cfg["vocab_size"],
    }


def config_from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """The book's configuration for the content of a GPT-2's config.json.

    Args:
        config: as transformers writes it; what is missing has transformers' default.

    Returns:
        A new configuration, qkv_bias True; three drop rates where transformers' three differ.

    Raises:
        WeightsError: it describes a model that the book's classes do not compute.
    """
    kind = config.get("model_type", "gpt2")
    if kind != "gpt2":
        raise WeightsError(f"this is a {str(kind)[:40]!r} model, wanted 'gpt2'.")
    emb_dim = config.get("n_embd", 768)
    needed: dict[str, tuple[Any, ...]] = {
        "activation_function": ("gelu_new", *_TANH_GELUS),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * emb_dim if isinstance(emb_dim, int) else None),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for key, allowed in needed.items():
        if config.get(key, allowed[0]) not in allowed:
            raise WeightsError(f"{key} is {str(config[key])[:40]!r}; the book's model computes only {allowed[-1]!r}.")
    rates = {
        "drop_rate_emb": config.get("embd_pdrop", 0.1),
        "drop_rate_attn": config.get("attn_pdrop", 0.1),
        "drop_rate_shortcut": config.get("resid_pdrop", 0.1),
    }
    same = rates["drop_rate_emb"] == rates["drop_rate_attn"] == rates["drop_rate_shortcut"]
    cfg = {
        "vocab_size": config.get("vocab_size", 50257),
        "context_length": config.get("n_positions", config.get("n_ctx", 1024)),
        "emb_dim": emb_dim,
        "n_heads": config.get("n_head", 12),
        "n_layers": config.get("n_layer", 12),
        **({"drop_rate": rates["drop_rate_emb"]} if same else rates),
        "qkv_bias": True,
    }
    try:
        check_config(cfg)
    except (TypeError, ValueError) as error:
        raise WeightsError(str(error)[:300]) from None
    return cfg


def assign_check(left: Tensor, right: Tensor) -> nn.Parameter:
    """A new parameter with a copy of `right`, once the shapes agree (the book's bonus material of chapter 5).

    Raises:
        ValueError: the shapes differ.
    """
    if left.shape != right.shape:
        raise ValueError(f"Shape mismatch. Left: {tuple(left.shape)}, Right: {tuple(right.shape)}")
    return nn.Parameter(right.detach().clone(memory_format=torch.contiguous_format))


def load_weights(gpt: Any, gpt_hf: nn.Module) -> None:
    """Put the weights of a transformers GPT-2 in memory into a book-style model (bonus material of chapter 5).

    Args:
        gpt: a model with the book's names, made with qkv_bias=True. It gets new parameters, the head a copy of its own.
        gpt_hf: a GPT2Model or a GPT2LMHeadModel.

    Raises:
        ValueError: a shape or a name differs; the model is as it was.
    """
    load_weights_into_gpt(gpt, gpt_hf.state_dict())


def load_weights_into_gpt(gpt: Any, params: Mapping[str, Tensor]) -> None:
    """As `load_weights`, from the flat dict of a Hugging Face safetensors file ("wte.weight", "h.0.attn...").

    The book has two functions of this name; the other one takes OpenAI's nested parameters and is
    `fastgpt.weights.load_weights_into_gpt`.

    Args:
        gpt: as for `load_weights`.
        params: tensors by name, with or without "transformer." before them.

    Raises:
        ValueError: a shape or a name differs; the model is as it was.
    """
    weights = to_book(params)
    targets = dict(gpt.named_parameters(remove_duplicate=False))
    missing = [name for name in targets if name not in weights] + [name for name in weights if name not in targets]
    if missing:
        hint = " GPT-2 needs a model built with qkv_bias=True." if missing[0].endswith(".bias") else ""
        raise WeightsError(f"{missing[0]} is only in one of the model and the weights.{hint}")
    ready = []
    for name, target in targets.items():
        try:
            ready.append((name, assign_check(target, weights[name])))
        except ValueError as error:
            raise WeightsError(f"{name}: {error}. Is this the configuration of these weights' size?") from None
    for name, parameter in ready:
        owner, _, leaf = name.rpartition(".")
        setattr(gpt.get_submodule(owner), leaf, parameter)
