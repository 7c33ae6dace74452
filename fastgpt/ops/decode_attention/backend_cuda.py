"""Attention over a key-value cache in CUDA C++: kernels/cuda/decode_attention.cuh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import cuda_support
from fastgpt.ops.cuda_support import DTYPE_CODES

if TYPE_CHECKING:
    from fastgpt.ops.decode_attention import Case

AUTOMATIC = cuda_support.UNPROVEN

# A block reads at least so many keys, so that joining the parts stays cheap.
_LEAST_KEYS = 64
# Blocks that fill a large chip twice.
_ENOUGH_BLOCKS = 264


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU, heads that fill pieces of 16 bytes."""
    piece = 16 // max(case.dtype.itemsize, 2)
    if case.head_dim % piece:
        return f"the kernel reads 16 bytes at a time, so head_dim must be a multiple of {piece}, not {case.head_dim}"
    return cuda_support.why_not(case.device, case.dtype)


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, softmax_scale: float) -> Tensor:
    """Returns (batch, n_heads, head_dim), contiguous. `lengths` may be on the GPU, where nothing then waits for it."""
    with cuda_support.device_of(q):
        q, k, v = _pieces(q), _pieces(k_cache), _pieces(v_cache)
        lengths = lengths.to(q.device).contiguous()
        batch, n_heads, max_len, head_dim = k.shape
        splits = split_count(batch * n_heads, max_len)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        partial = torch.empty(batch * n_heads, splits, 2 + head_dim, dtype=torch.float32, device=q.device)
        cuda_support.load().decode_attention(
            out.data_ptr(), partial.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), lengths.data_ptr(),
            (*_strides(q)[:2], *_strides(k)[:3], *_strides(v)[:3]), tuple(k.shape), splits,
            softmax_scale, DTYPE_CODES[q.dtype], cuda_support.stream(),
        )  # fmt: skip
        return out


def split_count(heads: int, max_len: int) -> int:
    """Into how many parts the keys of a head are cut."""
    return max(1, min(-(-_ENOUGH_BLOCKS // max(heads, 1)), max_len // _LEAST_KEYS))


def _pieces(x: Tensor) -> Tensor:
    """x, or a copy, whose rows are contiguous and begin at multiples of 16 bytes."""
    piece = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and not any(stride % piece for stride in _strides(x)[:-1])
    return x if aligned and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.clone(memory_format=torch.contiguous_format)


def _strides(x: Tensor) -> tuple[int, ...]:
    # An axis of one element is never stepped along, and its stride may be anything.
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
