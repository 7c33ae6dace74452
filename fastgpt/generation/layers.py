"""Linear layers and norms for one or a few rows: the fastest call there is for the weights at hand.

A generated token multiplies every weight matrix once by one row, so its time is that of reading the weights. Measured
on 2 cores of an AMD EPYC (AVX2 only, torch 2.13, 2 threads); × is F.linear's time over the call's:

    float32, weights from memory    768 × 3072: 1 row   4 rows    768 × 50257: 1 row   4 rows
    F.linear (MKL)                              515 µs  1,074                  8.5 ms  22.2
    oneDNN                                      × 1.6   × 1.8                  × 2.0   × 2.3
    weight @ xᵀ (MKL)                           × 1.0   × 2.7                  × 1.0   × 3.6

oneDNN's call costs about 25 µs more than F.linear's, so small matrices stay with F.linear. Without bfloat16
instructions PyTorch multiplies bfloat16 row by row: fast for one row, from about 16 rows on slower than converting the
weights. A prompt's rows take the products of training (ops/linear/products.py): 512 rows by 768 × 3072, weights from
memory, took oneDNN 15.8 ms, MKL 15.0 and our own 13.6, the whole prompt of GPT-2 124M 678 ms with oneDNN and 576 with
our own. A norm of one row is all call: F.layer_norm takes 3.5 µs, our op, which also keeps what a gradient needs, 21.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops.linear import products

Function = Callable[[Tensor], Tensor]

# Below 512 × 1024 the call costs more than oneDNN saves.
_ONEDNN_FROM = 2**19
_WIDEN_FROM_ROWS = 16
# Up to here MKL is the fastest when the weights are its left factor.
_FEW_ROWS = 4
# Up to about here the cost of the call decides, beyond it that of the kernel.
_SMALL_NORM = 2**14


@dataclass(frozen=True)
class Linear:
    """x (..., n_in) ↦ x weightᵀ + bias, by the call that `linear` chose.

    Attributes:
        weight, bias: (n_out, n_in), and (n_out,) or None.
    """

    weight: Tensor
    bias: Tensor | None
    call: Function

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)


@dataclass(frozen=True)
class Norm:
    """x (..., n) ↦ its rows normalised, scaled by `weight` and shifted by `bias`, both (n,)."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is self.weight.dtype and x.numel() <= _SMALL_NORM:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """x (..., n_in) ↦ x weightᵀ + bias, without autograd.

    Args:
        weight: (n_out, n_in); read at every call, so that changed weights are seen. Nothing is copied.
        bias: (n_out,) or None.

    Returns:
        The function, for inputs in the dtype and on the device of `weight`.
    """
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return Linear(weight, bias, lambda x: F.linear(x, weight, bias))
    return Linear(weight, bias, _by_rows(weight, bias, _few_rows(weight, bias)))


def _few_rows(weight: Tensor, bias: Tensor | None) -> Function:
    if weight.numel() >= _ONEDNN_FROM and _has_onednn():
        if weight.dtype == torch.float32:
            return _by_onednn(weight, bias)
        if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return _by_widening(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def _by_rows(weight: Tensor, bias: Tensor | None, few: Function) -> Function:
    """`few`, or for a prompt our own product where that is the fastest of this machine."""
    n_out, n_in = weight.shape

    def apply(x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if rows < products.LEAST_ROWS or products.engine(rows, n_out, n_in, x.dtype, weight.dtype) != "own":
            return few(x)
        out = x.new_empty(*x.shape[:-1], n_out)
        products.matmul_into(out.view(rows, n_out), x.reshape(rows, n_in), weight.t(), bias=bias, by="own")
        return out

    return apply


def _has_onednn() -> bool:
    usable = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return usable and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _by_onednn(weight: Tensor, bias: Tensor | None) -> Function:
    call = torch.ops.mkldnn._linear_pointwise.default

    def apply(x: Tensor) -> Tensor:
        if x.ndim == 2 and 2 <= x.shape[0] <= _FEW_ROWS:
            out = torch.mm(weight, x.t()).t().contiguous()
            return out if bias is None else out.add_(bias)
        return call(x, weight, bias, "none", [], "")

    return apply


def _by_widening(weight: Tensor, bias: Tensor | None) -> Function:
    def apply(x: Tensor) -> Tensor:
        if x.shape[:-1].numel() < _WIDEN_FROM_ROWS:
            return F.linear(x, weight, bias)
        wide_bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    return apply
