"""GELU in its tanh form: the door of the room.

    y = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))

Saved for backward: x.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import dispatch, registration

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    dtype: torch.dtype


OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = tuple(Case("cpu", dtype) for dtype in (torch.float32, torch.bfloat16))


def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The Gaussian error linear unit, tanh form, element by element.

    Args:
        x: any shape, floating point. A layout that is not contiguous is copied first.
        backend: nearest choice of a backend; see `fastgpt.ops.use_backend`.

    Returns:
        Like `x`, contiguous; computed in float32 (float64 for float64).

    Raises:
        ValueError: `x` is not floating point.
        BackendError: the backend that was asked for cannot run this input.

    Paper: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.
    """
    if not x.is_floating_point():
        raise ValueError(f"gelu: x must be floating point, got {x.dtype}; cast it with x.float().")
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.fastgpt.gelu(x, backend)
        return out
    chosen = OP.choose(Case(x.device.type, x.dtype), backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(x)
    if registration.needs_grad(x):
        return _Gelu.apply(x, chosen)
    return chosen.forward(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: ModuleType) -> Tensor:
        ctx.save_for_backward(x)
        ctx.chosen = chosen
        return chosen.forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.chosen.backward(dout, *ctx.saved_tensors), None


# The registered op: what torch.compile sees.


def _forward(x: Tensor, backend: str | None) -> Tensor:
    chosen = OP.choose(Case(x.device.type, x.dtype), backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(x).contiguous()
    return chosen.forward(x)


def _backward(dout: Tensor, x: Tensor, backend: str | None) -> Tensor:
    chosen = OP.choose(Case(x.device.type, x.dtype), backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return registration.native_backward(chosen.apply, (x,), dout)[0]
    return chosen.backward(dout, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return torch.ops.fastgpt.gelu_backward(dout, *ctx.saved_tensors, ctx.backend), None


registration.register(
    "gelu(Tensor x, str? backend) -> Tensor",
    _forward,
    lambda x, backend: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_autograd,
)
registration.register(
    "gelu_backward(Tensor dout, Tensor x, str? backend) -> Tensor",
    _backward,
    lambda dout, x, backend: x.new_empty(x.shape),
)
