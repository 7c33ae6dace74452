"""Causal attention on the CPU: kernels/cpu/attention.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import buffers, cpu_support, philox
from fastgpt.ops.extension import DTYPE_CODES, load, num_threads

if TYPE_CHECKING:
    from fastgpt.ops.attention import Case


# The width of the kernel's workspaces; see kMaxHeadDim in kernels/cpu/table.h.
MAX_HEAD_DIM = 256


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU, head_dim up to 256."""
    if case.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {case.head_dim}; the kernel takes up to {MAX_HEAD_DIM}"
    return cpu_support.why_not(case.device, case.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns out (like q, laid out as (batch, q_len, n_heads, head_dim)) and lse (batch, n_heads, q_len), float32."""
    q, k, v = map(_readable, (q, k, v))
    out = _empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    load("cpu").attention_forward(
        out.data_ptr(), out.stride(), lse.data_ptr(),
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        _sizes(q, k), softmax_scale, seed, philox.threshold(dropout_p), DTYPE_CODES[q.dtype], num_threads(),
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    softmax_scale: float, dropout_p: float, seed: int, grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dq, dk and dv, like q, k and v, each laid out as (batch, len, n_heads, head_dim).

    `grads` are three tensors to write them into instead, any strides but a contiguous last axis.
    """
    dout, q, k, v, out = map(_readable, (dout, q, k, v, out))
    lse = lse.contiguous()
    dq, dk, dv = grads or tuple(map(_empty_like, (q, k, v)))
    load("cpu").attention_backward(
        dq.data_ptr(), dq.stride(), dk.data_ptr(), dk.stride(), dv.data_ptr(), dv.stride(),
        dout.data_ptr(), dout.stride(), q.data_ptr(), q.stride(), k.data_ptr(), k.stride(),
        v.data_ptr(), v.stride(), out.data_ptr(), out.stride(), lse.data_ptr(),
        _sizes(q, k), softmax_scale, seed, philox.threshold(dropout_p), DTYPE_CODES[q.dtype], num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """As model code wants it: transposed back, the heads of a position lie side by side."""
    batch, n_heads, length, head_dim = x.shape
    return buffers.empty((batch, length, n_heads, head_dim), x.dtype).transpose(1, 2)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    batch, n_heads, q_len, head_dim = q.shape
    return batch, n_heads, q_len, k.shape[2], head_dim
