"""Logits for the next token of every row: with a cache (`CachedEngine`), or by asking the model (`PlainEngine`).

    prefill             reads whole rows, fills the cache, gives the logits behind each row's last token
    decode_one_token    reads one new token per row against the cache

Positions are absolute: when a row outgrows the context, the book drops its first token and all others move, so every
cached key and value changes. `overflow` says what happens then:

    "exact"   read the last `limit` tokens anew for each token, as the book does; slow, and the same tokens
    "slide"   read the last `limit` // 2 tokens anew, then go on with the cache; fast, other tokens than the book's
    "stop"    end the row (the driver does this before it asks)
    "error"   raise
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.generation.cache import Cache
from fastgpt.generation.errors import OutOfRangeError
from fastgpt.generation.network import Block, Network
from fastgpt.generation.rows import Rows

# Room that a cache has at first for tokens to come, so that a short answer does not take memory for a long one.
_FIRST_SPARE = 128
# A shorter prefix costs more in calls than it saves in products.
_MIN_SHARED = 8


class Engine(Protocol):
    """Anything that gives the logits of the next token."""

    def next_logits(self, rows: Rows, ended: Tensor) -> Tensor:
        """Logits (batch, vocab_size) behind each row; those of rows that have ended may be anything finite."""
        ...


@contextmanager
def eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Switch these modules, and not their children, to evaluation; afterwards each to what it was."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def prefill(network: Network, ids: Tensor, last: Tensor, cache: Cache | None = None) -> Tensor:
    """Read rows from position 0.

    Rows that are shorter than the widest may hold any tokens at their right: attention is causal, so nothing flows from
    there to the left.

    Args:
        ids: (batch, n_tokens) int64.
        last: (batch,) int64: the position behind which each row's logits are wanted.
        cache: takes the keys and values, when given; it must have the room.

    Returns:
        Logits, (batch, vocab_size). The head runs on one position of each row only.
    """
    shared = shared_prefix(ids, last)
    past: list[tuple[Tensor, Tensor]] = []
    if shared:
        _read_rows(network, ids[:1, :shared], None, [], lambda layer, k, v: past.append((k, v)))
    x = _read_rows(network, ids, last, past, None if cache is None else cache.write_prompt)
    return network.head(network.final_norm(x))


def shared_prefix(ids: Tensor, last: Tensor) -> int:
    """How many first tokens, the same in all rows, are worth reading once for all: 0, or `_MIN_SHARED` and more.

    Instructions begin with the same frame, for one. The last token of each row is never part of it.

    Args:
        ids: (batch, n_tokens) int64.
        last: (batch,) int64: position of each row's last token.
    """
    if len(ids) == 1:
        return 0
    differs = (ids != ids[:1]).any(dim=0).nonzero()
    count = int(differs[0]) if len(differs) else ids.shape[1]
    count = min(count, int(last.min()))
    return count if count >= _MIN_SHARED else 0


def _read_rows(
    network: Network,
    ids: Tensor,
    last: Tensor | None,
    past: list[tuple[Tensor, Tensor]],
    keep: Callable[[int, Tensor, Tensor], None] | None,
) -> Tensor:
    """Read rows behind what they share.

    Args:
        ids: (batch, n_tokens) int64.
        last: (batch,) int64: the position that goes on to the head; None when only keys and values are wanted.
        past: each layer's keys and values of the first tokens, (1, n_heads, n_shared, head_dim); empty for none.
        keep: called as keep(layer, keys, values) with those of all tokens.

    Returns:
        (batch, emb_dim): the last block's output at `last`.
    """
    batch = ids.shape[0]
    begin = past[0][0].shape[2] if past else 0
    heads = (batch, ids.shape[1] - begin, network.n_heads, network.head_dim)
    rows = torch.arange(batch, device=ids.device)
    x = F.embedding(ids[:, begin:], network.tok_emb) + network.pos_emb[begin : ids.shape[1]]
    for layer, block in enumerate(network.blocks):
        q, k, v = (part.view(heads).transpose(1, 2) for part in block.split(block.norm1(x)))  # (B, H, T, D)
        if past:
            k, v = (
                torch.cat([p.expand(batch, -1, -1, -1), new], dim=2) for p, new in zip(past[layer], (k, v), strict=True)
            )
        if keep is not None:
            keep(layer, k, v)
        final = layer + 1 == len(network.blocks)
        if final and last is None:
            break
        attended = ops.causal_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, H · D)
        if final and last is not None:
            # Only one position of each row goes on to the head.
            x, attended = x[rows, last - begin], attended[rows, last - begin]
        x = _shortcuts(block, x, attended)
    return x


def decode_one_token(network: Network, tokens: Tensor, lengths: Tensor, even: bool, cache: Cache) -> Tensor:
    """Read one new token per row.

    Args:
        tokens: (batch,) int64, the newest token of each row.
        lengths: (batch,) int64 on the CPU: how long each row is with its new token.
        even: all lengths are equal.
        cache: keys and values of all earlier tokens; takes those of the new ones.

    Returns:
        Logits, (batch, vocab_size).
    """
    batch = tokens.shape[0]
    heads = (batch, network.n_heads, network.head_dim)
    position: int | Tensor = int(lengths[0]) - 1 if even else (lengths - 1).to(tokens.device)
    x = F.embedding(tokens, network.tok_emb) + network.pos_emb[position]  # (B, E)
    for layer, block in enumerate(network.blocks):
        q, k, v = (part.view(heads) for part in block.split(block.norm1(x)))  # (B, H, D)
        cache.write_token(layer, position, k, v)
        attended = ops.decode_attention(q, cache.keys[layer], cache.values[layer], lengths)
        x = _shortcuts(block, x, attended.flatten(1))
    return network.head(network.final_norm(x))


def _shortcuts(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.project(attended)
    return x + block.feed_forward(block.norm2(x))


class CachedEngine:
    """Runs a `Network` with a cache.

    Args:
        network: the model.
        limit: how many tokens of a row are read at most; the context length or less.
        overflow: "exact", "slide" or "error", see above.
        budget: how many tokens will be asked for at most.
        modules: modules that are switched to evaluation for each call.
    """

    def __init__(
        self, network: Network, limit: int, overflow: str, budget: int, modules: Sequence[nn.Module] = ()
    ) -> None:
        self.network = network
        self.limit = limit
        self.overflow = overflow
        self.spare = min(budget, _FIRST_SPARE)
        self.modules = modules
        self.cache: Cache | None = None
        self.starts: Tensor | None = None  # (B,): the first token of each row that is read
        self.filled = False  # the cache holds all tokens but each row's newest

    def next_logits(self, rows: Rows, ended: Tensor) -> Tensor:
        """See `Engine`."""
        with torch.inference_mode(), eval_mode(self.modules):
            if self.starts is None:
                self.starts = torch.zeros_like(rows.lengths)
            sizes = rows.lengths - self.starts
            widest = int(sizes.max())
            if widest > self.limit:
                self.starts, cached = self._move(rows.lengths, sizes, ended)
                sizes = rows.lengths - self.starts
                widest = int(sizes.max())
                if not cached:
                    self.cache = None
                    return self._prefill(rows, sizes)
            if self.cache is None:
                self.cache = self._new_cache(len(sizes))
            self.cache.reserve(widest, self.spare)
            if self.filled:
                return self._decode(rows, sizes, ended, self.cache)
            self.filled = True
            return self._prefill(rows, sizes)

    def _decode(self, rows: Rows, sizes: Tensor, ended: Tensor, cache: Cache) -> Tensor:
        """Logits behind each row's newest token; the cache holds all tokens before it, and has room for it."""
        return decode_one_token(self.network, rows.newest(), sizes, rows.even, cache)

    def _new_cache(self, batch: int) -> Cache:
        network = self.network
        return Cache(len(network.blocks), batch, network.n_heads, network.head_dim, self.limit, like=network.tok_emb)

    def _prefill(self, rows: Rows, sizes: Tensor) -> Tensor:
        assert self.starts is not None
        ids = rows.from_positions(self.starts)
        return prefill(self.network, ids, (sizes - 1).to(ids.device), self.cache)

    def _move(self, lengths: Tensor, sizes: Tensor, ended: Tensor) -> tuple[Tensor, bool]:
        """New starts for rows that outgrew the limit, and whether the cache can serve them."""
        assert self.starts is not None
        over = sizes > self.limit
        at_limit = torch.maximum(self.starts, lengths - self.limit)
        if not bool((over & ~ended).any()):
            # Rows that have ended go on at the last position: nobody reads them.
            return at_limit, True
        self.filled = False
        if self.overflow == "exact":
            return at_limit, False
        if self.overflow == "slide":
            return torch.where(over, lengths - max(1, self.limit // 2), self.starts), True
        raise OutOfRangeError(
            f"Sequence length {int(sizes.max())} exceeds the model's context of {self.limit} tokens; ask for fewer new "
            f"tokens, shorten the prompt, or read only the last ones (context_size={self.limit})."
        )


class PlainEngine:
    """Asks the model for all logits, anew for each token: works for any callable.

    Args:
        model: from token ids (batch, n_tokens) to logits (batch, n_tokens, vocab_size).
        limit: how many tokens of a row are read at most; None for all.
        modules: modules that are switched to evaluation for each call.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], limit: int | None, modules: Sequence[nn.Module] = ()) -> None:
        self.model = model
        self.limit = limit
        self.modules = modules

    def next_logits(self, rows: Rows, ended: Tensor) -> Tensor:
        """See `Engine`. Rows of different length are read one by one: nothing says that the model is causal."""
        with torch.no_grad(), eval_mode(self.modules):
            if rows.even:
                return self.model(self._crop(rows.ids[:, : rows.longest]))[:, -1]
            single = (rows.ids[i : i + 1, :length] for i, length in enumerate(rows.lengths.tolist()))
            return torch.cat([self.model(self._crop(ids))[:, -1] for ids in single])

    def _crop(self, ids: Tensor) -> Tensor:
        return ids if self.limit is None else ids[:, -self.limit :]
