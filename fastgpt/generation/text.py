"""The book's `generate_text_simple` (chapter 4) and `generate` (chapter 5): same arguments, same tokens, with a cache.

They run through the engine when the model is a GPT of the book's structure, else they ask the model for each token, as
the book does. The model's mode is left alone: while dropout is on, the book generates with dropout, so then every token
comes from the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.generation.engine import Engine, PlainEngine
from fastgpt.generation.errors import OutOfRangeError
from fastgpt.generation.fast_head import HeadCopy
from fastgpt.generation.generator import modules_of, verify
from fastgpt.generation.native_engine import make_engine
from fastgpt.generation.network import Network, NotRecognised, read_network
from fastgpt.generation.rows import read_prompts
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.session import Session

logger = logging.getLogger("fastgpt")


def generate_text_simple(
    model: Callable[[Tensor], Tensor], idx: Tensor, max_new_tokens: int, context_size: int
) -> Tensor:
    """Append the likeliest token, `max_new_tokens` times (chapter 4).

    Args:
        model: any callable from token ids (batch, n_tokens) to logits (batch, n_tokens, vocab_size); one of the book's
            structure runs with a cache.
        idx: the prompts, (batch, n_tokens), int64.
        max_new_tokens: how many tokens to append.
        context_size: only the last `context_size` tokens are read, at positions from 0.

    Returns:
        Prompts and new tokens, (batch, n_tokens + max_new_tokens), int64.

    Raises:
        TypeError, ValueError: `idx` is not a batch of token ids.
        IndexError: more tokens would be read than the model's context holds, or a token is unknown.
    """
    return generate(model, idx, max_new_tokens, context_size)


def generate(
    model: Callable[[Tensor], Tensor],
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    *,
    seed: int | None = None,
) -> Tensor:
    """Append tokens, drawn or likeliest, until `eos_id` (chapter 5).

    Args:
        model, idx, max_new_tokens, context_size: as for `generate_text_simple`.
        temperature: above 0 draws from torch's global generator; 0 takes the likeliest token.
        top_k: how many of the best tokens may be drawn, ties with the last of them too; None for all.
        eos_id: the token that ends a row. It is not appended; in a batch, rows that have ended are filled with it until
            the last one ends. None: never stop.
        seed: not in the book: draws so that calls repeat, and faster on a CPU; others than the global generator's.

    Returns:
        Prompts and new tokens, (batch, n_tokens + at most max_new_tokens), int64.

    Raises:
        As `generate_text_simple`; ValueError: top_k is larger than the vocabulary.
    """
    if max_new_tokens <= 0:
        return idx
    prompts = _batch(idx)
    # The book draws when temperature > 0.0 and is greedy otherwise, also for negative numbers.
    sampling = Sampling(temperature if temperature > 0.0 else 0.0, top_k, seed=seed)
    if len(prompts) == 0:
        return torch.cat([prompts, prompts.new_zeros(0, max_new_tokens)], dim=1)
    engine = _engine(model, prompts, max_new_tokens, context_size, eos_id is not None)
    session = Session(engine, prompts, max_new_tokens, sampling, eos_id, head_copy=HeadCopy())
    session.ahead = True
    return torch.cat([prompts, *session], dim=1)


def steps(model: Callable[[Tensor], Tensor], idx: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
    """The likeliest tokens one by one, (batch, 1) each; OutOfRangeError when a sequence outgrows the model's context.

    Args:
        model, idx, max_new_tokens: as for `generate_text_simple`.
    """
    prompts = _batch(idx)
    engine = _engine(model, prompts, max_new_tokens, None)
    return iter(Session(engine, prompts, max_new_tokens, Sampling()))


def _batch(idx: Tensor) -> Tensor:
    prompts = read_prompts(idx, None)
    if not isinstance(prompts, Tensor):
        raise TypeError(f"idx must be a (batch, n_tokens) tensor; got {type(idx).__name__}. Lists go to Generator.")
    return prompts


def _engine(
    model: Callable[[Tensor], Tensor],
    prompts: Tensor,
    max_new_tokens: int,
    context_size: int | None,
    may_end: bool = True,
) -> Engine:
    """The engine for this model; with context_size None nothing is cropped."""
    try:
        network = _network(model, prompts, context_size)
    except NotRecognised as reason:
        logger.info("generate runs without a cache: %s", reason)
        return PlainEngine(model, context_size)
    context_length = network.context_length
    if context_size is not None and context_size <= context_length:
        return make_engine(network, context_size, "exact", max_new_tokens)
    to_read = min(context_size or 0, prompts.shape[1] + max_new_tokens - 1)
    if not may_end and to_read > context_length:
        raise OutOfRangeError(
            f"context_size is {context_size} and {to_read} tokens would be read, but the model's context holds "
            f"{context_length}; pass context_size={context_length}, and only the last {context_length} tokens are read."
        )
    return make_engine(network, context_length, "error", max_new_tokens)


def _network(model: Any, prompts: Tensor, context_size: int | None) -> Network:
    """The model as a network; raises NotRecognised wherever the plain loop is needed, or gives the better error."""
    if context_size is not None and context_size < 1:
        raise NotRecognised(f"context_size is {context_size}")
    dropout = next((m for m in modules_of(model) if _drops(m)), None)
    if dropout is not None:
        raise NotRecognised(f"dropout is on ({dropout}), so every token is computed with it; model.eval() ends that")
    network = read_network(model)
    if prompts.device != network.tok_emb.device:
        raise NotRecognised(f"idx is on {prompts.device}, the model on {network.tok_emb.device}")
    if not 0 <= int(prompts.min()) <= int(prompts.max()) < network.vocab_size:
        raise NotRecognised("idx holds tokens outside the vocabulary")
    if network.foreign:
        verify(network, model)
    return network


def _drops(module: nn.Module) -> bool:
    if not module.training:
        return False
    p = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
    return isinstance(p, float | int) and p > 0
