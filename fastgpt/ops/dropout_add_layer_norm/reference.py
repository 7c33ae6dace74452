"""Dropout, residual addition and layer normalisation as the book writes them: the judge of the other backends."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import philox
from fastgpt.ops.layer_norm import reference as layer_norm

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    *,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """total = residual + dropout(x), normed = layer_norm(total).

    Without a seed dropout draws from torch's generator, exactly as the book's nn.Dropout does; with one it takes the
    mask that the kernels draw.
    """
    if dropout_p:
        x = F.dropout(x, dropout_p) if seed is None else philox.drop_rows(x, dropout_p, seed)
    total = residual + x
    return total, layer_norm.apply(total, weight, bias, eps)
