"""Products of matrices on the CPU, each by the engine that is the fastest on such a processor (see engines.py)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastgpt.ops.extension import DTYPE_CODES, load, num_threads
from fastgpt.ops.linear import engines

# Below these MKL is ahead of the own kernel, which must pack its operands first: on two Zen 3 cores, forward, 158 to
# 141 GFLOP/s at 256 x 128 x 128 and 118 to 111 at 64 x 128 x 512. PyTorch's bfloat16 product is never ahead there:
# on one core 6, 1 and 14 GFLOP/s for forward, dx and dW of 128 x 768 x 768, where the own kernel has 85.
LEAST_ROWS = 16
LEAST_WORK = {torch.float32: 2**24, torch.bfloat16: 2**18}


@functools.cache
def _of_large_products(isa: str, dtype: torch.dtype) -> str:
    return engines.choose(isa, dtype, matmul_into)


def engine(m: int, n: int, k: int, *dtypes: torch.dtype) -> str:
    """Who computes a product (m, k) by (k, n) of these dtypes here: "own", "torch" or "onednn"."""
    if any(dtype not in DTYPE_CODES for dtype in dtypes):
        return "torch"
    if len(set(dtypes)) > 1:
        # No other engine mixes dtypes.
        return "own"
    if min(m, n) < LEAST_ROWS or m * n * k < LEAST_WORK[dtypes[0]]:
        return "torch"
    return _of_large_products(load("cpu").isa(), dtypes[0])


def matmul_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    row_sums: Tensor | None = None,
    accumulate: bool = False,
    by: str | None = None,
) -> Tensor:
    """out = a @ b + bias, or out += a @ b + bias, without autograd. Sums are float32.

    Args:
        out: (m, n), float32 or bfloat16, rows contiguous; it may be a part of the columns of a wider tensor.
        a: (m, k), float32 or bfloat16, any strides: pass `dout.t()` as it is.
        b: (k, n), likewise; of another dtype than `a` if need be.
        bias: (n,), added to every row.
        row_sums: (m,) float32, takes the sums of the rows of `a`.
        accumulate: add to what `out` holds.
        by: "own", "torch" or "onednn" instead of the engine that `engine` names; for benchmarks and tests.

    Returns:
        out.
    """
    (m, k), n = a.shape, b.shape[1]
    name = by or engine(m, n, k, out.dtype, a.dtype, b.dtype)
    if name == "own":
        _own(out, a, b, bias, row_sums, accumulate)
        return out
    if row_sums is not None:
        torch.sum(a, 1, dtype=torch.float32, out=row_sums)
    if name == "onednn":
        return _onednn(out, a, b, bias, accumulate)
    if accumulate:
        torch.addmm(out, a, b, out=out)
        return out if bias is None else out.add_(bias)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _own(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, row_sums: Tensor | None, accumulate: bool) -> None:
    if bias is not None:
        bias = bias.float().contiguous()
    load("cpu").gemm(
        out.data_ptr(), out.stride(), DTYPE_CODES[out.dtype],
        a.data_ptr(), a.stride(), DTYPE_CODES[a.dtype], b.data_ptr(), b.stride(), DTYPE_CODES[b.dtype],
        (a.shape[0], b.shape[1], a.shape[1]),
        0 if bias is None else bias.data_ptr(), 0 if row_sums is None else row_sums.data_ptr(),
        accumulate, num_threads(),
    )  # fmt: skip


def _onednn(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, accumulate: bool) -> Tensor:
    result = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return out.add_(result) if accumulate else out.copy_(result)
