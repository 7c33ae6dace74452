"""Dropout, residual addition and layer normalisation by PyTorch's own ops: what runs where no kernel of ours can."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import philox
from fastgpt.ops.layer_norm import backend_torch as layer_norm

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """As for layer_norm: the reference takes weights of another dtype on the GPU."""
    return layer_norm.why_not(case)


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
    """F.dropout, an addition, F.layer_norm; with a seed the mask that the kernels draw."""
    if dropout_p:
        x = F.dropout(x, dropout_p) if seed is None else philox.drop_rows(x, dropout_p, seed)
    total = residual + x
    return total, layer_norm.apply(total, weight, bias, eps)
