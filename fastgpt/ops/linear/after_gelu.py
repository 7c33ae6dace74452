"""GELU and the linear layer behind it, without keeping what stands between them.

    out = gelu(x + gelu_bias) Wᵀ + bias

The product needs the output of GELU for dW, GELU needs its input for dx: both would be kept, four times the width of
the model each. Here the input alone is, and backward computes the output again: one pass over memory against a quarter
of all that a block keeps. The kernels are those of the two rooms, and so is every bit of the results and gradients.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import buffers, registration
from fastgpt.ops.gelu import check, choose, gelu
from fastgpt.ops.linear import choose as choose_linear
from fastgpt.ops.linear import linear, prepare
from fastgpt.ops.linear.products import matmul_into


def gelu_linear(
    x: Tensor, gelu_bias: Tensor | None, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """`linear(gelu(x, gelu_bias), weight, bias)`, keeping x alone for backward.

    Args:
        x: (..., n_in), floating point: what the layer before gave, without its bias.
        gelu_bias: (n_in,), the bias of the layer before, or None; see `gelu`.
        weight, bias: (n_out, n_in) and (n_out,) or None; see `linear`.
        backend: nearest choice of a backend; see `fastgpt.ops.use_backend`.

    Returns:
        (..., n_out); see `linear`.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendError: the backend that was asked for cannot run this input.

    Paper: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    # A frozen weight keeps no input, and where PyTorch differentiates, it keeps what it wants.
    if registration.needs_grad(weight) and not torch.compiler.is_compiling() and not _is_native(x, weight, backend):
        check(x, gelu_bias)
        cast_x, (cast_weight,), (cast_bias,) = prepare("gelu_linear", x, (weight,), (bias,))
        backends = choose(x, gelu_bias, backend), choose_linear(cast_x, (cast_weight,), backend)
        # Where autocast would round the output of gelu, the two rooms do.
        if cast_x.dtype == x.dtype and not any(getattr(module, "NATIVE_AUTOGRAD", False) for module in backends):
            out: Tensor = _GeluLinear.apply(x, gelu_bias, cast_weight, cast_bias, *backends)
            return out
    return linear(gelu(x, gelu_bias, backend=backend), weight, bias, backend=backend)


def _is_native(x: Tensor, weight: Tensor, backend: str | None) -> bool:
    return getattr(choose_linear(x, (weight,), backend), "NATIVE_AUTOGRAD", False)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gelu_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        activation: ModuleType,
        product: ModuleType,
    ) -> Tensor:
        ctx.save_for_backward(*registration.compact(x), gelu_bias, weight)
        ctx.backends = activation, product
        out: Tensor = product.forward(activation.forward(x, gelu_bias), (weight,), (bias,))
        return out

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gelu_bias, weight = ctx.saved_tensors
        x = buffers.cast(x, dout.dtype)
        activation, product = ctx.backends
        needs_x, needs_gelu_bias, *needs = ctx.needs_input_grad[:4]
        # One buffer for the output of gelu, for its gradient and for dx.
        hidden = activation.forward(x, gelu_bias)
        _, dweight, dbias = product.backward(dout, hidden, (weight,), x.shape, weight.shape[:1], (False, *needs))
        if not (needs_x or needs_gelu_bias):
            return None, None, dweight, dbias, None, None
        matmul_into(hidden.view(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1]), weight)
        return *activation.backward(hidden, x, gelu_bias, in_place=True), dweight, dbias, None, None
