"""GELU by PyTorch's own op: what runs where no kernel of ours can."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.gelu in its tanh form, after an addition."""
    return F.gelu(x if bias is None else (x + bias).to(x.dtype), approximate="tanh")
