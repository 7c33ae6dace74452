"""Chapter 5: OpenAI's GPT-2 parameters into a book-style model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


def assign(left: torch.Tensor, right: Any) -> nn.Parameter:
    """A new parameter with the values of `right`, once the shapes agree.

    Args:
        left: the tensor that is to be replaced; only its shape is read.
        right: an array, any dtype; it is copied.

    Returns:
        A new contiguous parameter on the CPU in the dtype of `right`: OpenAI's matrices come transposed, and every
        product that read their columns would be slower. An optimizer that was made before still holds the old one.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(left.shape) != tuple(right.shape):
        raise ValueError(f"Shape mismatch. Left: {tuple(left.shape)}, Right: {tuple(right.shape)}")
    return nn.Parameter(torch.tensor(right).contiguous())


def load_weights_into_gpt(gpt: Any, params: Mapping[str, Any]) -> None:
    """Put GPT-2's parameters into a model with the book's names (chapter 5).

    `c_attn` holds query, key and value side by side and is cut in three; OpenAI's matrices are (in, out), PyTorch's
    (out, in), so each is transposed. The output head gets a copy of the token embedding of its own. Nothing is
    replaced unless everything fits.

    Args:
        gpt: a model with `tok_emb`, `pos_emb`, `trf_blocks`, `final_norm`, `out_head`, made with qkv_bias=True.
        params: from `download_and_load_gpt2` or `load_gpt2_params_from_tf_ckpt`.

    Raises:
        ValueError: a shape or the number of layers differs, or the model has no query, key and value biases.
    """
    n_layers = len(gpt.trf_blocks)
    if len(params["blocks"]) != n_layers:
        raise ValueError(
            f"The parameters have {len(params['blocks'])} layers, the model has {n_layers}; "
            "build the model with n_layers (and the other sizes) of these parameters' settings."
        )
    changes = list(_assignments(gpt, params))
    ready = []
    for module, name, array, where in changes:
        current = getattr(module, name)
        if current is None:
            raise ValueError(f"The model has no {where}; GPT-2 needs a model built with qkv_bias=True.")
        try:
            ready.append((module, name, assign(current, array)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}. Is this the configuration of these parameters' size?") from None
    for module, name, parameter in ready:
        setattr(module, name, parameter)


def _assignments(gpt: Any, params: Mapping[str, Any]) -> Iterator[tuple[nn.Module, str, np.ndarray, str]]:
    """(module, attribute, values, name for errors) of every parameter."""
    yield gpt.pos_emb, "weight", params["wpe"], "pos_emb.weight"
    yield gpt.tok_emb, "weight", params["wte"], "tok_emb.weight"
    for i, (block, source) in enumerate(zip(gpt.trf_blocks, params["blocks"], strict=True)):
        where = f"trf_blocks.{i}"
        attention = source["attn"]
        weights = np.split(attention["c_attn"]["w"], 3, axis=-1)
        biases = np.split(attention["c_attn"]["b"], 3, axis=-1)
        for name, weight, bias in zip(("W_query", "W_key", "W_value"), weights, biases, strict=True):
            linear = getattr(block.att, name)
            yield linear, "weight", weight.T, f"{where}.att.{name}.weight"
            yield linear, "bias", bias, f"{where}.att.{name}.bias"
        for linear, part, name in (
            (block.att.out_proj, attention["c_proj"], "att.out_proj"),
            (block.ff.layers[0], source["mlp"]["c_fc"], "ff.layers.0"),
            (block.ff.layers[2], source["mlp"]["c_proj"], "ff.layers.2"),
        ):
            yield linear, "weight", part["w"].T, f"{where}.{name}.weight"
            yield linear, "bias", part["b"], f"{where}.{name}.bias"
        for norm, part, name in ((block.norm1, source["ln_1"], "norm1"), (block.norm2, source["ln_2"], "norm2")):
            yield norm, "scale", part["g"], f"{where}.{name}.scale"
            yield norm, "shift", part["b"], f"{where}.{name}.shift"
    yield gpt.final_norm, "scale", params["g"], "final_norm.scale"
    yield gpt.final_norm, "shift", params["b"], "final_norm.shift"
    yield gpt.out_head, "weight", params["wte"], "out_head.weight"
