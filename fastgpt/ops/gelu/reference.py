"""GELU in plain PyTorch, as the book writes it: the judge of the other backends."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), where x is x + bias."""
    if bias is not None:
        x = (x + bias).to(x.dtype)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
