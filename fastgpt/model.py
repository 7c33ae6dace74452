"""The book's GPT on fused ops: the same names, numbers and checkpoints as chapters 3 and 4.

    in_idx (B, T) → tok_emb + pos_emb → drop_emb → trf_blocks → final_norm → out_head → (B, T, V)

    TransformerBlock    x + drop(att(norm1(x))), then x + drop(ff(norm2(x)))

What differs from `fastgpt.reference`: everything runs on `fastgpt.ops`, and neighbours join into
one op where nothing stands between them (`fastgpt.fusion`): each shortcut is added by the pass that
normalises the sum, the three input projections are one, the first bias of the feed-forward is added
inside the GELU. The (T, T) scores never exist, and no mask is stored. Parameters are created in the
book's order, so the same seed gives the same weights. `state_dict` still holds the book's
`att.mask` tensors, made when it is asked for.

The book's other layout, `GPTModelFast`, stands in `fastgpt.model_fast`.

Source: Raschka, Build a Large Language Model (From Scratch), chapters 3 and 4;
Radford et al. 2019 (GPT-2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import fusion, ops
from fastgpt.config import BLOCK_KEYS, check_config, check_heads

_NOT_CAUSAL = (
    "this is not the causal mask (1 above the diagonal, else 0), and the attention here is always "
    "causal; use fastgpt.reference for any other mask."
)


class LayerNorm(nn.Module):
    """Each row to mean 0 and (biased) variance 1, then scaled and shifted.

    Statistics are float32 (float64 for float64), whatever the dtype of the rows.

    Args:
        emb_dim: length of a row.
    """

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x, (..., emb_dim)."""
        return ops.layer_norm(x, self.scale, self.shift, self.eps)


class GELU(nn.Module):
    """The tanh form of GELU, element by element."""

    def forward(self, x: Tensor) -> Tensor:
        """GELU of x, any shape."""
        return ops.gelu(x)


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
        """x (..., emb_dim) to the same shape."""
        if fusion.is_plain(self.layers, nn.Sequential) and fusion.is_plain(self.layers[1], GELU):
            return fusion.feed_forward(self.layers[0], self.layers[2], x)
        out: Tensor = self.layers(x)
        return out


class MultiHeadAttention(nn.Module):
    """Causal self-attention over several heads (chapter 3).

    Args:
        d_in: width of the input.
        d_out: width of the output, all heads together.
        context_length: the longest input.
        dropout: share of attention weights that training drops.
        num_heads: heads; they share `d_out` evenly.
        qkv_bias: give the three input projections a bias; the output projection always has one.

    Raises:
        ValueError: `d_out` is not divisible by `num_heads`.
    """

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
        self.context_length = context_length
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, d_in) to (batch, n_tokens, d_out); n_tokens <= context_length."""
        batch, n_tokens, _ = x.shape
        check_length(n_tokens, self.context_length)
        made = fusion.project_qkv(self.W_query, self.W_key, self.W_value, x)
        # The dropout's own switch: readers turn single ones off, or put nn.Identity there.
        p = getattr(self.dropout, "p", 0.0) if self.dropout.training else 0.0
        return fusion.linear(self.out_proj, fusion.attend(made, self.num_heads, p))

    @property
    def mask(self) -> Tensor:
        """The book's mask, (context_length, context_length), 1 on future keys; made when asked."""
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        return torch.triu(like.new_ones(self.context_length, self.context_length), diagonal=1)

    @mask.setter
    def mask(self, value: Tensor) -> None:
        if not _is_causal(value):
            raise ValueError(_NOT_CAUSAL)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "mask"] = self.mask
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "mask"
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        if key in state_dict and not _is_causal(state_dict[key]):
            error_msgs.append(f"{key}: {_NOT_CAUSAL}")


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each normed before and added to its own input.

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

    @property
    def drop_resid(self) -> nn.Module:
        """`drop_shortcut` under the name that chapters 6 and 7 use."""
        return self.drop_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, emb_dim) to the same shape."""
        total, normed = fusion.add_and_norm(self.att(self.norm1(x)), x, self.drop_shortcut, self.norm2, norm_parts)
        out: Tensor = total + self.drop_shortcut(self.ff(normed))
        return out


class GPTModel(nn.Module):
    """The book's GPT-2 (chapter 4): token ids to logits.

    Args:
        cfg: a configuration, see `fastgpt.config.check_config`.

    Raises:
        KeyError, TypeError, ValueError: the configuration is not usable; the message says why.
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
        """Logits for every position.

        Args:
            in_idx: token ids, (batch, n_tokens), int64, n_tokens at most `context_length`.

        Returns:
            Logits, (batch, n_tokens, vocab_size), in the dtype of the weights.

        Raises:
            IndexError: more tokens than `context_length`, or (on the CPU) an unknown token id.
            ValueError: `in_idx` is not a batch of rows.
        """
        return fusion.linear(self.out_head, self.hidden_states(in_idx))

    def hidden_states(self, in_idx: Tensor) -> Tensor:
        """What goes into the output head, (batch, n_tokens, emb_dim). Args and Raises: as `forward`."""
        x = embed_tokens(self.tok_emb, self.pos_emb, in_idx, self.drop_emb)
        if fusion.is_plain(self.trf_blocks, nn.Sequential):
            return fusion.run_blocks(self.trf_blocks, self.final_norm, x, _block_parts, norm_parts)
        out: Tensor = self.final_norm(self.trf_blocks(x))
        return out


