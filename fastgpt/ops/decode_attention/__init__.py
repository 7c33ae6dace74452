"""Attention of one new token per row over a key-value cache: the door of the room.

    out = softmax(q k_cacheᵀ · softmax_scale) v_cache        over the first lengths[row] keys of each row

The query is the newest token, whose own key and value are already in the cache, so it sees every key and there is no
mask. Rows may be of different length; what lies behind a row's length is never read. No gradient: for training use
`causal_attention`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import dispatch, registration

BACKENDS = ("cuda", "cpu", "torch", "reference")
MAX_HEAD_DIM = 256


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    dtype: torch.dtype
    head_dim: int


OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = tuple(Case("cpu", dtype, 64) for dtype in (torch.float32, torch.bfloat16))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from one query per row and head to the filled part of a cache.

    Args:
        q: (batch, n_heads, head_dim), floating point, head_dim from 1 to 256.
        k_cache, v_cache: (batch, n_heads, max_len, head_dim), like `q`. Any strides with a contiguous last axis are
            read in place; another layout is copied first.
        lengths: (batch,) int64 on the CPU, from 1 to max_len: how many keys of the row are filled.
        softmax_scale: factor on the scores; 1/√head_dim when None.
        backend: nearest choice of a backend; see `fastgpt.ops.use_backend`.

    Returns:
        (batch, n_heads, head_dim), contiguous, in the dtype of `q`. Scores, softmax and sums are float32 (float64 for
        float64).

    Raises:
        ValueError: a shape, dtype, device or length does not fit, or a gradient is asked for.
        BackendError: the backend that was asked for cannot run this input.

    Paper: Dao et al., "Flash-Decoding for long-context inference", 2023.
    """
    _check(q, k_cache, v_cache, lengths)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[-1])
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.fastgpt.decode_attention(q, k_cache, v_cache, lengths, softmax_scale, backend)
        return out
    return _forward(q, k_cache, v_cache, lengths, softmax_scale, backend)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    shape = k_cache.shape
    if q.ndim != 3 or len(shape) != 4 or v_cache.shape != shape or q.shape != (shape[0], shape[1], shape[3]):
        raise ValueError(
            "decode_attention: q must be (batch, n_heads, head_dim), k_cache and v_cache (batch, n_heads, max_len, "
            f"head_dim); got q {tuple(q.shape)}, k_cache {tuple(shape)}, v_cache {tuple(v_cache.shape)}."
        )
    if not 1 <= shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"decode_attention: head_dim is {shape[3]}; it must be from 1 to {MAX_HEAD_DIM}.")
    if not q.is_floating_point() or not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            "decode_attention: q, k_cache and v_cache must have one floating-point dtype; got "
            f"{q.dtype}, {k_cache.dtype} and {v_cache.dtype}."
        )
    if not q.device == k_cache.device == v_cache.device:
        raise ValueError(
            f"decode_attention: q is on {q.device}, k_cache on {k_cache.device}, v_cache on {v_cache.device}; "
            "move all to one device."
        )
    if lengths.shape != shape[:1] or lengths.dtype != torch.int64 or lengths.device.type != "cpu":
        raise ValueError(
            f"decode_attention: lengths must be ({shape[0]},), torch.int64, on the CPU; got {tuple(lengths.shape)}, "
            f"{lengths.dtype}, on {lengths.device}."
        )
    if registration.needs_grad(q, k_cache, v_cache):
        raise ValueError(
            "decode_attention has no gradient; call it under torch.no_grad(), or train with causal_attention."
        )


# The registered op: what torch.compile sees.


def _forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, softmax_scale: float, backend: str | None
) -> Tensor:
    max_len, values = k_cache.shape[2], lengths.tolist()
    if values and not 1 <= min(values) <= max(values) <= max_len:
        raise ValueError(
            f"decode_attention: lengths must be from 1 to max_len = {max_len}, since a row's newest key is in the "
            f"cache before it is read; got {values}."
        )
    chosen = OP.choose(Case(q.device.type, q.dtype, q.shape[-1]), backend)
    out: Tensor = chosen.forward(q, k_cache, v_cache, lengths, softmax_scale)
    return out


def _forward_fake(q: Tensor, *unused: object) -> Tensor:
    return q.new_empty(q.shape)


registration.register(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float softmax_scale, str? backend) "
    "-> Tensor",
    _forward,
    _forward_fake,
)
