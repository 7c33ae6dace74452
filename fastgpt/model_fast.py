"""The book's fast layout of the same GPT, and the translation of checkpoints between the two.

    layout   attention                                norms          checkpoint holds masks
    book     W_query, W_key, W_value, out_proj        scale, shift   yes
    fast     qkv (rows: queries, keys, values), proj  weight, bias   no

Both run on the same ops. One projection instead of three is one larger matrix product.

Source: Raschka, Build a Large Language Model (From Scratch), bonus material of chapters 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgpt import fusion, ops
from fastgpt.config import BLOCK_KEYS, check_config, check_heads
from fastgpt.model import FeedForward, embed_tokens


class LayerNormFast(nn.LayerNorm):
    """`torch.nn.LayerNorm` by name and keys (weight, bias), run by `fastgpt.ops`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class FeedForwardFast(FeedForward):
    """`FeedForward`: GELU is one op in either layout here (the book takes torch's in this one)."""


class MultiHeadAttentionFast(nn.Module):
    """`MultiHeadAttention` with one projection for queries, keys and values, in this row order.

    Args:
        d_in, d_out, num_heads, qkv_bias: as for `MultiHeadAttention`.
        dropout: share of attention weights that training drops; kept as a number, as in the book.
    """

    def __init__(self, d_in: int, d_out: int, num_heads: int, dropout: float = 0.0, qkv_bias: bool = False) -> None:
        super().__init__()
        check_heads(d_out, num_heads, ("d_out", "num_heads"))
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.qkv = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.proj = nn.Linear(d_out, d_out)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, d_in) to (batch, n_tokens, d_out)."""
        p = self.dropout if self.training else 0.0
        return fusion.linear(self.proj, fusion.attend((fusion.linear(self.qkv, x),), self.num_heads, p))


class TransformerBlockFast(nn.Module):
    """`TransformerBlock` in the fast layout.

    Args:
        cfg: a configuration, see `fastgpt.config.check_config`.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        cfg = check_config(cfg, BLOCK_KEYS)
        self.att = MultiHeadAttentionFast(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            num_heads=cfg["n_heads"],
            dropout=cfg["drop_rate_attn"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForwardFast(cfg)
        self.norm1 = LayerNormFast(cfg["emb_dim"])
        self.norm2 = LayerNormFast(cfg["emb_dim"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate_shortcut"])

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, emb_dim) to the same shape."""
        total, normed = fusion.add_and_norm(self.att(self.norm1(x)), x, self.drop_shortcut, self.norm2, norm_parts)
        out: Tensor = total + self.drop_shortcut(self.ff(normed))
        return out


class GPTModelFast(nn.Module):
    """`GPTModel` in the book's fast layout.

    Args:
        cfg: a configuration, see `fastgpt.config.check_config`.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        cfg = check_config(cfg)
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate_emb"])
        self.trf_blocks = nn.Sequential(*[TransformerBlockFast(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNormFast(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx: Tensor) -> Tensor:
        """Logits for every position; as `GPTModel.forward`."""
        return fusion.linear(self.out_head, self.hidden_states(in_idx))

    def hidden_states(self, in_idx: Tensor) -> Tensor:
        """What goes into the output head, (batch, n_tokens, emb_dim). Args and Raises: as `forward`."""
        x = embed_tokens(self.tok_emb, self.pos_emb, in_idx, self.drop_emb)
        if fusion.is_plain(self.trf_blocks, nn.Sequential):
            return fusion.run_blocks(self.trf_blocks, self.final_norm, x, _block_parts, norm_parts)
        out: Tensor = self.final_norm(self.trf_blocks(x))
        return out


def _block_parts(block: nn.Module) -> fusion.BlockParts | None:
    return fusion.block_parts(block, TransformerBlockFast)


def norm_parts(module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """(weight, bias, eps) of a `LayerNormFast` that may be joined with what comes before it; else None."""
    if not fusion.is_plain(module, LayerNormFast):
        return None
    return module.weight, module.bias, module.eps  # type: ignore[return-value]


def convert_state_dict(state_dict: Mapping[str, Tensor], to: Literal["book", "fast"]) -> dict[str, Tensor]:
    """Translate a checkpoint between `GPTModel` and `GPTModelFast`; the input stays as it is.

    Args:
        state_dict: the checkpoint of either model, or of one block or attention; keys may carry a
            prefix such as "module.". A checkpoint that is already in the wanted layout comes back
            as it is.
        to: "fast", or "book" (with the `att.mask` tensors that the book's own classes ask for, when
            `pos_emb` tells the context length).

    Returns:
        A new dict in the key order of that layout. Tensors that only change their name are shared
        with the input; joined, split and mask tensors are new.

    Raises:
        ValueError: `to` is another word, or a projection of queries, keys and values is incomplete.
    """
    if to not in ("book", "fast"):
        raise ValueError(f"A checkpoint can be converted to 'book' or to 'fast'; got {to!r}.")
    translate = _to_fast if to == "fast" else _to_book
    translated: dict[str, Tensor] = {}
    for key in state_dict:
        translated.update(translate(state_dict, key))
    return translated


_QKV = ("W_query", "W_key", "W_value")
_NORMS = ("norm1", "norm2", "final_norm")
_TO_FAST = {"scale": "weight", "shift": "bias"}
_TO_BOOK = {"weight": "scale", "bias": "shift"}


def _split_key(key: str) -> tuple[str, str, str]:
    """Prefix, module and leaf: trf_blocks.0.att. | qkv | weight."""
    path, _, leaf = key.rpartition(".")
    owner, dot, part = path.rpartition(".")
    return owner + dot, part, leaf


def _to_fast(state_dict: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """What one entry of a checkpoint becomes in the fast layout: one entry, or none."""
    tensor = state_dict[key]
    prefix, part, leaf = _split_key(key)
    if leaf == "mask" and part in ("att", ""):
        return {}
    if part in _QKV and leaf in ("weight", "bias"):
        names = [f"{prefix}{name}.{leaf}" for name in _QKV]
        missing = [name for name in names if name not in state_dict]
        if missing:
            raise ValueError(f"The checkpoint has {key} but not {' and '.join(missing)}; the three go together.")
        # The joined tensor stands at the place of the first of the three.
        if part != _QKV[0]:
            return {}
        return {f"{prefix}qkv.{leaf}": torch.cat([state_dict[name] for name in names])}
    if part == "out_proj":
        key = f"{prefix}proj.{leaf}"
    elif part in _NORMS:
        key = f"{prefix}{part}.{_TO_FAST.get(leaf, leaf)}"
    return {key: tensor}


def _to_book(state_dict: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """What one entry of a checkpoint becomes in the book's layout: any number of entries."""
    tensor = state_dict[key]
    prefix, part, leaf = _split_key(key)
    if part == "qkv":
        # All at the place of qkv.weight: mask, query weight, query bias, key weight, ...
        return _split_qkv(state_dict, prefix) if leaf == "weight" else {}
    if part == "proj":
        key = f"{prefix}out_proj.{leaf}"
    elif part in _NORMS:
        key = f"{prefix}{part}.{_TO_BOOK.get(leaf, leaf)}"
    return {key: tensor}


def _split_qkv(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    weight = state_dict[f"{prefix}qkv.weight"]
    split = {}
    positions = state_dict.get(prefix.rpartition("trf_blocks.")[0] + "pos_emb.weight")
    if positions is not None:
        ones = weight.new_ones(positions.shape[0], positions.shape[0])
        split[f"{prefix}mask"] = torch.triu(ones, diagonal=1)
    bias = state_dict.get(f"{prefix}qkv.bias")
    for i, name in enumerate(_QKV):
        split[f"{prefix}{name}.weight"] = weight.chunk(3)[i].clone()
        if bias is not None:
            split[f"{prefix}{name}.bias"] = bias.chunk(3)[i].clone()
    return split
