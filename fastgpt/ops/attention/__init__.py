"""Causal attention: the door of the room.

    out = dropout(softmax(q kᵀ · softmax_scale + mask)) v

The mask lies at the bottom right: query i sees key j when j <= i + k_len - q_len. For q_len = 3, k_len = 5:

    1 1 1 0 0
    1 1 1 1 0
    1 1 1 1 1

Saved for backward: q, k, v, out and lse (batch, n_heads, q_len), the float32 log-sum-exp of each row of scores. The
(q_len, k_len) matrix of weights is never stored, and the dropout mask is drawn again (fastgpt.ops.philox).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import buffers, dispatch, philox, registration

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    dtype: torch.dtype
    head_dim: int
    square: bool
    dropout: bool
    grad: bool


OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = tuple(
    Case("cpu", dtype, 64, square=True, dropout=dropout, grad=True)
    for dtype in (torch.float32, torch.bfloat16)
    for dropout in (False, True)
)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention in which a query sees its own position and those before it.

    Args:
        q: (batch, n_heads, q_len, head_dim), floating point; the kernels take head_dim from 1 to 256.
        k, v: (batch, n_heads, k_len, head_dim), like `q`; k_len >= q_len. Any strides with a contiguous last axis are
            read in place; another layout is copied first.
        softmax_scale: factor on the scores; 1/√head_dim when None.
        dropout_p: probability with which an attention weight is set to 0 (the others are scaled up), 0 <= p <= 1. The
            seed comes from torch's default CPU generator.
        backend: nearest choice of a backend; "reference" draws dropout from torch's generator as the book does.

    Returns:
        (batch, n_heads, q_len, head_dim) in the dtype of `q`, laid out as (batch, q_len, n_heads, head_dim), so that
        `out.transpose(1, 2).flatten(2)` copies nothing. Scores, softmax and sums are float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or probability does not fit.
        BackendError: the backend that was asked for cannot run this input.

    Paper: Dao, "FlashAttention-2", 2023.
    """
    _check(q, k, v, dropout_p)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[-1])
    if torch.compiler.is_compiling():
        drawn = torch.randint(2**63 - 1, (), device="cpu") if dropout_p else None
        call = torch.ops.fastgpt.causal_attention
        out: Tensor = call(q, k, v, drawn, softmax_scale, dropout_p, backend)[0]
        return out
    needs_grad = registration.needs_grad(q, k, v)
    chosen = OP.choose(_case(q, k, dropout_p, needs_grad), backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(q, k, v, softmax_scale, dropout_p)
    seed = philox.draw_seed() if dropout_p else 0
    if needs_grad:
        return _CausalAttention.apply(q, k, v, softmax_scale, dropout_p, seed, chosen)
    return chosen.forward(q, k, v, softmax_scale, dropout_p, seed)[0]


def _case(q: Tensor, k: Tensor, dropout_p: float, needs_grad: bool) -> Case:
    square = q.shape[2] == k.shape[2]
    return Case(dispatch.device_type(q), q.dtype, q.shape[-1], square, dropout_p > 0.0, needs_grad)


def _check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "causal_attention: q must be (batch, n_heads, q_len, head_dim), k and v (batch, n_heads, k_len, head_dim); "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"causal_attention: q_len {q.shape[2]} is larger than k_len {k.shape[2]}, so the first queries would see "
            f"no key; pass the keys of all earlier positions too."
        )
    if q.shape[3] == 0:
        raise ValueError("causal_attention: head_dim is 0; it must be at least 1.")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"causal_attention: q, k and v must have one floating-point dtype; got {q.dtype}, {k.dtype} and {v.dtype}."
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"causal_attention: q is on {q.device}, k on {k.device}, v on {v.device}; move all to one device."
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"causal_attention: dropout_p is {dropout_p}; it is a probability, from 0 to 1.")


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        dropout_p: float,
        seed: int,
        chosen: ModuleType,
    ) -> Tensor:
        out, lse = chosen.forward(q, k, v, softmax_scale, dropout_p, seed)
        ctx.save_for_backward(*registration.compact(q, k, v, out), lse)
        ctx.settings = (softmax_scale, dropout_p, seed)
        ctx.chosen = chosen
        return out

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *kept, lse = ctx.saved_tensors
        q, k, v, out = (buffers.cast(tensor, dout.dtype) for tensor in kept)
        dq, dk, dv = ctx.chosen.backward(dout, q, k, v, out, lse, *ctx.settings)
        return dq, dk, dv, None, None, None, None


# The registered op: what torch.compile sees. The seed is a tensor there, so that drawing it does not break the graph.


def _like_out(q: Tensor) -> Tensor:
    batch, n_heads, q_len, head_dim = q.shape
    return q.new_empty(batch, q_len, n_heads, head_dim).transpose(1, 2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen = OP.choose(_case(q, k, dropout_p, True), backend)
    number = 0 if seed is None else int(seed)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        out = chosen.apply(q, k, v, softmax_scale, dropout_p, seed=number)
        return _like_out(q).copy_(out), q.new_zeros(q.shape[:3], dtype=torch.float32)
    return chosen.forward(q, k, v, softmax_scale, dropout_p, number)


def _forward_fake(q: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    return _like_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = OP.choose(_case(q, k, dropout_p, True), backend)
    number = 0 if seed is None else int(seed)
    if not getattr(chosen, "NATIVE_AUTOGRAD", False):
        # The kernels write their gradients in the layout that the fake promises.
        return chosen.backward(dout, q, k, v, out, lse, softmax_scale, dropout_p, number)
    grads = registration.native_backward(
        lambda *leaves: chosen.apply(*leaves, softmax_scale, dropout_p, seed=number), (q, k, v), dout
    )
    dq, dk, dv = (like.copy_(grad) for like, grad in zip(map(_like_out, (q, k, v)), grads, strict=True))
    return dq, dk, dv


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_out(q), _like_out(k), _like_out(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, seed, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, seed)


def _autograd(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.fastgpt.causal_attention_backward(dout, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None


registration.register(
    "causal_attention(Tensor q, Tensor k, Tensor v, Tensor? seed, float softmax_scale, float dropout_p, "
    "str? backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
registration.register(
    "causal_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? seed, "
    "float softmax_scale, float dropout_p, str? backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
