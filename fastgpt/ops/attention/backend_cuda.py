"""Causal attention in CUDA C++: kernels/cuda/attention.cuh and attention_backward.cuh.

On Hopper calls run kernels/cuda/attention_hopper.cuh and attention_backward_hopper.cuh, unless `cuda_path("sm_80")` or
FASTGPT_CUDA_PATH says otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt import env
from fastgpt.ops import cuda_support, philox
from fastgpt.ops.cuda_support import DTYPE_CODES

if TYPE_CHECKING:
    from fastgpt.ops.attention import Case

AUTOMATIC = cuda_support.UNPROVEN

MAX_HEAD_DIM = 128
# The kernels divide by nothing and fold log2(e) into the scale, so it must be a positive normal number.
_LEAST_SCALE = 1e-37

# Of the whole process: on a GPU autograd runs the backward in a thread of its own, which sees no context variable.
_path: list[str] = []
_path_of_environment = functools.cache(env.cuda_path)


@contextmanager
def cuda_path(name: str) -> Iterator[None]:
    """Inside, the process runs "auto", the best kernels for the GPU, or "sm_80", those of any GPU: to race the two.

    Raises:
        ValueError: the name is neither.
    """
    if name not in env.CUDA_PATHS:
        raise ValueError(f"CUDA path {name!r} is not known; use one of: {', '.join(env.CUDA_PATHS)}.")
    _path.append(name)
    try:
        yield
    finally:
        _path.pop()


def why_not(case: Case) -> str | None:
    """bfloat16 and float16 on the GPU, head_dim up to 128."""
    if case.head_dim > MAX_HEAD_DIM:
        return f"the kernels take head_dim up to {MAX_HEAD_DIM}, not {case.head_dim}"
    if case.dtype == torch.float32:
        return "the kernels take bfloat16 and float16; float32 has no fast product on the tensor cores"
    return cuda_support.why_not(case.device, case.dtype)


def why_not_hopper(*inputs: Tensor) -> str | None:
    """Why these inputs, aligned as the kernels read them, must be read by the kernels of sm_80, or None."""
    if (_path[-1] if _path else _path_of_environment()) == "sm_80":
        return "the path sm_80 was asked for"
    if any(size > 1 and stride == 0 for x in inputs for size, stride in zip(x.shape, x.stride(), strict=True)):
        return "TMA reads no axis that is expanded"
    if not cuda_support.runs_sm90a(inputs[0].device.index):
        return "the GPU does not run machine code of sm_90a"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns out, laid out as (batch, q_len, n_heads, head_dim), and lse (batch, n_heads, q_len), float32."""
    with cuda_support.device_of(q):
        q, softmax_scale = _positive(q, softmax_scale)
        q, k, v = map(_readable, (q, k, v))
        out = _like_out(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        module = cuda_support.load()
        hopper = why_not_hopper(q, k, v) is None
        launch = module.attention_forward_hopper if hopper else module.attention_forward
        launch(
            out.data_ptr(), out.stride(), lse.data_ptr(),
            q.data_ptr(), _strides(q), k.data_ptr(), _strides(k), v.data_ptr(), _strides(v),
            _sizes(q, k), softmax_scale, seed, philox.threshold(dropout_p), DTYPE_CODES[q.dtype],
            cuda_support.stream(),
        )  # fmt: skip
        return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    softmax_scale: float, dropout_p: float, seed: int, *, grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dq, dk and dv: `grads`, which are written in place, or new ones as (batch, length, n_heads, head_dim)."""
    with cuda_support.device_of(q):
        flipped = softmax_scale < 0.0
        q, softmax_scale = _positive(q, softmax_scale)
        dout, q, k, v, out = map(_readable, (dout, q, k, v, out))
        lse = lse.contiguous()
        dq, dk, dv = map(_like_out, (q, k, v)) if grads is None else grads
        batch, n_heads, q_len = lse.shape
        # Two numbers a row, and rows to a multiple of 64: the kernels of sm_90a ask for as many.
        scratch = torch.empty(batch, n_heads, (q_len + 63) // 64 * 64, 2, dtype=torch.float32, device=q.device)
        module = cuda_support.load()
        hopper = why_not_hopper(dout, q, k, v) is None
        launch = module.attention_backward_hopper if hopper else module.attention_backward
        launch(
            dq.data_ptr(), _strides(dq), dk.data_ptr(), _strides(dk), dv.data_ptr(), _strides(dv), scratch.data_ptr(),
            dout.data_ptr(), _strides(dout), q.data_ptr(), _strides(q), k.data_ptr(), _strides(k),
            v.data_ptr(), _strides(v), out.data_ptr(), _strides(out), lse.data_ptr(),
            _sizes(q, k), softmax_scale, seed, philox.threshold(dropout_p), DTYPE_CODES[q.dtype],
            cuda_support.stream(),
        )  # fmt: skip
        return dq.neg_() if flipped else dq, dk, dv


def _positive(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """The same scores from a positive scale: the running maximum is taken before the scale."""
    if softmax_scale < 0.0:
        q, softmax_scale = -q, -softmax_scale
    return q, max(softmax_scale, _LEAST_SCALE)


def _readable(x: Tensor) -> Tensor:
    """x, or a copy, such that every row begins at a multiple of 16 bytes and its last axis is contiguous."""
    batch, n_heads, length, head_dim = x.shape
    contiguous = x.stride(3) == 1 or head_dim == 1
    if contiguous and x.data_ptr() % 16 == 0 and not any(stride % 8 for stride in _strides(x)[:3]):
        return x
    padded = x.new_empty(batch, length, n_heads, (head_dim + 7) // 8 * 8).transpose(1, 2)[..., :head_dim]
    return padded.copy_(x)


def _strides(x: Tensor) -> tuple[int, ...]:
    # An axis of one element is never stepped along, and its stride may be anything.
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _like_out(x: Tensor) -> Tensor:
    batch, n_heads, length, head_dim = x.shape
    return torch.empty(batch, length, n_heads, head_dim, dtype=x.dtype, device=x.device).transpose(1, 2)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    batch, n_heads, q_len, head_dim = q.shape
    return batch, n_heads, q_len, k.shape[2], head_dim
