"""Layer normalisation on the CPU: kernels/cpu/layer_norm.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import buffers, cpu_support
from fastgpt.ops.extension import DTYPE_CODES, load, num_threads
from fastgpt.ops.layer_norm.layout import as_rows

if TYPE_CHECKING:
    from fastgpt.ops.layer_norm import Case


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU, weights of either dtype."""
    return cpu_support.why_not(case.device, case.dtype, case.weight_dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (like x, contiguous), mean and rstd (x.shape[:-1], float32)."""
    rows = as_rows(x)
    out = buffers.empty(x.shape, x.dtype)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")
    rstd = torch.empty_like(mean)
    weight, bias = weight.contiguous(), bias.contiguous()
    load("cpu").layer_norm_forward(
        out.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        rows.shape[0], rows.shape[1], rows.stride(0),
        eps, DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], num_threads(),
    )  # fmt: skip
    return out, mean, rstd


def backward(dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx (like x, contiguous), dweight and dbias (n,) in the dtype of weight."""
    rows, drows = as_rows(x), as_rows(dout)
    weight = weight.contiguous()
    dx = buffers.empty(x.shape, x.dtype)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    load("cpu").layer_norm_backward(
        dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr(),
        drows.data_ptr(), rows.data_ptr(), weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        rows.shape[0], rows.shape[1], drows.stride(0), rows.stride(0),
        DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias
