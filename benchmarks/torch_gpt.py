"""The strongest rival on PyTorch alone: GPT-2 as a skilled user writes it, without anything of fastgpt.

One packed projection, `F.scaled_dot_product_attention(is_causal=True)`, `F.layer_norm`, `F.gelu(approximate="tanh")`;
an untied head, as the book has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        width = cfg["emb_dim"]
        self.n_heads, self.p = cfg["n_heads"], cfg["drop_rate"]
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=cfg["qkv_bias"])
        self.proj = nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, emb_dim) to the same shape."""
        batch, n_tokens, width = x.shape
        p = self.p if self.training else 0.0
        qkv = self.qkv(self.norm1(x)).view(batch, n_tokens, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(batch, n_tokens, width)), p)
        return x + F.dropout(self.out(F.gelu(self.fc(self.norm2(x)), approximate="tanh")), p)


class TorchGPT(nn.Module):
    """Token ids (batch, n_tokens) to logits.

    Args:
        cfg: the book's configuration.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.p = cfg["drop_rate"]
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg["n_layers"]))
        self.norm = nn.LayerNorm(cfg["emb_dim"])
        self.head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        """Logits, (batch, n_tokens, vocab_size)."""
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(idx.shape[1], device=idx.device))
        x = F.dropout(x, self.p if self.training else 0.0)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def take_weights(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights of a book checkpoint, so that both compute the same loss."""
        names = {
            "norm1.weight": "norm1.scale",
            "norm1.bias": "norm1.shift",
            "norm2.weight": "norm2.scale",
            "norm2.bias": "norm2.shift",
            "proj.weight": "att.out_proj.weight",
            "proj.bias": "att.out_proj.bias",
            "fc.weight": "ff.layers.0.weight",
            "fc.bias": "ff.layers.0.bias",
            "out.weight": "ff.layers.2.weight",
            "out.bias": "ff.layers.2.bias",
        }
        outer = {"norm.weight": "final_norm.scale", "norm.bias": "final_norm.shift", "head.weight": "out_head.weight"}
        for name, parameter in self.named_parameters():
            if not name.startswith("blocks."):
                parameter.copy_(state[outer.get(name, name)])
                continue
            _, number, rest = name.split(".", 2)
            prefix = f"trf_blocks.{number}."
            if rest.startswith("qkv."):
                leaf = rest.rpartition(".")[2]
                parts = [state[f"{prefix}att.W_{part}.{leaf}"] for part in ("query", "key", "value")]
                parameter.copy_(torch.cat(parts))
            else:
                parameter.copy_(state[prefix + names[rest]])
