"""Dropout, residual addition and layer normalisation in CUDA C++: kernels/cuda/row_norm.cuh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastgpt.ops import cuda_rows, cuda_support

if TYPE_CHECKING:
    from fastgpt.ops.dropout_add_layer_norm import Case

AUTOMATIC = cuda_support.UNPROVEN


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU, rows of whole groups of 8 elements, 2,048 at most."""
    if case.n % cuda_rows.GROUP or not 0 < case.n <= cuda_rows.MAX_N:
        return f"the kernel holds rows of 8, 16, ... {cuda_rows.MAX_N} elements in registers, not of {case.n}"
    return cuda_support.why_not(case.device, case.dtype, case.weight_dtype)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns total and normed (like x, contiguous), mean and rstd (x.shape[:-1], float32)."""
    normed, total, mean, rstd = cuda_rows.norm_forward(x, residual, weight, bias, eps, dropout_p, seed)
    return total, normed, mean, rstd


def backward(
    dtotal: Tensor | None, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dx and dresidual (like total, contiguous; one tensor without dropout), dweight and dbias (n,)."""
    return cuda_rows.norm_backward(dtotal, dnormed, total, weight, mean, rstd, dropout_p, seed)
