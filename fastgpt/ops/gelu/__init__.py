"""GELU in its tanh form, of x + bias: the door of the room.

    y = v/2 · (1 + tanh(√(2/π) · (v + 0.044715 v³)))        v = x + bias

Saved for backward: x and bias; the gradient of the bias is summed in the same pass, in float32. A backend that is not
differentiated by PyTorch offers

    forward(x, bias) -> out
    backward(dout, x, bias) -> (dx, dbias)        dbias is None where the bias is
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import buffers, dispatch, registration

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")


class Case(NamedTuple):
    """What the choice of a backend depends on; bias_dtype is None without a bias."""

    device: str
    dtype: torch.dtype
    bias_dtype: torch.dtype | None = None


OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = tuple(Case("cpu", dtype, bias) for dtype in (torch.float32, torch.bfloat16) for bias in (None, dtype))


def gelu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The Gaussian error linear unit, tanh form, of x + bias.

    Args:
        x: (..., n) or (), floating point. A layout that is not contiguous is copied first.
        bias: (n,) in the dtype of `x` or float32: added to every row, as the bias of the linear layer before.
        backend: nearest choice of a backend; see `fastgpt.ops.use_backend`.

    Returns:
        Like `x`, contiguous; computed in float32 (float64 for float64).

    Raises:
        ValueError: `x` is not floating point, or the bias does not fit it.
        BackendError: the backend that was asked for cannot run this input.

    Paper: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.
    """
    check(x, bias)
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.fastgpt.gelu(x, bias, backend)
        return out
    chosen = choose(x, bias, backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(x, bias)
    if registration.needs_grad(x) or bias is not None and registration.needs_grad(bias):
        return _Gelu.apply(x, bias, chosen)
    return chosen.forward(x, bias)


def choose(x: Tensor, bias: Tensor | None, backend: str | None = None) -> ModuleType:
    """The backend's module for these tensors."""
    return OP.choose(_case(x, bias), backend)


def _case(x: Tensor, bias: Tensor | None) -> Case:
    return Case(dispatch.device_type(x), x.dtype, None if bias is None else bias.dtype)


def check(x: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless x is floating point and the bias fits its last axis."""
    if not x.is_floating_point():
        raise ValueError(f"gelu: x must be floating point, got {x.dtype}; cast it with x.float().")
    if bias is None:
        return
    if x.ndim == 0 or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"gelu: bias {tuple(bias.shape)} must have the shape of the last axis of x, {tuple(x.shape[-1:])}; x is "
            f"{tuple(x.shape)}."
        )
    if bias.dtype not in (x.dtype, torch.float32) or bias.device != x.device:
        raise ValueError(
            f"gelu: bias is {bias.dtype} on {bias.device}, x {x.dtype} on {x.device}; bias must be {x.dtype} or "
            f"torch.float32, on the device of x."
        )


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, chosen: ModuleType) -> Tensor:
        ctx.save_for_backward(*registration.compact(x), bias)
        ctx.chosen = chosen
        return chosen.forward(x, bias)

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        return *ctx.chosen.backward(dout, buffers.cast(x, dout.dtype), bias), None


# The registered op: what torch.compile sees.


def _forward(x: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    chosen = choose(x, bias, backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(x, bias).contiguous()
    return chosen.forward(x, bias)


def _backward(dout: Tensor, x: Tensor, bias: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    chosen = choose(x, bias, backend)
    if not getattr(chosen, "NATIVE_AUTOGRAD", False):
        dx, dbias = chosen.backward(dout, x, bias)
    else:
        inputs = (x,) if bias is None else (x, bias)
        dx, dbias = (*registration.native_backward(chosen.apply, inputs, dout), None)[:2]
    # An op gives tensors only: an empty one stands for no gradient.
    return dx, x.new_empty(0) if dbias is None else dbias


def _backward_fake(dout: Tensor, x: Tensor, bias: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.fastgpt.gelu_backward(dout, x, bias, ctx.backend)
    return dx, None if bias is None else dbias, None


registration.register(
    "gelu(Tensor x, Tensor? bias, str? backend) -> Tensor",
    _forward,
    lambda x, bias, backend: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_autograd,
)
registration.register(
    "gelu_backward(Tensor dout, Tensor x, Tensor? bias, str? backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
