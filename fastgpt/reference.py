"""The book's modules in plain PyTorch: the judge of everything else.

No fused op, no cache, no trick: each line is one formula of chapters 3 to 5. It computes in the
dtype of its weights, stores the causal mask as the book does, and never imports `fastgpt.ops`. Slow
on purpose; when a fast path and this file disagree, the fast path is wrong.

Source: Raschka, Build a Large Language Model (From Scratch), chapters 3, 4 and 5;
Radford et al. 2019 (GPT-2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.config import BLOCK_KEYS, check_config, check_heads


class LayerNorm(nn.Module):
    """Normalise each row: scale · (x − mean) / √(var + eps) + shift.

    The variance is the biased one (divided by n, not n − 1), as GPT-2's weights expect.

    Args:
        emb_dim: length of a row.
    """

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, correction=0)
        normalized = (x - mean) / torch.sqrt(variance + self.eps)
        return self.scale * normalized + self.shift


class GELU(nn.Module):
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))). Paper: Hendrycks and Gimpel 2016."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1.0 + torch.tanh(inner))


class FeedForward(nn.Module):
    """Widen four times, GELU, narrow again.

    Args:
        cfg: a configuration; only `emb_dim` is read.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        emb_dim = check_config(cfg, ("emb_dim",))["emb_dim"]
        self.layers = nn.Sequential(
            nn.Linear(emb_dim, 4 * emb_dim),
            GELU(),
            nn.Linear(4 * emb_dim, emb_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class MultiHeadAttention(nn.Module):
    """Causal self-attention: softmax(q kᵀ / √head_dim, future masked) v, in parallel over heads.

    Args:
        d_in: width of the input.
        d_out: width of the output, all heads together.
        context_length: the longest input.
        dropout: share of attention weights that training drops.
        num_heads: heads; they share `d_out` evenly.
        qkv_bias: give the three input projections a bias; the output projection always has one.
    """

    mask: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        check_heads(d_out, num_heads, ("d_out", "num_heads"))
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        batch, n_tokens, _ = x.shape
        q = self._split_heads(self.W_query(x))
        k = self._split_heads(self.W_key(x))
        v = self._split_heads(self.W_value(x))

        scores = q @ k.transpose(2, 3)  # (B, H, T, T)
        future = self.mask[:n_tokens, :n_tokens].bool()
        scores = scores.masked_fill(future, -torch.inf)
        weights = self.dropout(torch.softmax(scores / math.sqrt(self.head_dim), dim=-1))

        context = (weights @ v).transpose(1, 2)  # (B, T, H, D)
        out: Tensor = self.out_proj(context.reshape(batch, n_tokens, self.d_out))
        return out

    def _split_heads(self, x: Tensor) -> Tensor:
        batch, n_tokens, _ = x.shape
        return x.view(batch, n_tokens, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, D)


class TransformerBlock(nn.Module):
    """x + drop(att(norm1(x))), then x + drop(ff(norm2(x))).

    Args:
        cfg: a configuration, see `fastgpt.config.check_config`.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        cfg = check_config(cfg, BLOCK_KEYS)
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            dropout=cfg["drop_rate_attn"],
            num_heads=cfg["n_heads"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate_shortcut"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        x = x + self.drop_shortcut(self.ff(self.norm2(x)))
        return x


class GPTModel(nn.Module):
    """Token ids to logits: embeddings, `n_layers` blocks, a norm, a head of its own (not tied).

    Args:
        cfg: a configuration, see `fastgpt.config.check_config`.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        cfg = check_config(cfg)
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate_emb"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx: Tensor) -> Tensor:
        """Token ids (batch, n_tokens), int64, to logits (batch, n_tokens, vocab_size)."""
        _, n_tokens = in_idx.shape
        positions = torch.arange(n_tokens, device=in_idx.device)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))
        x = self.trf_blocks(x)
        logits: Tensor = self.out_head(self.final_norm(x))
        return logits


def generate_text_simple(
    model: Callable[[Tensor], Tensor], idx: Tensor, max_new_tokens: int, context_size: int
) -> Tensor:
    """Append the likeliest token, `max_new_tokens` times (chapter 4).

    Args:
        model: any callable from token ids (batch, n_tokens) to logits (batch, n_tokens, vocab).
        idx: the prompts, (batch, n_tokens), int64.
        max_new_tokens: how many tokens to append.
        context_size: only the last `context_size` tokens are read, at positions from 0.

    Returns:
        Prompt and new tokens, (batch, n_tokens + max_new_tokens), int64. The model's mode is left
        as it is.
    """
    for _ in range(max_new_tokens):
        idx = torch.cat((idx, _next_logits(model, idx, context_size).argmax(dim=-1, keepdim=True)), dim=1)
    return idx


def generate(
    model: Callable[[Tensor], Tensor],
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Append tokens, sampled or likeliest, until `eos_id` (chapter 5).

    Each step: keep the `top_k` best logits (ties with the last of them stay), divide by
    `temperature`, subtract the row's maximum, softmax, one `torch.multinomial`. Temperature 0: the
    likeliest token, the first one on ties.

    Args:
        model, idx, max_new_tokens, context_size: as for `generate_text_simple`.
        temperature: above 0 samples; 0 takes the likeliest token.
        top_k: how many of the best tokens may be drawn; None for all.
        eos_id: the token that ends a row. It is not appended; in a batch, rows that have ended are
            filled with it until the last one ends. None: never stop.

    Returns:
        Prompt and new tokens, (batch, n_tokens + at most max_new_tokens), int64.
    """
    ended = torch.zeros(idx.shape[0], 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        logits = _next_logits(model, idx, context_size)
        if top_k is not None:
            kth_best = torch.topk(logits, top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kth_best, -torch.inf)
        if temperature > 0.0:
            logits = logits / temperature
            logits = logits - logits.max(dim=-1, keepdim=True).values
            next_idx = torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)
        else:
            next_idx = torch.argmax(logits, dim=-1, keepdim=True)
        if eos_id is not None:
            ended = ended | (next_idx == eos_id)
            if bool(ended.all()):
                break
            next_idx = next_idx.masked_fill(ended, eos_id)
        idx = torch.cat((idx, next_idx), dim=1)
    return idx


def _next_logits(model: Callable[[Tensor], Tensor], idx: Tensor, context_size: int) -> Tensor:
    with torch.no_grad():
        return model(idx[:, -context_size:])[:, -1, :]  # (B, V)
