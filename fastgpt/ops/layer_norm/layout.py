"""What every op on rows asks of its tensors, and the layout that its kernels read: a contiguous last axis."""

from __future__ import annotations

import torch
from torch import Tensor

# Fewer elements than these take PyTorch's own norm less time, though its kernel is slower. Forward and backward of the
# norm, and of norm with addition, on a Zen 3 core: PyTorch is 1.9 and 1.7 times as fast at 256 x 64, 1.5 and 1.25 times
# at 512 x 128, 1.2 and 1.07 times at 1024 x 128, 1.0 and 0.83 times at 1024 x 256.
_TINY = 2**17


def is_tiny(x: Tensor, weight: Tensor) -> bool:
    """True where the norm of x is left to PyTorch, see `dispatch.Op.for_tiny`."""
    return x.numel() < _TINY and x.is_cpu and x.dtype is torch.float32 and weight.dtype is torch.float32


def as_rows(x: Tensor) -> Tensor:
    """x as (rows, n) with a contiguous last axis; a view where the layout allows, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def check_weights(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError unless weight and bias fit the last axis of x, in shape, dtype and device."""
    if x.ndim == 0 or weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        n = tuple(x.shape[-1:])
        raise ValueError(
            f"{op}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must both have the shape of "
            f"the last axis of x, {n}; x is {tuple(x.shape)}."
        )
    if not x.is_floating_point() or weight.dtype != bias.dtype:
        raise ValueError(
            f"{op}: x must be floating point, weight and bias of one dtype; got {x.dtype}, "
            f"{weight.dtype} and {bias.dtype}."
        )
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: weight is {weight.dtype}, x is {x.dtype}; weight must be {x.dtype} or torch.float32.")
    if not x.device == weight.device == bias.device:
        raise ValueError(
            f"{op}: x is on {x.device}, weight on {weight.device}, bias on {bias.device}; move all to one device."
        )
