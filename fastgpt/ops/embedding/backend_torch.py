"""Token and position embedding by PyTorch's own ops: what runs where no kernel of ours can."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import philox

NATIVE_AUTOGRAD = True
# On the CPU F.embedding raises IndexError for an id outside the vocabulary.
CHECKS_RANGE = True


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def apply(
    ids: Tensor, weight: Tensor, position_weight: Tensor, dropout_p: float = 0.0, *, seed: int | None = None
) -> Tensor:
    """F.embedding, an addition, F.dropout; with a seed the mask that the kernels draw."""
    out = F.embedding(ids, weight) + position_weight[: ids.shape[1]]
    if not dropout_p:
        return out
    return F.dropout(out, dropout_p) if seed is None else philox.drop_rows(out, dropout_p, seed)
