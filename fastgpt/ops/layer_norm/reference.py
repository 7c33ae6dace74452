"""Layer normalisation in plain PyTorch, as the book writes it: the judge of the other backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, var biased."""
    mean = x.mean(dim=-1, keepdim=True)
    var = x.var(dim=-1, keepdim=True, unbiased=False)
    return (((x - mean) / torch.sqrt(var + eps)) * weight + bias).to(x.dtype)
