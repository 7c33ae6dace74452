"""Dropout, residual addition and layer normalisation in one pass: the door of the room.

    total  = residual + dropout(x)
    normed = (total - mean) · rstd · weight + bias        rstd = 1 / sqrt(var + eps), var biased

Saved for backward: total, weight, the float32 statistics of each row (mean, rstd) and the seed; the mask is drawn again
(fastgpt.ops.philox). A backend that is not differentiated by PyTorch offers

    forward(x, residual, weight, bias, eps, dropout_p, seed) -> (total, normed, mean, rstd)
    backward(dtotal, dnormed, total, weight, mean, rstd, dropout_p, seed) -> (dx, dresidual, dweight, dbias)

where dtotal is None when nothing used `total`, and without dropout dx and dresidual are one tensor.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import buffers, dispatch, philox, registration
from fastgpt.ops.layer_norm.layout import check_weights, is_tiny

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    n: int
    dropout: bool


OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = tuple(
    Case("cpu", dtype, dtype, 768, dropout) for dtype in (torch.float32, torch.bfloat16) for dropout in (False, True)
)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add dropout(x) to the residual stream, and normalise the sum for the layer that comes next.

    Args:
        x: (..., n), floating point: what a layer gave. A last axis that is not contiguous is copied first.
        residual: like `x`: the stream that it is added to.
        weight, bias: (n,), of one dtype: that of `x`, or float32.
        dropout_p: probability with which an element of `x` is set to 0 (the others are scaled up), 0 <= p <= 1. The
            seed comes from torch's default CPU generator.
        eps: added to the variance inside the square root.
        backend: nearest choice of a backend; "reference" draws dropout from torch's generator as the book does.

    Returns:
        total, the stream after this layer, and normed, its layer norm: both (..., n) in the dtype of `x`. Sums,
        statistics and products are float32 (float64 for float64). Without dropout fewer than 2^17 float32 numbers on
        the CPU are left to PyTorch's own ops, so the last bits depend on the size.

    Raises:
        ValueError: a shape, dtype, device or probability does not fit.
        BackendError: the backend that was asked for cannot run this input.

    Papers: Srivastava et al., "Dropout", 2014; Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    _check(x, residual, weight, bias, dropout_p)
    if torch.compiler.is_compiling():
        drawn = torch.randint(2**63 - 1, (), device="cpu") if dropout_p else None
        call = torch.ops.fastgpt.dropout_add_layer_norm
        total, normed, *_ = call(x, residual, weight, bias, drawn, dropout_p, eps, backend)
        return total, normed
    chosen = OP.for_tiny(backend) if not dropout_p and is_tiny(x, weight) else None
    chosen = chosen or OP.choose(_case(x, weight, dropout_p), backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(x, residual, weight, bias, eps, dropout_p)
    seed = philox.draw_seed() if dropout_p else 0
    if registration.needs_grad(x, residual, weight, bias):
        return _DropoutAddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p, seed, chosen)
    total, normed, *_ = chosen.forward(x, residual, weight, bias, eps, dropout_p, seed)
    return total, normed


def _case(x: Tensor, weight: Tensor, dropout_p: float) -> Case:
    return Case(dispatch.device_type(x), x.dtype, weight.dtype, x.shape[-1], dropout_p > 0.0)


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float) -> None:
    if x.shape != residual.shape or x.dtype != residual.dtype or x.device != residual.device:
        raise ValueError(
            f"dropout_add_layer_norm: x and residual must have one shape, dtype and device; got x {tuple(x.shape)} "
            f"{x.dtype} on {x.device}, residual {tuple(residual.shape)} {residual.dtype} on {residual.device}."
        )
    check_weights("dropout_add_layer_norm", x, weight, bias)
    philox.check_probability("dropout_add_layer_norm", dropout_p)


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropout_p: float,
        seed: int,
        chosen: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        total, normed, mean, rstd = chosen.forward(x, residual, weight, bias, eps, dropout_p, seed)
        ctx.save_for_backward(*registration.compact(total), weight, mean, rstd)
        ctx.settings = (dropout_p, seed)
        ctx.chosen = chosen
        # The last norm of a model drops its total: a tensor of zeros would be written and read for nothing.
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, *saved = ctx.saved_tensors
        if dnormed is None:
            assert dtotal is not None, "one of them has a gradient, or autograd would not come here"
            dnormed = torch.zeros_like(dtotal)
        total = buffers.cast(total, dnormed.dtype)
        grads = ctx.chosen.backward(dtotal, dnormed, total, *saved, *ctx.settings)
        return *grads, None, None, None, None


# The registered op: what torch.compile sees. The seed is a tensor there, so that drawing it does not break the graph.


def _forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = OP.choose(_case(x, weight, dropout_p), backend)
    number = 0 if seed is None else int(seed)
    if not getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.forward(x, residual, weight, bias, eps, dropout_p, number)
    total, normed = chosen.apply(x, residual, weight, bias, eps, dropout_p, seed=number)
    # Backward reads the statistics of a kernel alone.
    unused = x.new_zeros(x.shape[:-1], dtype=torch.float32)
    return total.contiguous(), normed.contiguous(), unused, unused.clone()


def _forward_fake(x: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), stats, torch.empty_like(stats)


def _backward(
    dtotal: Tensor,
    dnormed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = OP.choose(_case(total, weight, dropout_p), backend)
    number = 0 if seed is None else int(seed)
    if not getattr(chosen, "NATIVE_AUTOGRAD", False):
        grads = chosen.backward(dtotal, dnormed, total, weight, mean, rstd, dropout_p, number)
        dx, dresidual, dweight, dbias = grads
    else:
        zeros = torch.zeros_like(total)
        inputs = (zeros, total, weight, torch.zeros_like(weight))
        # With x = 0 and no dropout the sum is `total` itself.
        _, through, dweight, dbias = registration.native_backward(
            lambda *leaves: chosen.apply(*leaves, eps, 0.0)[1], inputs, dnormed
        )
        dresidual = through + dtotal
        dx = philox.drop_rows(dresidual, dropout_p, number) if dropout_p else dresidual
    # No two results of an op may be one tensor: without dropout the gradient of x is left out.
    return dresidual, dx if dropout_p else dx.new_empty(0), dweight, dbias


def _backward_fake(
    dtotal: Tensor,
    dnormed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    *unused: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = total.new_empty(total.shape) if dropout_p else total.new_empty(0)
    return total.new_empty(total.shape), dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, seed, *ctx.settings = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd, seed)


def _autograd(ctx: Any, dtotal: Tensor, dnormed: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    call = torch.ops.fastgpt.dropout_add_layer_norm_backward
    dresidual, dx, dweight, dbias = call(dtotal, dnormed, *ctx.saved_tensors, *ctx.settings)
    dropout_p = ctx.settings[0]
    return dx if dropout_p else dresidual, dresidual, dweight, dbias, None, None, None, None


registration.register(
    "dropout_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, float dropout_p, "
    "float eps, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
registration.register(
    "dropout_add_layer_norm_backward(Tensor dtotal, Tensor dnormed, Tensor total, Tensor weight, Tensor mean, "
    "Tensor rstd, Tensor? seed, float dropout_p, float eps, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
