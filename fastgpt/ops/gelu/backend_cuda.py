"""GELU in CUDA C++: kernels/cuda/gelu.cuh, and bias_gelu.cuh where there is a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import cuda_rows, cuda_support
from fastgpt.ops.cuda_support import DTYPE_CODES
from fastgpt.ops.gelu.unfused import bias_gradient, biased

if TYPE_CHECKING:
    from fastgpt.ops.gelu import Case

AUTOMATIC = cuda_support.UNPROVEN


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU."""
    return cuda_support.why_not(case.device, case.dtype)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """Returns gelu(x + bias), contiguous."""
    if bias is not None and _fits(x):
        return cuda_rows.gelu_forward(x, bias)
    with cuda_support.device_of(x):
        x = biased(x, bias).contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        stream = cuda_support.stream()
        cuda_support.load().gelu_forward(out.data_ptr(), x.data_ptr(), x.numel(), DTYPE_CODES[x.dtype], stream)
        return out


def backward(dout: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns dx = dout · gelu'(x + bias), contiguous, and dbias."""
    if bias is not None and _fits(x):
        return cuda_rows.gelu_backward(dout, x, bias)
    with cuda_support.device_of(x):
        x, dout = biased(x, bias).contiguous(), dout.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        cuda_support.load().gelu_backward(
            dx.data_ptr(), dout.data_ptr(), x.data_ptr(),
            x.numel(), DTYPE_CODES[x.dtype], cuda_support.stream(),
        )  # fmt: skip
        return dx, bias_gradient(dx, bias)


def _fits(x: Tensor) -> bool:
    return x.shape[-1] > 0 and x.shape[-1] % cuda_rows.GROUP == 0
