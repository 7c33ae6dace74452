"""Registration with torch.library, so that torch.compile sees each op as one node without a graph break."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt import memory
from fastgpt.ops import buffers

_library = torch.library.Library("fastgpt", "DEF")


def register(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define `fastgpt::<schema>`, with its implementation, its shapes (`fake`) and its gradient.

    `define` and `impl` are used rather than `custom_op`: a call then costs about 2 µs instead of 6.
    """
    name = f"fastgpt::{schema.split('(')[0]}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA", "MPS"):
        _library.impl(name, forward, key)
    torch.library.register_fake(name, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)


def needs_grad(*tensors: Tensor) -> bool:
    """True when autograd records what is done with these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def compact(*activations: Tensor | None) -> tuple[Tensor | None, ...]:
    """Activations as a Function is to save them: as they are, or in half the memory (`memory.bfloat16_activations`)."""
    if not memory.keeps_bfloat16():
        return activations
    return tuple(
        buffers.cast(t, torch.bfloat16) if t is not None and t.dtype is torch.float32 else t for t in activations
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's decorator of that name for the backward of an autograd Function, without its cost in training.

    Only where a graph of the gradients is made (create_graph=True) is there anything to forbid; elsewhere PyTorch's
    wrapper takes as long as all else that our backwards do in Python.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


def native_backward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `function` by PyTorch's autograd, computed anew: backward of backends without one of their own."""
    with torch.enable_grad():
        leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        grads = torch.autograd.grad(function(*leaves), leaves, dout)
    # A fresh, contiguous tensor each, as the fake promises.
    return tuple(grad.clone(memory_format=torch.contiguous_format) for grad in grads)
