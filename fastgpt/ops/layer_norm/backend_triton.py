"""Layer normalisation in Triton: kernels/triton/layer_norm.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import triton_support
from fastgpt.ops.layer_norm.layout import as_rows
from fastgpt.ops.triton_support import next_power_of_2

if TYPE_CHECKING:
    from fastgpt.ops.layer_norm import Case

AUTOMATIC = triton_support.UNPROVEN

# A row must fit into the registers of one program.
MAX_N = 16384
SUM_PARTS, SUM_BLOCK = 32, 32


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU, weights of that dtype or float32, rows of up to 16,384."""
    if case.n > MAX_N:
        return f"the kernel holds a row of up to {MAX_N} in registers, not {case.n}"
    return triton_support.why_not(case.device, case.dtype, case.weight_dtype)


def block(n: int) -> int:
    """BLOCK for rows of n."""
    return max(16, next_power_of_2(n))


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (like x, contiguous), mean and rstd (x.shape[:-1], float32)."""
    from fastgpt.kernels.triton.layer_norm import layer_norm_forward_kernel as kernel

    x_rows = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if out.numel() == 0:
        return out, mean.zero_(), rstd.zero_()
    count, n = x_rows.shape
    tile = triton_support.row_tile("layer_norm_forward", x, n)
    with triton_support.device_of(x):
        kernel[(-(-count // tile.rows),)](
            out, mean, rstd, x_rows, weight.contiguous(), bias.contiguous(), count, x_rows.stride(0), eps,
            N=n, ROWS=tile.rows, BLOCK=block(n), num_warps=tile.num_warps, **triton_support.OPTIONS,
        )  # fmt: skip
    return out, mean, rstd


def backward(dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx (like x, contiguous), dweight and dbias (n,) in the dtype of weight."""
    from fastgpt.kernels.triton import layer_norm as kernels

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = (torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    x_rows, dout_rows = as_rows(x), as_rows(dout)
    count, n = x_rows.shape
    tile = triton_support.row_tile("layer_norm_backward", x, n)
    parts = min(-(-count // tile.rows), max(1, tile.programs) * triton_support.multiprocessors(x))
    partial = torch.empty(parts, 2, n, dtype=torch.float32, device=x.device)
    with triton_support.device_of(x):
        kernels.layer_norm_backward_kernel[(parts,)](
            dx, partial, dout_rows, x_rows, weight.contiguous(), mean, rstd,
            count, dout_rows.stride(0), x_rows.stride(0),
            N=n, ROWS=tile.rows, BLOCK=block(n), num_warps=tile.num_warps, **triton_support.OPTIONS,
        )  # fmt: skip
        kernels.layer_norm_backward_sum_kernel[(-(-n // SUM_BLOCK),)](
            dweight, dbias, partial, parts,
            N=n, PARTS=SUM_PARTS, BLOCK=SUM_BLOCK, num_warps=4, **triton_support.OPTIONS,
        )  # fmt: skip
    return dx, dweight, dbias
