"""Packed causal attention on the CPU: the attention room's kernels on strided views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastgpt.ops import buffers
from fastgpt.ops.attention import backend_cpu as unpacked
from fastgpt.ops.packed_causal_attention import split

if TYPE_CHECKING:
    from fastgpt.ops.attention import Case


def why_not(case: Case) -> str | None:
    """What the attention room's backend says."""
    return unpacked.why_not(case)


def forward(qkv: Tensor, softmax_scale: float, dropout_p: float, seed: int) -> tuple[Tensor, Tensor]:
    """Returns out (batch, n_tokens, n_heads, head_dim), contiguous, and lse (batch, n_heads, n_tokens), float32."""
    out, lse = unpacked.forward(*split(qkv), softmax_scale, dropout_p, seed)
    return out.transpose(1, 2), lse


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, softmax_scale: float, dropout_p: float, seed: int
) -> Tensor:
    """Returns the packed gradient, contiguous, in the layout of qkv."""
    dqkv = buffers.empty(qkv.shape, qkv.dtype)
    unpacked.backward(
        dout.transpose(1, 2), *split(qkv), out.transpose(1, 2), lse, softmax_scale, dropout_p, seed, grads=split(dqkv)
    )
    return dqkv
