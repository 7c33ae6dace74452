"""Causal attention in plain PyTorch, with the whole matrix of weights: the judge of the other backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import philox

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, dropout_p: float = 0.0, *, seed: int | None = None
) -> Tensor:
    """dropout(softmax(q kᵀ · softmax_scale + mask)) v, as the book computes it.

    Without a seed dropout draws from torch's generator, exactly as the book's nn.Dropout does on the same shape; with
    one it takes the mask that the kernels draw.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    hidden = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).triu(1 + k_len - q_len)
    # Scaled before it is masked: a negative scale would turn -inf into inf.
    scores = (q @ k.transpose(2, 3) * softmax_scale).masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    if dropout_p and seed is None:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    elif dropout_p:
        batch, n_heads = q.shape[:2]
        keep = philox.keep_mask(batch, n_heads, q_len, k_len, dropout_p, seed or 0).to(q.device)
        weights = weights * keep * philox.scale(dropout_p)
    return (weights @ v).transpose(1, 2).contiguous().transpose(1, 2)
