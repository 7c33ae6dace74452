"""Linear layers in plain PyTorch: the judge of the other backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """x @ W.T + b, one product after the other, then side by side."""
    outs = []
    for weight, bias in zip(weights, biases, strict=True):
        out = x @ weight.T
        outs.append(out if bias is None else out + bias)
    return outs[0] if len(outs) == 1 else torch.cat(outs, -1)
