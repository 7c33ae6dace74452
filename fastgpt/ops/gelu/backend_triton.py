"""GELU in Triton: kernels/triton/gelu.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import triton_support
from fastgpt.ops.gelu.unfused import bias_gradient, biased

if TYPE_CHECKING:
    from fastgpt.ops.gelu import Case

AUTOMATIC = triton_support.UNPROVEN

# Eight elements a thread: one 16-byte access in 16 bits, two in float32.
BLOCK = 1024
NUM_WARPS = 4


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU."""
    return triton_support.why_not(case.device, case.dtype)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """Returns gelu(x + bias), contiguous."""
    from fastgpt.kernels.triton.gelu import gelu_forward_kernel as kernel

    x = biased(x, bias).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if n := x.numel():
        with triton_support.device_of(x):
            kernel[(-(-n // BLOCK),)](out, x, n, BLOCK=BLOCK, num_warps=NUM_WARPS, **triton_support.OPTIONS)
    return out


def backward(dout: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns dx = dout · gelu'(x + bias), contiguous, and dbias."""
    from fastgpt.kernels.triton.gelu import gelu_backward_kernel as kernel

    x, dout = biased(x, bias).contiguous(), dout.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if n := x.numel():
        with triton_support.device_of(x):
            kernel[(-(-n // BLOCK),)](dx, dout, x, n, BLOCK=BLOCK, num_warps=NUM_WARPS, **triton_support.OPTIONS)
    return dx, bias_gradient(dx, bias)
