"""The model's side of weight files: its parameters under the book's names, its configuration, the copy into it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.weights.errors import WeightsError
from fastgpt.weights.layouts import infer_config, plain_names, to_book

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SHOWN = 4


def book_views(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers under the book's names, without masks: views that can be written to.

    Raises:
        WeightsError: this is no GPT-2 under the names of `GPTModel` or `GPTModelFast`.
    """
    buffers = {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set and name != "mask"
    }
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)} | buffers
    if "tok_emb.weight" not in plain_names(tensors):
        raise WeightsError(f"{type(model).__name__} is no model with the book's names: it has no tok_emb.weight.")
    return to_book(tensors)


def model_config(model: nn.Module) -> dict[str, Any]:
    """The configuration that a model was built with, read from it.

    Args:
        model: `GPTModel`, `GPTModelFast` or the reader's own, bare or inside torch.compile or DDP.

    Returns:
        A new configuration; drop rates that differ stand under exercise 4.3's three keys.

    Raises:
        WeightsError: it is no model of the book's.
    """
    inner: Any = model
    while (wrapped := getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)) is not None:
        inner = wrapped
    blocks = list(inner.trf_blocks) if hasattr(inner, "trf_blocks") else []
    n_heads = getattr(getattr(blocks[0], "att", None), "num_heads", None) if blocks else 1
    cfg = infer_config(book_views(model), n_heads)
    rates = [_rate(inner, "drop_emb")]
    if blocks:
        shortcut = "drop_shortcut" if hasattr(blocks[0], "drop_shortcut") else "drop_resid"
        rates += [_rate(blocks[0].att, "dropout"), _rate(blocks[0], shortcut)]
    if len(set(rates)) == 1:
        return cfg | {"drop_rate": rates[0]}
    del cfg["drop_rate"]
    return cfg | dict(zip(("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut"), rates, strict=True))


def _rate(module: Any, name: str) -> float:
    dropout = getattr(module, name, 0.0)
    return float(dropout if isinstance(dropout, int | float) else getattr(dropout, "p", 0.0))


def build_model(path: str | os.PathLike[str], weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> nn.Module:
    """A new `GPTModel` with these weights; memory is taken once their shapes are known to be those of `cfg`.

    Args:
        path: where they are from, for the error.
        weights: from `read_weights`.
        cfg: the configuration.

    Returns:
        The model on the CPU, in evaluation mode, in the dtype of the token embedding.

    Raises:
        WeightsError: weights and configuration disagree.
    """
    from fastgpt.model import GPTModel

    _check_sizes(path, weights, cfg)
    with torch.device("meta"):
        model = GPTModel(cfg).to(weights["tok_emb.weight"].dtype)
    wanted = {name: tuple(tensor.shape) for name, tensor in book_views(model).items()}
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = next((name for name in wanted | got if wanted.get(name) != got.get(name)), None)
    if wrong is not None:
        raise WeightsError(
            f"{path} does not fit its configuration: {wrong[:100]} has shape {got.get(wrong, 'none')}, wanted "
            f"{wanted.get(wrong, 'none')}. Nothing was loaded."
        )
    model = model.to_empty(device="cpu").eval()
    copy_weights(path, weights, model)
    return model


def _check_sizes(path: str | os.PathLike[str], weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> None:
    try:
        # One head, which always fits: only the other sizes are compared.
        found = infer_config(weights, n_heads=1)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error} Nothing was loaded.") from None
    for key in ("vocab_size", "context_length", "emb_dim", "n_layers"):
        if found[key] != cfg[key]:
            raise WeightsError(f"{path}: its configuration has {key}={cfg[key]}, its weights have {found[key]}.")
    if not weights["tok_emb.weight"].is_floating_point():
        raise WeightsError(f"{path}: its weights are {weights['tok_emb.weight'].dtype}, not floating point.")


def copy_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy weights under the book's names into a model once all of them fit.

    Args:
        path: where they are from, for the error.
        weights: from `read_weights` or `to_book`.
        model: as for `load_weights_file`.

    Raises:
        WeightsError: names, shapes or dtypes differ; the model is as it was.
    """
    targets = book_views(model)
    weights = _without_zero_biases(weights, targets)
    problems = list(_problems(weights, targets))
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise WeightsError(
            f"{path} does not fit this model: {'; '.join(problems[:_SHOWN])}{more}. Nothing was loaded. "
            "Build the model with the configuration of these weights; fastgpt.weights.infer_config reads it from them."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])


def _without_zero_biases(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def needless(name: str) -> bool:
        extra = name not in targets and name.endswith((".att.W_query.bias", ".att.W_key.bias", ".att.W_value.bias"))
        return extra and not weights[name].is_meta and not bool(weights[name].any())

    return {name: tensor for name, tensor in weights.items() if not needless(name)}


def _problems(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in targets if name not in weights)
    yield from (f"{name[:100]} is not part of the model" for name in weights if name not in targets)
    common = [name for name in targets if name in weights]
    for name in common:
        got, wanted = weights[name], targets[name]
        if got.shape != wanted.shape:
            yield f"{name} has shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
        elif got.dtype != wanted.dtype and not (got.dtype in _FLOATS and wanted.dtype in _FLOATS):
            yield f"{name} is {got.dtype}, wanted {wanted.dtype}"
        elif got.is_meta or wanted.is_meta:
            yield f"{name} is on the meta device, which holds no numbers (model.to_empty(device='cpu') gives it memory)"
        elif got.layout != torch.strided:
            yield f"{name} is sparse"
    if {"tok_emb.weight", "out_head.weight"} <= set(common):
        yield from _tie_problem(weights, targets)


def _tie_problem(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Iterator[str]:
    wte, head = weights["tok_emb.weight"], weights["out_head.weight"]
    one = targets["tok_emb.weight"].data_ptr() == targets["out_head.weight"].data_ptr()
    same = one and wte.shape == head.shape == targets["out_head.weight"].shape
    if same and not targets["out_head.weight"].is_meta and wte is not head and not torch.equal(wte, head):
        yield "out_head.weight and tok_emb.weight are one tensor in the model, two different ones in the file"
