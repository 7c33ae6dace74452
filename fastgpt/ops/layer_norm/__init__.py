"""Layer normalisation over the last axis: the door of the room.

    y = (x - mean) · rstd · weight + bias        rstd = 1 / sqrt(var + eps), var biased

Saved for backward: x, weight and the float32 statistics (mean, rstd), one pair a row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import buffers, dispatch, registration
from fastgpt.ops.layer_norm.layout import check_weights, is_tiny

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    n: int


OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = tuple(Case("cpu", dtype, dtype, 768) for dtype in (torch.float32, torch.bfloat16))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    """Normalise the last axis of `x`, then scale and shift it.

    Args:
        x: (..., n), floating point. Rows need a contiguous last axis; another layout is copied first.
        weight, bias: (n,), of one dtype: that of `x`, or float32.
        eps: added to the variance inside the square root.
        backend: nearest choice of a backend; see `fastgpt.ops.use_backend`.

    Returns:
        (..., n) in the dtype of `x`; mean, variance and products are computed in float32 (float64 for float64). On the
        CPU fewer than 2^17 float32 numbers are left to PyTorch's own norm, so the last bits depend on the size.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendError: the backend that was asked for cannot run this input.

    Paper: Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    check_weights("layer_norm", x, weight, bias)
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.fastgpt.layer_norm(x, weight, bias, eps, backend)[0]
        return out
    chosen = OP.for_tiny(backend) if is_tiny(x, weight) else None
    chosen = chosen or OP.choose(_case(x, weight), backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(x, weight, bias, eps)
    if registration.needs_grad(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, eps, chosen)
    return chosen.forward(x, weight, bias, eps)[0]


def _case(x: Tensor, weight: Tensor) -> Case:
    return Case(dispatch.device_type(x), x.dtype, weight.dtype, x.shape[-1])


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, chosen: ModuleType) -> Tensor:
        out, mean, rstd = chosen.forward(x, weight, bias, eps)
        ctx.save_for_backward(*registration.compact(x), weight, mean, rstd)
        ctx.chosen = chosen
        return out

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        dx, dweight, dbias = ctx.chosen.backward(dout, buffers.cast(x, dout.dtype), *saved)
        return dx, dweight, dbias, None, None


# The registered op: what torch.compile sees.


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    chosen = OP.choose(_case(x, weight), backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        unused = x.new_zeros(x.shape[:-1], dtype=torch.float32)
        return chosen.apply(x, weight, bias, eps).contiguous(), unused, unused.clone()
    return chosen.forward(x, weight, bias, eps)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), stats, torch.empty_like(stats)


def _backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = OP.choose(_case(x, weight), backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        inputs = (x, weight, torch.zeros_like(weight))
        dx, dweight, dbias = registration.native_backward(lambda *a: chosen.apply(*a, eps), inputs, dout)
        return dx, dweight, dbias
    return chosen.backward(dout, x, weight, mean, rstd)


def _backward_fake(dout: Tensor, x: Tensor, weight: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, output[1], output[2])


def _autograd(ctx: Any, dout: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.fastgpt.layer_norm_backward(dout, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None


registration.register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, str? backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
registration.register(
    "layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd, float eps, "
    "str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
