"""Causal attention of queries, keys and values that lie side by side in one tensor: the door of the room.

The kernels are those of `ops.attention`, which take strides; what is gained is the gradient: one packed tensor that
they write straight into, so that nothing is transposed, stacked or added up on the way to the packed projection.

Saved for backward: qkv, out and lse.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import attention, buffers, dispatch, philox, registration
from fastgpt.ops.attention import Case

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")

OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = attention.EXAMPLE_CASES


def packed_causal_attention(
    qkv: Tensor, *, softmax_scale: float | None = None, dropout_p: float = 0.0, backend: str | None = None
) -> Tensor:
    """`causal_attention` of packed queries, keys and values.

    Args:
        qkv: (batch, n_tokens, 3, n_heads, head_dim), floating point; query, key, value. The last
            axis must be contiguous; another layout is copied first.
        softmax_scale: factor of the scores; 1 / sqrt(head_dim) without.
        dropout_p: share of attention weights to drop.
        backend: nearest choice of a backend; see `fastgpt.ops.use_backend`.

    Returns:
        (batch, n_tokens, n_heads, head_dim), contiguous; so is the gradient of qkv, in its own layout.

    Raises:
        ValueError: a shape, dtype or probability does not fit.
        BackendError: the backend that was asked for cannot run this input.

    Paper: Dao, "FlashAttention-2", 2023.
    """
    _check(qkv, dropout_p)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(qkv.shape[-1])
    if torch.compiler.is_compiling():
        drawn = torch.randint(2**63 - 1, (), device="cpu") if dropout_p else None
        call = torch.ops.fastgpt.packed_causal_attention
        out: Tensor = call(qkv, drawn, softmax_scale, dropout_p, backend)[0]
        return out
    needs_grad = registration.needs_grad(qkv)
    chosen = OP.choose(_case(qkv, dropout_p, needs_grad), backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(qkv, softmax_scale, dropout_p)
    seed = philox.draw_seed() if dropout_p else 0
    if needs_grad:
        return _PackedCausalAttention.apply(qkv, softmax_scale, dropout_p, seed, chosen)
    return chosen.forward(qkv, softmax_scale, dropout_p, seed)[0]


def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as views, (batch, n_heads, n_tokens, head_dim) each."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _case(qkv: Tensor, dropout_p: float, needs_grad: bool) -> Case:
    return Case(dispatch.device_type(qkv), qkv.dtype, qkv.shape[-1], True, dropout_p > 0.0, needs_grad)


def _check(qkv: Tensor, dropout_p: float) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(
            "packed_causal_attention: qkv must be (batch, n_tokens, 3, n_heads, head_dim) with head_dim of at least 1; "
            f"got {tuple(qkv.shape)}."
        )
    if not qkv.is_floating_point():
        raise ValueError(f"packed_causal_attention: qkv must be floating point; got {qkv.dtype}.")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"packed_causal_attention: dropout_p is {dropout_p}; it is a probability, from 0 to 1.")


class _PackedCausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, softmax_scale: float, dropout_p: float, seed: int, chosen: ModuleType) -> Tensor:
        out, lse = chosen.forward(qkv, softmax_scale, dropout_p, seed)
        ctx.save_for_backward(*registration.compact(qkv, out), lse)
        ctx.settings = (softmax_scale, dropout_p, seed)
        ctx.chosen = chosen
        return out

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        dqkv = ctx.chosen.backward(
            dout, buffers.cast(qkv, dout.dtype), buffers.cast(out, dout.dtype), lse, *ctx.settings
        )
        return dqkv, None, None, None, None


# The registered op: what torch.compile sees. The seed is a tensor there, so that drawing it does not break the graph.


def _forward(
    qkv: Tensor, seed: Tensor | None, softmax_scale: float, dropout_p: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    chosen = OP.choose(_case(qkv, dropout_p, True), backend)
    number = 0 if seed is None else int(seed)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        out = chosen.apply(qkv, softmax_scale, dropout_p, seed=number)
        return out.contiguous(), _lse(qkv).zero_()
    return chosen.forward(qkv, softmax_scale, dropout_p, number)


def _lse(qkv: Tensor) -> Tensor:
    batch, n_tokens, _, n_heads, _ = qkv.shape
    return qkv.new_empty(batch, n_heads, n_tokens, dtype=torch.float32)


def _forward_fake(qkv: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    batch, n_tokens, _, n_heads, head_dim = qkv.shape
    return qkv.new_empty(batch, n_tokens, n_heads, head_dim), _lse(qkv)


def _backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    chosen = OP.choose(_case(qkv, dropout_p, True), backend)
    number = 0 if seed is None else int(seed)
    if not getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.backward(dout, qkv, out, lse, softmax_scale, dropout_p, number)
    (dqkv,) = registration.native_backward(
        lambda leaf: chosen.apply(leaf, softmax_scale, dropout_p, seed=number), (qkv,), dout
    )
    return dqkv


def _backward_fake(dout: Tensor, qkv: Tensor, *unused: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, seed, *ctx.settings = inputs
    ctx.save_for_backward(qkv, *output, seed)


def _autograd(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    dqkv = torch.ops.fastgpt.packed_causal_attention_backward(dout, *ctx.saved_tensors, *ctx.settings)
    return dqkv, None, None, None, None


registration.register(
    "packed_causal_attention(Tensor qkv, Tensor? seed, float softmax_scale, float dropout_p, str? backend) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
registration.register(
    "packed_causal_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? seed, "
    "float softmax_scale, float dropout_p, str? backend) -> Tensor",
    _backward,
    _backward_fake,
)
