"""The output head and the loss by PyTorch's own ops, a chunk of rows at a time: what runs where no kernel of ours can.

Nothing waits for a GPU: counts stay tensors, and ignored rows are masked, not taken out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits of one chunk. On a GPU a product wants at least a thousand rows; on a CPU a chunk need only be large against
# one read of the weights.
CHUNK_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 24}


def why_not(case: Any) -> str | None:
    """It can always run."""
    return None


def chunk_rows(rows: int, vocab_size: int, device: str) -> int:
    """Rows whose logits exist at a time: a multiple of 64, and at least that many."""
    fitting = CHUNK_ELEMENTS.get(device, 1 << 26) // vocab_size // 64 * 64
    return max(1, min(rows, max(64, fitting)))


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the mean loss (float32 or wider), dx (like x) and dweight (like weight), or None where not needed."""
    # Inside an autocast region the products would come back in another dtype than the buffers have.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _forward(x, weight, targets, ignore_index, needs_dx, needs_dweight)


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    wide = torch.promote_types(x.dtype, torch.float32)
    head = weight.to(x.dtype)
    valid = targets != ignore_index
    count = valid.sum()
    labels = torch.where(valid, targets, 0)
    factor = torch.where(valid, 1 / count.to(wide), 0)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_dx else None
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if needs_dweight else None
    total = torch.zeros((), dtype=wide, device=x.device)
    if dweight is not None and len(x) == 0:
        dweight.zero_()
    size = chunk_rows(x.shape[0], head.shape[0], x.device.type)
    for begin in range(0, x.shape[0], size):
        rows = slice(begin, begin + size)
        logits = x[rows] @ head.t()
        log_p = torch.log_softmax(logits, -1, dtype=wide)
        index = labels[rows, None]
        picked = log_p.gather(1, index)[:, 0]
        total -= torch.where(valid[rows], picked, 0).sum()
        if dx is None and dweight is None:
            continue
        # softmax - onehot, over the log-probabilities
        dlogits = log_p.exp_()
        dlogits.scatter_add_(1, index, dlogits.new_full(index.shape, -1.0))
        dlogits.mul_(factor[rows, None])
        dlogits = logits.copy_(dlogits) if logits.dtype != wide else dlogits
        if dx is not None:
            torch.mm(dlogits, head, out=dx[rows])
        if dweight is not None:
            add_product(dweight, dlogits.t(), x[rows], first=begin == 0)
    return total / count, dx, dweight


def add_product(into: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """into += a b, or into = a b. Where `into` is wider than the factors, the products are added up in its dtype."""
    if into.dtype != a.dtype:
        torch.add(torch.zeros((), dtype=into.dtype, device=a.device) if first else into, a @ b, out=into)
    elif first:
        torch.mm(a, b, out=into)
    else:
        torch.addmm(into, a, b, out=into)
