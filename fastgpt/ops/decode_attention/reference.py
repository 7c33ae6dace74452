"""Attention over a key-value cache in plain PyTorch: the judge of the other backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, softmax_scale: float) -> Tensor:
    """softmax(q kᵀ · softmax_scale) v with the unfilled keys masked."""
    longest = max(lengths.tolist(), default=0)
    k, v = k_cache[:, :, :longest], v_cache[:, :, :longest]
    positions = torch.arange(longest, device="cpu")
    unfilled = (positions >= lengths[:, None]).to(q.device)[:, None]  # (B, 1, L)
    scores = (q[:, :, None] @ k.transpose(2, 3)).squeeze(2)  # (B, H, L)
    weights = torch.softmax((scores * softmax_scale).masked_fill(unfilled, -torch.inf), dim=-1)
    # A weight of 0 does not silence a NaN.
    v = v.masked_fill(unfilled[..., None], 0.0)
    return (weights[:, :, None] @ v).squeeze(2)  # (B, H, D)
