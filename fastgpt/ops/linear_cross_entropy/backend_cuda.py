"""The output head and the loss in CUDA C++: gpu_chunks.py, with kernels/cuda/cross_entropy.cuh between the products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastgpt.ops import cuda_support
from fastgpt.ops.cuda_support import DTYPE_CODES
from fastgpt.ops.linear_cross_entropy.gpu_chunks import in_chunks

if TYPE_CHECKING:
    from fastgpt.ops.linear_cross_entropy import Case

AUTOMATIC = cuda_support.UNPROVEN


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU, weights of that dtype or float32."""
    return cuda_support.why_not(case.device, case.dtype, case.weight_dtype)


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the mean loss (float32), dx (like x) and dweight (like weight), or None for what is not needed."""
    with cuda_support.device_of(x):
        return in_chunks(x, weight, targets, ignore_index, needs_dx, needs_dweight, cross_entropy)


def cross_entropy(
    losses: Tensor, logits: Tensor, targets: Tensor, count: Tensor, vocab_size: int, ignore_index: int, gradient: bool
) -> None:
    """Fill losses (rows,), and write (softmax - onehot) / count over the logits (rows, padded vocabulary)."""
    cuda_support.load().cross_entropy(
        losses.data_ptr(), logits.data_ptr(), targets.data_ptr(), count.data_ptr(), *logits.shape, vocab_size,
        ignore_index, gradient, DTYPE_CODES[logits.dtype], cuda_support.stream(),
    )  # fmt: skip
