"""Packed causal attention by PyTorch's scaled_dot_product_attention, on views."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgpt.ops.attention import backend_torch as unpacked
from fastgpt.ops.packed_causal_attention import split

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(qkv: Tensor, softmax_scale: float, dropout_p: float = 0.0, *, seed: int | None = None) -> Tensor:
    """As the attention room's, back in the layout of the model."""
    return unpacked.apply(*split(qkv), softmax_scale, dropout_p, seed=seed).transpose(1, 2)
