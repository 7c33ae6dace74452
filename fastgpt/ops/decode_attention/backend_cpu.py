"""Attention over a key-value cache on the CPU: kernels/cpu/decode_attention.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import cpu_support
from fastgpt.ops.extension import DTYPE_CODES, load, num_threads

if TYPE_CHECKING:
    from fastgpt.ops.decode_attention import Case


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU."""
    return cpu_support.why_not(case.device, case.dtype)


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last axis: itself where it has one, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, softmax_scale: float) -> Tensor:
    """Returns (batch, n_heads, head_dim), contiguous."""
    q, k, v, lengths = _rows(q), _rows(k_cache), _rows(v_cache), lengths.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    load("cpu").decode_attention(
        out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), lengths.data_ptr(),
        *k.shape, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        softmax_scale, DTYPE_CODES[q.dtype], num_threads(),
    )  # fmt: skip
    return out
