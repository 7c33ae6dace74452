"""Causal attention by PyTorch's scaled_dot_product_attention: what runs where no kernel of ours can."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.attention import reference

if TYPE_CHECKING:
    from fastgpt.ops.attention import Case

NATIVE_AUTOGRAD = True


def why_not(case: Case) -> str | None:
    """It can always run."""
    return None


def apply(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, dropout_p: float = 0.0, *, seed: int | None = None
) -> Tensor:
    """SDPA; its is_causal lies at the top left, so q_len != k_len needs the mask written out."""
    if dropout_p and seed is not None:
        # Drawn once for forward and backward, which SDPA's own dropout would not promise.
        return reference.apply(q, k, v, softmax_scale, dropout_p, seed=seed)
    q_len, k_len = q.shape[2], k.shape[2]
    mask = None
    if q_len != k_len:
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None, scale=softmax_scale)
    # Already in this layout from most of SDPA's kernels; then this is a view.
    return out.transpose(1, 2).contiguous().transpose(1, 2)
