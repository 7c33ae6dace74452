"""Layer normalisation by PyTorch's own fused op: what runs where no kernel of ours can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """PyTorch wants weights of the dtype of x on some devices; the reference takes the mixed case there."""
    if case.weight_dtype != case.dtype and case.device != "cpu":
        return f"weight is {case.weight_dtype} and x {case.dtype}"
    return None


def apply(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.layer_norm over the last axis, without its look at cuDNN's switch."""
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
