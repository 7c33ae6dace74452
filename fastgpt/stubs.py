"""Chapter 4's stand-ins for parts that are not written yet, and its network with vanishing gradients.

Source: Raschka, Build a Large Language Model (From Scratch), chapter 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastgpt.config import check_config
from fastgpt.model import embed_tokens
from fastgpt.reference import GELU


class DummyLayerNorm(nn.Module):
    """Returns its input."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x, unchanged."""
        return x


class DummyTransformerBlock(nn.Module):
    """Returns its input."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x, unchanged."""
        return x


class DummyGPTModel(nn.Module):
    """The outline of GPTModel: embeddings and output head are real, blocks and norm do nothing.

    Args:
        cfg: a configuration, see `fastgpt.config.check_config`.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        cfg = check_config(cfg)
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate_emb"])
        self.trf_blocks = nn.Sequential(*[DummyTransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = DummyLayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx: Tensor) -> Tensor:
        """in_idx (batch, n_tokens), int64, to logits (batch, n_tokens, vocab_size)."""
        x = self.drop_emb(embed_tokens(self.tok_emb, self.pos_emb, in_idx))
        logits: Tensor = self.out_head(self.final_norm(self.trf_blocks(x)))
        return logits


class ExampleDeepNeuralNetwork(nn.Module):
    """Linear layers with GELU, to see gradients vanish without shortcut connections.

    Args:
        layer_sizes: width of the input, then of every layer (the book takes five layers).
        use_shortcut: add a layer's input to its output wherever the two have one shape.
    """

    def __init__(self, layer_sizes: Sequence[int], use_shortcut: bool) -> None:
        super().__init__()
        self.use_shortcut = use_shortcut
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width_in, width_out), GELU())
            for width_in, width_out in zip(layer_sizes[:-1], layer_sizes[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., layer_sizes[0]) to (..., layer_sizes[-1])."""
        for layer in self.layers:
            out = layer(x)
            x = x + out if self.use_shortcut and x.shape == out.shape else out
        return x
