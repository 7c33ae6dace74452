"""Layer normalisation in CUDA C++: kernels/cuda/row_norm.cuh, and layer_norm.cuh for rows that it does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import cuda_rows, cuda_support
from fastgpt.ops.cuda_support import DTYPE_CODES
from fastgpt.ops.layer_norm.layout import as_rows

if TYPE_CHECKING:
    from fastgpt.ops.layer_norm import Case

AUTOMATIC = cuda_support.UNPROVEN

# Parts of the rows whose column sums are formed side by side.
MAX_PARTS = 64


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU, weights of that dtype or float32."""
    return cuda_support.why_not(case.device, case.dtype, case.weight_dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (like x, contiguous), mean and rstd (x.shape[:-1], float32)."""
    if _fits(as_rows(x)):
        out, _, mean, rstd = cuda_rows.norm_forward(x, None, weight, bias, eps, 0.0, 0)
        return out, mean, rstd
    with cuda_support.device_of(x):
        rows = as_rows(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
        weight, bias = weight.contiguous(), bias.contiguous()
        cuda_support.load().layer_norm_forward(
            out.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            rows.data_ptr(), weight.data_ptr(), bias.data_ptr(),
            rows.shape[0], rows.shape[1], rows.stride(0),
            eps, DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], cuda_support.stream(),
        )  # fmt: skip
        return out, mean, rstd


def backward(dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx (like x, contiguous), dweight and dbias (n,) in the dtype of weight."""
    if _fits(as_rows(x)):
        return cuda_rows.norm_backward(None, dout, x, weight, mean, rstd, 0.0, 0)[1:]
    with cuda_support.device_of(x):
        rows, drows = as_rows(x), as_rows(dout)
        weight = weight.contiguous()
        parts = max(1, min(MAX_PARTS, rows.shape[0] // 64))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        partial = torch.empty(parts, 2, x.shape[-1], dtype=torch.float32, device=x.device)
        cuda_support.load().layer_norm_backward(
            dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), partial.data_ptr(),
            drows.data_ptr(), rows.data_ptr(), weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            rows.shape[0], rows.shape[1], drows.stride(0), rows.stride(0), parts,
            DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], cuda_support.stream(),
        )  # fmt: skip
        return dx, dweight, dbias


def _fits(rows: Tensor) -> bool:
    return 0 < rows.shape[1] <= cuda_rows.MAX_N and cuda_rows.is_aligned(rows)