def _is_causal(mask: Tensor) -> bool:
    if mask.is_meta:
        return True
    future = mask.bool()
    return future.ndim == 2 and torch.equal(future, torch.triu(torch.ones_like(future), diagonal=1))


def check_length(n_tokens: int, context_length: int) -> None:
    """Raise IndexError when an input of `n_tokens` is longer than the model can read."""
    if n_tokens > context_length:
        raise IndexError(
            f"The input has {n_tokens} tokens, but context_length is {context_length}; "
            f"keep the last ones, [:, -{context_length}:], or build a model with longer context."
        )


def _block_parts(block: nn.Module) -> fusion.BlockParts | None:
    return fusion.block_parts(block, TransformerBlock)


def norm_parts(module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """(weight, bias, eps) of a `LayerNorm` that may be joined with what comes before it; else None."""
    if not fusion.is_plain(module, LayerNorm):
        return None
    return module.scale, module.shift, module.eps  # type: ignore[return-value]


def embed_tokens(tok_emb: nn.Module, pos_emb: nn.Module, in_idx: Tensor, drop: nn.Module | None = None) -> Tensor:
    """Token plus position embeddings, with errors that say which input is wrong.

    Args:
        tok_emb, pos_emb: the model's embeddings; the rows of `pos_emb` are the longest input.
        in_idx: token ids, (batch, n_tokens), int64 or int32.
        drop: a dropout for the sum.

    Returns:
        (batch, n_tokens, emb_dim) in the dtype of the embeddings.

    Raises:
        IndexError, ValueError: as `GPTModel.forward`.
    """
    if in_idx.ndim != 2:
        raise ValueError(
            f"Token ids must have shape (batch, n_tokens); got {tuple(in_idx.shape)}. "
            "A single row becomes a batch of one with in_idx.unsqueeze(0)."
        )
    n_tokens = in_idx.shape[1]
    check_length(n_tokens, pos_emb.weight.shape[0])  # type: ignore[index, arg-type]
    p = 0.0 if drop is None else fusion.dropout_p(drop)
    joined = None if p is None else fusion.embed(tok_emb, pos_emb, in_idx, p)
    if joined is not None:
        return joined
    try:
        tokens: Tensor = tok_emb(in_idx)
    except IndexError as error:
        raise IndexError(_bad_token(in_idx, tok_emb.weight.shape[0])) from error  # type: ignore[index, arg-type]
    total: Tensor = tokens + pos_emb(torch.arange(n_tokens, device=in_idx.device))
    return total if drop is None else drop(total)


def _bad_token(in_idx: Tensor, vocab_size: int) -> str:
    row, column = ((in_idx < 0) | (in_idx >= vocab_size)).nonzero()[0].tolist()
    return (
        f"Token id {int(in_idx[row, column])} at row {row}, position {column} is outside the "
        f"vocabulary, 0 to {vocab_size - 1}; was another tokenizer used for the text, or is this "
        f"a target, where -100 marks ignored places?"
    )
