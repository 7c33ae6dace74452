"""Dropout, residual addition and layer normalisation on the CPU: kernels/cpu/dropout_add_layer_norm.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import buffers, cpu_support, philox
from fastgpt.ops.extension import DTYPE_CODES, load, num_threads
from fastgpt.ops.layer_norm.layout import as_rows

if TYPE_CHECKING:
    from fastgpt.ops.dropout_add_layer_norm import Case


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU, weights of either dtype."""
    return cpu_support.why_not(case.device, case.dtype, case.weight_dtype)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns total and normed (like x, contiguous), mean and rstd (x.shape[:-1], float32)."""
    rows, residual_rows = as_rows(x), as_rows(residual)
    total, normed = buffers.empty(x.shape, x.dtype), buffers.empty(x.shape, x.dtype)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")
    rstd = torch.empty_like(mean)
    weight, bias = weight.contiguous(), bias.contiguous()
    load("cpu").dropout_add_layer_norm_forward(
        total.data_ptr(), normed.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows.data_ptr(), residual_rows.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        rows.shape[0], rows.shape[1], rows.stride(0), residual_rows.stride(0), eps, seed,
        philox.threshold(dropout_p), DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], num_threads(),
    )  # fmt: skip
    return total, normed, mean, rstd


def backward(
    dtotal: Tensor | None, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dx and dresidual (like total, contiguous; one tensor without dropout), dweight and dbias (n,)."""
    rows, drows = as_rows(total), as_rows(dnormed)
    dtotal_rows = None if dtotal is None else as_rows(dtotal)
    weight = weight.contiguous()
    dresidual = buffers.empty(total.shape, total.dtype)
    threshold = philox.threshold(dropout_p)
    dx = buffers.empty(total.shape, total.dtype) if threshold else dresidual
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    if weight.numel():
        load("cpu").dropout_add_layer_norm_backward(
            dx.data_ptr(), dresidual.data_ptr(), dweight.data_ptr(), dbias.data_ptr(),
            0 if dtotal_rows is None else dtotal_rows.data_ptr(), drows.data_ptr(),
            rows.data_ptr(), weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            rows.shape[0], rows.shape[1], 0 if dtotal_rows is None else dtotal_rows.stride(0), drows.stride(0), seed,
            threshold, DTYPE_CODES[total.dtype], DTYPE_CODES[weight.dtype], num_threads(),
        )  # fmt: skip
    return dx, dresidual, dweight, dbias
