"""Linear layers by PyTorch's own product: what runs where no kernel of ours can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """F.linear. Several weights become one product where copying them is the smaller copy."""
    if len(weights) == 1:
        return F.linear(x, weights[0], biases[0])
    n_in = x.shape[-1]
    # Side by side must come the weights, n_in * sum(n_out) numbers, or the results, rows * sum(n_out).
    given = [bias for bias in biases if bias is not None]
    if x.numel() < n_in * n_in or 0 < len(given) < len(biases):
        return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], -1)
    return F.linear(x, torch.cat(tuple(weights)), torch.cat(given) if given else None)
