"""The output head and the loss on the CPU: kernels/cpu/cross_entropy.h between the products of linear/products.py.

Beyond the results only the logits of one chunk of rows exist, in one buffer: the products write into it and read from
it, and the kernel writes the gradient of the logits over them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import buffers, cpu_support
from fastgpt.ops.extension import DTYPE_CODES, load, num_threads
from fastgpt.ops.layer_norm.layout import as_rows
from fastgpt.ops.linear.products import matmul_into

if TYPE_CHECKING:
    from fastgpt.ops.linear_cross_entropy import Case

# The kernel raises IndexError for a target outside the vocabulary.
CHECKS_RANGE = True

# Rows whose logits exist at a time, 206 MB of them with GPT-2's words; every chunk reads the weights twice, and reads
# and writes their gradient. Forward and backward of (rows, 768) by (50257, 768) on two Zen 3 cores, speed in times of
# chunks of 512 rows: 1,024 rows by 768 1.01, by 1,024 1.03; 2,048 rows by 1,024 1.02, by 2,048 1.03.
CHUNK_ROWS = 1024


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU, weights of that dtype or float32."""
    return cpu_support.why_not(case.device, case.dtype, case.weight_dtype)


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the mean loss (float32), dx (like x) and dweight (like weight), or None for what is not needed."""
    # Inside an autocast region the products would come back in another dtype than the buffers have.
    with torch.no_grad(), torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
        x, targets, head = as_rows(x), targets.contiguous(), weight.to(x.dtype)
        dx = buffers.empty(x.shape, x.dtype) if needs_dx else None
        dweight = buffers.empty(weight.shape, weight.dtype) if needs_dweight else None
        count = load("cpu").count_targets(targets.data_ptr(), len(targets), len(head), ignore_index)
        losses = torch.empty(len(targets), dtype=torch.float32, device="cpu")
        if count == 0:
            # Every gradient is zero, and 0 / 0 the mean.
            for gradient in (dx, dweight):
                if gradient is not None:
                    gradient.zero_()
            return torch.full((), torch.nan, dtype=torch.float32, device="cpu"), dx, dweight
        buffer = buffers.empty((min(CHUNK_ROWS, len(x)), len(head)), x.dtype)
        for begin in range(0, len(x), CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            chunk = x[rows]
            logits = buffer[: len(chunk)]
            matmul_into(logits, chunk, head.t())
            _cross_entropy(losses[rows], logits, targets[rows], ignore_index, 1 / count, needs_dx or needs_dweight)
            if dx is not None:
                matmul_into(dx[rows], logits, head)
            if dweight is not None:
                matmul_into(dweight, logits.t(), chunk, accumulate=begin > 0)
        return losses.sum(dtype=torch.float64).div_(count).float(), dx, dweight


def _cross_entropy(
    losses: Tensor, logits: Tensor, targets: Tensor, ignore_index: int, scale: float, gradient: bool
) -> None:
    """Fill losses, and write scale · (softmax - onehot) over the logits."""
    load("cpu").cross_entropy(
        losses.data_ptr(), logits.data_ptr(), targets.data_ptr(), *logits.shape, ignore_index, scale, gradient,
        DTYPE_CODES[logits.dtype], num_threads(),
    )  # fmt: skip
