"""GELU on the CPU: kernels/cpu/gelu.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import cpu_support
from fastgpt.ops.extension import DTYPE_CODES, load, num_threads
from fastgpt.ops.gelu.unfused import bias_gradient, biased

if TYPE_CHECKING:
    from fastgpt.ops.gelu import Case


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU."""
    return cpu_support.why_not(case.device, case.dtype)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """Returns gelu(x + bias), contiguous."""
    x = biased(x, bias).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    load("cpu").gelu_forward(out.data_ptr(), x.data_ptr(), x.numel(), DTYPE_CODES[x.dtype], num_threads())
    return out


def backward(dout: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns dx = dout · gelu'(x + bias), contiguous, and dbias."""
    x, dout = biased(x, bias).contiguous(), dout.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype)
    load("cpu").gelu_backward(
        dx.data_ptr(), dout.data_ptr(), x.data_ptr(), x.numel(), DTYPE_CODES[x.dtype], num_threads()
    )
    return dx, bias_gradient(dx, bias)
