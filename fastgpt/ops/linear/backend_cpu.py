"""Linear layers on the CPU: kernels/cpu/gemm.h, or PyTorch's product where that is faster (see products.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import buffers, cpu_support
from fastgpt.ops.linear.products import matmul_into

if TYPE_CHECKING:
    from fastgpt.ops.linear import Case


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU."""
    return cpu_support.why_not(case.device, case.dtype)


def forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Returns the layers' results side by side, contiguous."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = buffers.empty((rows.shape[0], sum(weight.shape[0] for weight in weights)), x.dtype)
    begin = 0
    for weight, bias in zip(weights, biases, strict=True):
        end = begin + weight.shape[0]
        matmul_into(out[:, begin:end], rows, weight.t(), bias=bias)
        begin = end
    return out.view(*x.shape[:-1], out.shape[1])


def backward(
    dout: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    shape: torch.Size,
    sizes: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, of each weight and of each bias: None where `needs`, in the same order, has False.

    Args:
        dout: (..., sum of sizes).
        x: as in the forward; None when no weight needs a gradient.
        weights: as in the forward; unused when x needs no gradient.
        shape: of x.
        sizes: n_out of each weight.
        needs: for x, each weight, each bias.
    """
    count, rows = len(sizes), shape[:-1].numel()
    grads = dout.reshape(rows, sum(sizes)).split(list(sizes), 1)
    dx = _gradient_of_x(grads, weights, rows, shape[-1]).view(shape) if needs[0] else None
    flat = None if x is None else x.reshape(rows, shape[-1])
    dweights, dbiases = [], []
    for grad, needs_weight, needs_bias in zip(grads, needs[1 : 1 + count], needs[1 + count :], strict=True):
        dweight, dbias = _gradients_of_parameters(grad, flat, needs_weight, needs_bias)
        dweights.append(dweight)
        dbiases.append(dbias)
    return dx, *dweights, *dbiases


def _gradient_of_x(grads: Sequence[Tensor], weights: Sequence[Tensor | None], rows: int, n_in: int) -> Tensor:
    dx = buffers.empty((rows, n_in), grads[0].dtype)
    for index, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        assert weight is not None, "saved by the door when x needs a gradient"
        matmul_into(dx, grad, weight, accumulate=index > 0)
    return dx


def _gradients_of_parameters(
    grad: Tensor, x: Tensor | None, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not needs_weight:
        return None, grad.sum(0) if needs_bias else None
    assert x is not None, "saved by the door when a weight needs a gradient"
    sums = torch.empty(grad.shape[1], dtype=torch.float32, device="cpu") if needs_bias else None
    dweight = buffers.empty((grad.shape[1], x.shape[1]), grad.dtype)
    matmul_into(dweight, grad.t(), x, row_sums=sums)
    return dweight, None if sums is None else sums.to(grad.dtype)
