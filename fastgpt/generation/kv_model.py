"""The book's GPT with a key-value cache that the caller steers: chunk after chunk through the same model.

    cache = KVCache(n_layers=cfg["n_layers"])
    model.reset_kv_cache()
    logits = model(prompt, cache=cache)        # positions 0, 1, ...
    logits = model(next_token, cache=cache)    # goes on where the cache ends

`Generator` is faster and needs none of this; the classes are here for the book's code that uses them.

Source: Raschka, Build a Large Language Model (From Scratch), bonus material of chapter 4 (KV cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fastgpt import model as book
from fastgpt import ops
from fastgpt.generation.errors import OutOfRangeError

Entry = tuple[Tensor, Tensor]


class KVCache:
    """One entry per layer: (keys, values), each (batch, n_heads, n_tokens, head_dim), or None.

    Args:
        n_layers: number of layers.
    """

    def __init__(self, n_layers: int) -> None:
        self.cache: list[Any] = [None] * n_layers

    def get(self, layer_idx: int) -> Any:
        """The entry of one layer."""
        return self.cache[layer_idx]

    def update(self, layer_idx: int, value: Any) -> None:
        """Replace the entry of one layer."""
        self.cache[layer_idx] = value

    def get_all(self) -> list[Any]:
        """The entries of all layers."""
        return self.cache

    def reset(self) -> None:
        """Forget all entries."""
        for layer_idx in range(len(self.cache)):
            self.cache[layer_idx] = None


def attend(
    att: book.MultiHeadAttention, x: Tensor, past: Entry | None = None, window_size: int | None = None
) -> tuple[Tensor, Entry]:
    """Attention of new tokens over cached ones and over each other.

    Args:
        att: the attention module.
        x: the new tokens, (batch, n_tokens, d_in).
        past: keys and values of the tokens before them.
        window_size: keep only the last ones, at least those of `x`; None for all.

    Returns:
        The module's output, (batch, n_tokens, d_out), and the keys and values with the new ones; `past` is not changed.
    """
    batch, n_tokens, _ = x.shape
    heads = (batch, n_tokens, att.num_heads, att.head_dim)
    q, k, v = (part(x).view(heads).transpose(1, 2) for part in (att.W_query, att.W_key, att.W_value))
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    if window_size is not None:
        kept = max(window_size, n_tokens)
        k, v = k[:, :, -kept:], v[:, :, -kept:]
    dropout_p = getattr(att.dropout, "p", 0.0) if att.dropout.training else 0.0
    out = ops.causal_attention(q, k, v, dropout_p=dropout_p)  # the mask lies at the bottom right
    return att.out_proj(out.transpose(1, 2).reshape(batch, n_tokens, att.d_out)), (k, v)


class MultiHeadAttention(book.MultiHeadAttention):
    """`fastgpt.model.MultiHeadAttention` that can keep its keys and values.

    Args:
        d_in, d_out, context_length, dropout, num_heads, qkv_bias: as there.
        max_seq_len: most tokens that are read in all; `context_length` when None.
        window_size: keep only the last keys and values; all when None.
    """

    cache_k: Tensor | None
    cache_v: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
        max_seq_len: int | None = None,
        window_size: int | None = None,
    ) -> None:
        super().__init__(d_in, d_out, context_length, dropout, num_heads, qkv_bias)
        self.max_seq_len = max_seq_len or context_length
        self.window_size = window_size or self.max_seq_len
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)

    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        """x (batch, n_tokens, d_in) to (batch, n_tokens, d_out).

        Args:
            x: new tokens.
            use_cache: let them see the tokens of earlier calls, and keep theirs; a batch of another size starts anew.

        Raises:
            OutOfRangeError: more tokens at once than `max_seq_len`; the cache is then as before.
        """
        _check_length(x.shape[1], self.max_seq_len)
        past = None
        if use_cache and self.cache_k is not None and self.cache_v is not None and len(self.cache_k) == len(x):
            past = (self.cache_k, self.cache_v)
        out, entry = attend(self, x, past, self.window_size)
        if use_cache:
            # The window counts keys; it may let those of a long chunk stay for its own queries.
            self.cache_k, self.cache_v = (part[:, :, -self.window_size :] for part in entry)
        return out

    def reset_cache(self) -> None:
        """Forget all keys and values."""
        self.cache_k, self.cache_v = None, None


class GPTModel(book.GPTModel):
    """`fastgpt.model.GPTModel` that can go on from cached keys and values; without a cache it is the same.

    Args:
        cfg: a configuration; `kv_window_size`, where it is given, limits how many keys and values are kept.

    Attributes:
        cfg: the configuration.
        current_pos: how many tokens the cache in use has read.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__(cfg)
        self.cfg = dict(cfg)
        self.kv_window_size: int | None = cfg.get("kv_window_size")
        self.current_pos = 0
        self._own_cache = KVCache(len(self.trf_blocks))

    @property
    def ptr_current_pos(self) -> int:
        """`current_pos` under another of the book's names."""
        return self.current_pos

    def forward(self, in_idx: Tensor, use_cache: bool = False, cache: KVCache | None = None) -> Tensor:
        """Logits for every new position.

        Args:
            in_idx: new token ids, (batch, n_tokens), int64.
            use_cache: go on from earlier calls, with the model's own cache unless `cache` is given.
            cache: go on from these keys and values, and add the new ones; implies `use_cache`.

        Returns:
            Logits, (batch, n_tokens, vocab_size).

        Raises:
            OutOfRangeError: the sequence grows longer than the context; the cache is then as before.
        """
        if not use_cache and cache is None:
            _check_length(in_idx.shape[-1], self.pos_emb.num_embeddings)
            return super().forward(in_idx)
        cache = self._own_cache if cache is None else cache
        start = self._position(cache)
        stop = start + in_idx.shape[1]
        _check_length(stop, self.pos_emb.num_embeddings)
        positions = torch.arange(start, stop, device=in_idx.device)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))
        entries = []
        for layer, block in enumerate(cast("list[book.TransformerBlock]", list(self.trf_blocks))):
            attended, entry = attend(block.att, block.norm1(x), cache.get(layer), self.kv_window_size)
            x = x + block.drop_shortcut(attended)
            x = x + block.drop_shortcut(block.ff(block.norm2(x)))
            entries.append(entry)
        logits: Tensor = self.out_head(self.final_norm(x))
        for layer, entry in enumerate(entries):
            cache.update(layer, entry)
        self.current_pos = stop
        return logits

    def reset_kv_cache(self) -> None:
        """Begin anew at position 0; a cache that was passed in is reset by its owner."""
        self._own_cache.reset()
        self.current_pos = 0

    def _position(self, cache: KVCache) -> int:
        """How many tokens `cache` has read: what it holds, unless a window has dropped some."""
        entry = cache.get(0)
        if entry is None:
            return 0
        return self.current_pos if self.kv_window_size else int(entry[0].shape[2])


def _check_length(n_tokens: int, limit: int) -> None:
    if n_tokens > limit:
        raise OutOfRangeError(
            f"Sequence length {n_tokens} exceeds the model's context of {limit} tokens; keep the last ones and start "
            "with an empty cache."
        )
