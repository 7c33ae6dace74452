"""The output head and the loss in Triton: gpu_chunks.py, with kernels/triton/cross_entropy.py between the products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastgpt.ops import triton_support
from fastgpt.ops.linear_cross_entropy.gpu_chunks import in_chunks

if TYPE_CHECKING:
    from fastgpt.ops.linear_cross_entropy import Case

AUTOMATIC = triton_support.UNPROVEN


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU, weights of that dtype or float32."""
    return triton_support.why_not(case.device, case.dtype, case.weight_dtype)


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the mean loss (float32), dx (like x) and dweight (like weight), or None for what is not needed."""
    with triton_support.device_of(x):
        return in_chunks(x, weight, targets, ignore_index, needs_dx, needs_dweight, cross_entropy)


def cross_entropy(
    losses: Tensor, logits: Tensor, targets: Tensor, count: Tensor, vocab_size: int, ignore_index: int, gradient: bool
) -> None:
    """Fill losses (rows,), and write (softmax - onehot) / count over the logits (rows, padded vocabulary)."""
    from fastgpt.kernels.triton.cross_entropy import cross_entropy_kernel as kernel

    tile = triton_support.row_tile("cross_entropy", logits, logits.shape[1])
    block = min(tile.columns, triton_support.next_power_of_2(logits.shape[1]))
    kernel[(len(logits),)](
        losses, logits, targets, count, logits.stride(0), vocab_size, ignore_index,
        PADDED=logits.shape[1], BLOCK=block, GRADIENT=gradient, num_warps=tile.num_warps, **triton_support.OPTIONS,
    )  # fmt: skip
