"""The output head and the loss on a GPU, in chunks of rows: products by PyTorch, between them a kernel of the backend.

Beyond the results only the logits of one chunk of rows exist, in one buffer: the products write into it and read from
it, and the kernel writes the gradient of the logits over them. The vocabulary is padded to a multiple of 64 inside, so
that the rows of all products are aligned: the head is copied once into a buffer with rows of zeros at its end (77 MB
for GPT-2 124M in 16 bits), and the gradient is the first rows of such a buffer. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.ops.layer_norm.layout import as_rows
from fastgpt.ops.linear_cross_entropy.backend_torch import add_product

# Rows whose logits exist at a time: with fewer, the product that gives dx, (rows, n), has too few tiles for a GPU.
CHUNK_ROWS = 8192
# Rows of the padded vocabulary come in multiples of it.
ALIGNMENT = 64
# dweight in 16 bits is rounded once a chunk, each time by at most 2^-9 (bfloat16) or 2^-12 (float16) of the sum so far.
# Of more chunks than these the sums are float32, and each chunk's product is rounded instead.
MAX_ROUNDED_CHUNKS = 4


def in_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    needs_dx: bool,
    needs_dweight: bool,
    cross_entropy: Callable[[Tensor, Tensor, Tensor, Tensor, int, int, bool], None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean loss (float32), dx (like x) and dweight (like weight), or None for what is not needed.

    Args:
        x, weight, targets, ignore_index, needs_dx, needs_dweight: as a backend's `forward` takes them.
        cross_entropy: called as (losses, logits, targets, count, vocab_size, ignore_index, gradient) for each chunk;
            fills losses (rows,), and writes (softmax - onehot) / count over the logits (rows, padded vocabulary).
    """
    # Inside an autocast region the products would come back in another dtype than the buffers have.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, targets = as_rows(x), targets.contiguous()
        vocab_size, rows = weight.shape[0], x.shape[0]
        count = (targets != ignore_index).sum()
        losses = torch.empty(rows, dtype=torch.float32, device=x.device)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_dx else None
        head = padded(weight, x.dtype)
        dhead = torch.empty(head.shape, dtype=_sum_dtype(weight, rows), device=x.device) if needs_dweight else None
        if dhead is not None and rows == 0:
            dhead.zero_()
        logits_buffer = torch.empty(min(CHUNK_ROWS, rows), head.shape[0], dtype=x.dtype, device=x.device)
        for begin in range(0, rows, CHUNK_ROWS):
            chunk = slice(begin, begin + CHUNK_ROWS)
            logits = logits_buffer[: len(x[chunk])]
            torch.mm(x[chunk], head.t(), out=logits)
            cross_entropy(
                losses[chunk], logits, targets[chunk], count, vocab_size, ignore_index, needs_dx or needs_dweight
            )
            if dx is not None:
                torch.mm(logits, head, out=dx[chunk])
            if dhead is not None:
                add_product(dhead, logits.t(), x[chunk], first=begin == 0)
        dweight = None if dhead is None else dhead[:vocab_size].to(weight.dtype)
        return losses.sum() / count, dx, dweight


def padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (vocab_size, n) in `dtype`, with rows of zeros up to a multiple of ALIGNMENT; itself where it fits."""
    vocab_size, n = weight.shape
    if vocab_size % ALIGNMENT == 0:
        return weight.to(dtype)
    head = torch.empty(-(-vocab_size // ALIGNMENT) * ALIGNMENT, n, dtype=dtype, device=weight.device)
    head[:vocab_size] = weight
    head[vocab_size:] = 0
    return head


def _sum_dtype(weight: Tensor, rows: int) -> torch.dtype:
    return weight.dtype if rows <= MAX_ROUNDED_CHUNKS * CHUNK_ROWS else torch.float32
