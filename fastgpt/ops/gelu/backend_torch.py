"""GELU by PyTorch's own op: what runs where no kernel of ours can."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

NATIVE_AUTOGRAD = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(x: Tensor) -> Tensor:
    """F.gelu in its tanh form."""
    return F.gelu(x, approximate="tanh")
