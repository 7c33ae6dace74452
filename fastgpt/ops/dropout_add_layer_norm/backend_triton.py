"""Dropout, residual addition and layer normalisation in Triton: kernels/triton/dropout_add_layer_norm.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import philox, triton_support
from fastgpt.ops.layer_norm import backend_triton as layer_norm
from fastgpt.ops.layer_norm.layout import as_rows

if TYPE_CHECKING:
    from fastgpt.ops.dropout_add_layer_norm import Case

AUTOMATIC = triton_support.UNPROVEN


def why_not(case: Case) -> str | None:
    """What layer_norm's kernels take."""
    if case.n > layer_norm.MAX_N:
        return f"the kernel holds a row of up to {layer_norm.MAX_N} in registers, not {case.n}"
    return triton_support.why_not(case.device, case.dtype, case.weight_dtype)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns total and normed (like x, contiguous), mean and rstd (x.shape[:-1], float32)."""
    from fastgpt.kernels.triton.dropout_add_layer_norm import dropout_add_layer_norm_forward_kernel as kernel

    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if total.numel() == 0:
        return total, normed, mean.zero_(), rstd.zero_()
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    count, n = x_rows.shape
    tile = triton_support.row_tile("dropout_add_layer_norm_forward", x, n, dropout_p > 0.0)
    with triton_support.device_of(x):
        kernel[(-(-count // tile.rows),)](
            total, normed, mean, rstd, x_rows, residual_rows, weight.contiguous(), bias.contiguous(),
            count, x_rows.stride(0), residual_rows.stride(0), eps, *philox_settings(dropout_p, seed),
            N=n, ROWS=tile.rows, BLOCK=layer_norm.block(n), DROPOUT=dropout_p > 0.0,
            num_warps=tile.num_warps, **triton_support.OPTIONS,
        )  # fmt: skip
    return total, normed, mean, rstd


def backward(
    dtotal: Tensor | None, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dx and dresidual (like total, contiguous; one tensor without dropout), dweight and dbias (n,)."""
    from fastgpt.kernels.triton.dropout_add_layer_norm import dropout_add_layer_norm_backward_kernel as kernel
    from fastgpt.kernels.triton.layer_norm import layer_norm_backward_sum_kernel as sum_kernel

    dresidual = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    dx = torch.empty_like(dresidual) if dropout_p else dresidual
    dweight, dbias = (torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
    if total.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    total_rows, dnormed_rows = as_rows(total), as_rows(dnormed)
    dtotal_rows = dnormed_rows if dtotal is None else as_rows(dtotal)
    count, n = total_rows.shape
    tile = triton_support.row_tile("dropout_add_layer_norm_backward", total, n, dropout_p > 0.0)
    parts = min(-(-count // tile.rows), max(1, tile.programs) * triton_support.multiprocessors(total))
    partial = torch.empty(parts, 2, n, dtype=torch.float32, device=total.device)
    with triton_support.device_of(total):
        kernel[(parts,)](
            dx, dresidual, partial, dtotal_rows, dnormed_rows, total_rows, weight.contiguous(),
            mean.contiguous(), rstd.contiguous(),
            count, dtotal_rows.stride(0), dnormed_rows.stride(0), total_rows.stride(0),
            *philox_settings(dropout_p, seed),
            N=n, ROWS=tile.rows, BLOCK=layer_norm.block(n), DROPOUT=dropout_p > 0.0, HAS_DTOTAL=dtotal is not None,
            num_warps=tile.num_warps, **triton_support.OPTIONS,
        )  # fmt: skip
        sum_kernel[(-(-n // layer_norm.SUM_BLOCK),)](
            dweight, dbias, partial, parts,
            N=n, PARTS=layer_norm.SUM_PARTS, BLOCK=layer_norm.SUM_BLOCK, num_warps=4, **triton_support.OPTIONS,
        )  # fmt: skip
    return dx, dresidual, dweight, dbias


def philox_settings(dropout_p: float, seed: int) -> tuple[int, int, float]:
    """seed, threshold and scale as the kernels take them."""
    return seed, philox.threshold(dropout_p), philox.scale(dropout_p)
