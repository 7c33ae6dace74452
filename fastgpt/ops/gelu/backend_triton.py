"""GELU in Triton: kernels/triton/gelu.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import triton_support

if TYPE_CHECKING:
    from fastgpt.ops.gelu import Case
    from fastgpt.tuning import RowTile

AUTOMATIC = triton_support.UNPROVEN

SUM_PARTS, SUM_BLOCK = 32, 32


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU, a bias of that dtype or float32."""
    return triton_support.why_not(case.device, case.dtype, case.bias_dtype or case.dtype)


def sides(n: int, tile: RowTile) -> tuple[int, int]:
    """ROWS and BLOCK for rows of n: as many elements as the tile, columns that divide n where that leaves enough."""
    block = n & -n
    if block < 64:
        block = max(16, triton_support.next_power_of_2(n))
    block = min(block, tile.columns)
    return max(1, min(32, tile.rows * tile.columns // block)), block


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """Returns gelu(x + bias), contiguous."""
    from fastgpt.kernels.triton import gelu as kernels

    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    with triton_support.device_of(x):
        if bias is None:
            tile = triton_support.row_tile("gelu_forward", x, 0)
            kernels.gelu_forward_kernel[(-(-x.numel() // tile.columns),)](
                out, x, x.numel(), BLOCK=tile.columns, num_warps=tile.num_warps, **triton_support.OPTIONS
            )
            return out
        n = x.shape[-1]
        tile = triton_support.row_tile("gelu_bias_forward", x, n)
        count, (rows, block) = x.numel() // n, sides(n, tile)
        kernels.gelu_bias_forward_kernel[(-(-count // rows), -(-n // block))](
            out, x, bias.contiguous(), count,
            N=n, ROWS=rows, BLOCK=block, num_warps=tile.num_warps, **triton_support.OPTIONS,
        )  # fmt: skip
    return out


def backward(dout: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns dx = dout · gelu'(x + bias), contiguous, and dbias (n,) in the dtype of bias, the same bits every run."""
    from fastgpt.kernels.triton import gelu as kernels

    x, dout = x.contiguous(), dout.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if bias is not None:
        return dx, _backward_bias(dx, dout, x, bias)
    if x.numel():
        tile = triton_support.row_tile("gelu_backward", x, 0)
        with triton_support.device_of(x):
            kernels.gelu_backward_kernel[(-(-x.numel() // tile.columns),)](
                dx, dout, x, x.numel(), BLOCK=tile.columns, num_warps=tile.num_warps, **triton_support.OPTIONS
            )
    return dx, None


def _backward_bias(dx: Tensor, dout: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """Fills dx; returns dbias."""
    from fastgpt.kernels.triton import gelu as kernels

    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if x.numel() == 0:
        return dbias.zero_()
    n = x.shape[-1]
    tile = triton_support.row_tile("gelu_bias_backward", x, n)
    count, (rows, block) = x.numel() // n, sides(n, tile)
    columns = -(-n // block)
    parts = min(-(-count // rows), max(1, tile.programs * triton_support.multiprocessors(x) // columns))
    partial = torch.empty(parts, n, dtype=torch.float32, device=x.device)
    with triton_support.device_of(x):
        kernels.gelu_bias_backward_kernel[(parts, columns)](
            dx, partial, dout, x, bias.contiguous(), count,
            N=n, ROWS=rows, BLOCK=block, num_warps=tile.num_warps, **triton_support.OPTIONS,
        )  # fmt: skip
        kernels.gelu_bias_sum_kernel[(-(-n // SUM_BLOCK),)](
            dbias, partial, parts, N=n, PARTS=SUM_PARTS, BLOCK=SUM_BLOCK, num_warps=4, **triton_support.OPTIONS
        )
    return dbias
