"""The bias of gelu by PyTorch, around kernels that take none."""

from __future__ import annotations

from torch import Tensor


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias in the dtype of x."""
    return x if bias is None else (x + bias).to(x.dtype)


def bias_gradient(dx: Tensor, bias: Tensor | None) -> Tensor | None:
    """The sum of dx over its rows, in float32, like bias."""
    return None if bias is None else dx.float().sum(dim=tuple(range(dx.ndim - 1))).to(bias.dtype)
