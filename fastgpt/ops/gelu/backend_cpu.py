"""GELU on the CPU: kernels/cpu/gelu.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import buffers, cpu_support
from fastgpt.ops.extension import DTYPE_CODES, load, num_threads

if TYPE_CHECKING:
    from fastgpt.ops.gelu import Case


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU, a bias of either dtype."""
    return cpu_support.why_not(case.device, case.dtype, case.bias_dtype or case.dtype)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """Returns gelu(x + bias), contiguous."""
    x = x.contiguous()
    out = buffers.empty(x.shape, x.dtype)
    if x.numel():
        bias, address, code = _readable(bias)
        load("cpu").gelu_forward(
            out.data_ptr(), x.data_ptr(), address, *_rows(x), DTYPE_CODES[x.dtype], code, num_threads()
        )
    return out


def backward(dout: Tensor, x: Tensor, bias: Tensor | None, *, in_place: bool = False) -> tuple[Tensor, Tensor | None]:
    """Returns dx = dout · gelu'(x + bias), contiguous, and dbias. `in_place` writes dx over a contiguous dout."""
    x, dout = x.contiguous(), dout.contiguous()
    dx = dout if in_place else buffers.empty(x.shape, x.dtype)
    if x.numel() == 0:
        return dx, None if bias is None else torch.zeros_like(bias)
    bias, address, code = _readable(bias)
    dbias = None if bias is None else torch.empty_like(bias)
    load("cpu").gelu_backward(
        dx.data_ptr(), 0 if dbias is None else dbias.data_ptr(), dout.data_ptr(), x.data_ptr(), address,
        *_rows(x), DTYPE_CODES[x.dtype], code, num_threads(),
    )  # fmt: skip
    return dx, dbias


def _rows(x: Tensor) -> tuple[int, int]:
    n = x.shape[-1] if x.ndim else 1
    return x.numel() // n, n


def _readable(bias: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The bias with a contiguous axis, its address (0 without one) and its dtype's code."""
    if bias is None:
        return None, 0, DTYPE_CODES[torch.float32]
    bias = bias.contiguous()
    return bias, bias.data_ptr(), DTYPE_CODES[bias.dtype]
