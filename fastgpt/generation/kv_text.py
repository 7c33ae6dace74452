"""The book's generating functions for models with a key-value cache.

They end with the model in evaluation mode, as the book's do. A GPT of the book's structure runs on the same engine as
`Generator`; another model with `cfg`, `reset_kv_cache()` and `forward(..., cache=)` runs by that protocol.

Source: Raschka, Build a Large Language Model (From Scratch), bonus material of chapter 4 (KV cache).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt import reference
from fastgpt.generation import text
from fastgpt.generation.generator import context_length_of
from fastgpt.generation.kv_model import KVCache


def generate_text_simple(
    model: Any, idx: Tensor, max_new_tokens: int, context_size: int | None = None, use_cache: bool = True
) -> Tensor:
    """Append the likeliest token, `max_new_tokens` times.

    Args:
        model: a model with a cache, such as `fastgpt.book.kv_cache.gpt2.GPTModel`, or any GPT of the book's.
        idx: the prompts, (batch, n_tokens), int64.
        max_new_tokens: how many tokens to append.
        context_size: only the last `context_size` tokens are read; the model's context length when None.
        use_cache: False asks the model for all logits of each step, as chapter 4 does.

    Returns:
        Prompts and new tokens, (batch, n_tokens + max_new_tokens), int64; the same with and without the cache, also
        past the context. The model stays in evaluation mode.

    Raises:
        TypeError, ValueError, IndexError: as `fastgpt.generate_text_simple`.
    """
    model.eval()
    limit = context_size or context_length_of(model)
    if not use_cache:
        return reference.generate_text_simple(model, idx, max_new_tokens, limit)
    if hasattr(model, "reset_kv_cache"):
        model.reset_kv_cache()
    if _speaks_protocol(model):
        new = list(_by_protocol(model, idx[:, -limit:], max_new_tokens))
        return torch.cat([idx, *new], dim=1)
    return text.generate_text_simple(model, idx, max_new_tokens, limit)


def generate_text_simple_cached(
    model: Any, idx: Tensor, max_new_tokens: int, context_size: int | None = None, use_cache: bool = True
) -> Tensor:
    """`generate_text_simple` under the name that it has in the chapter's own script."""
    return generate_text_simple(model, idx, max_new_tokens, context_size, use_cache)


def generate_text_simple_stream(
    model: Any,
    token_ids: Tensor,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    context_size: int | None = None,
) -> Iterator[Tensor]:
    """Give the likeliest tokens step by step.

    Args:
        model: as for `generate_text_simple`.
        token_ids: the prompts, (batch, n_tokens), int64.
        max_new_tokens: how many steps at most.
        eos_token_id: stop, before giving it, when all rows choose this token in the same step.
        context_size: has no effect, as in the book; the model's own context holds.

    Yields:
        (batch, 1) int64 tensors.

    Raises:
        TypeError, ValueError, IndexError: as `fastgpt.generate_text_simple`, or the sequence outgrows the context.
    """
    if context_size is not None:
        warnings.warn(
            "context_size has no effect on generate_text_simple_stream: prompts are not cropped, and the model's own "
            "context length holds.",
            stacklevel=2,
        )
    model.eval()
    if hasattr(model, "reset_kv_cache"):
        model.reset_kv_cache()
    if _speaks_protocol(model):
        steps = _by_protocol(model, token_ids, max_new_tokens)
    else:
        steps = text.steps(model, token_ids, max_new_tokens)
    for tokens in steps:
        if eos_token_id is not None and bool((tokens == eos_token_id).all()):
            return
        yield tokens


def trim_input_tensor(input_ids_tensor: Tensor, context_len: int, max_new_tokens: int) -> Tensor:
    """Crop prompts at their left so that `max_new_tokens` more fit the context.

    Args:
        input_ids_tensor: (batch, n_tokens).
        context_len: the model's context length.
        max_new_tokens: how many tokens will be appended.

    Returns:
        The last `context_len - max_new_tokens` tokens of each row, or all.

    Raises:
        ValueError: the new tokens alone fill the context.
    """
    if max_new_tokens >= context_len:
        raise ValueError(
            f"max_new_tokens must be smaller than context_len, so that a prompt fits too; got {max_new_tokens} new "
            f"tokens for a context of {context_len}."
        )
    return input_ids_tensor[:, -(context_len - max_new_tokens) :]


def _speaks_protocol(model: Any) -> bool:
    """True where the model's own cache must be used: the engine knows no other architecture and no window."""
    if not (hasattr(model, "reset_kv_cache") and hasattr(model, "cfg")):
        return False
    window = getattr(model, "kv_window_size", None)
    return not hasattr(model, "pos_emb") or (window is not None and window < context_length_of(model))


def _by_protocol(model: Any, idx: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
    cache = KVCache(n_layers=model.cfg["n_layers"])
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx, cache=cache)
        idx = logits[:, -1].argmax(dim=-1, keepdim=True)
        yield idx
