"""What the CUDA backends of ops on rows share: the layout that 16-byte loads need, and the calls of the norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import cuda_support, philox
from fastgpt.ops.cuda_support import DTYPE_CODES
from fastgpt.ops.layer_norm.layout import as_rows

# The kernels hold a row of up to so many elements in registers.
MAX_N = 2048
# Elements that a thread loads together; rows are whole groups.
GROUP = 8
# Blocks a multiprocessor that leave sums of their rows.
_PARTS = 4


class Normed(NamedTuple):
    """What the forward kernel gives; total is x itself where there is no residual."""

    out: Tensor
    total: Tensor
    mean: Tensor
    rstd: Tensor


def is_aligned(*tensors: Tensor) -> bool:
    """Whether these can be read 16 bytes at a time: (rows, n) or (n,), n whole groups."""
    return all(x.data_ptr() % 16 == 0 and x.shape[-1] % GROUP == 0 and _whole(x) for x in tensors)


def _whole(x: Tensor) -> bool:
    return x.stride(-1) == 1 and (x.ndim == 1 or x.shape[0] <= 1 or x.stride(0) % GROUP == 0)


def aligned(x: Tensor) -> Tensor:
    """x, (rows, n) or (n,), or a copy that can be read 16 bytes at a time."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def parts_for(rows: int, device: torch.device) -> int:
    """How many blocks share the rows."""
    chips = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(rows, _PARTS * chips))


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: int
) -> Normed:
    """The norm of residual + dropout(x), or of x; see kernels/cuda/row_norm.cuh."""
    with cuda_support.device_of(x):
        rows, weight, bias = aligned(as_rows(x)), aligned(weight), aligned(bias)
        rest = None if residual is None else aligned(as_rows(residual))
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = None if rest is None else torch.empty_like(out)
        mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
        cuda_support.load().row_norm_forward(
            out.data_ptr(), _address(total), mean.data_ptr(), rstd.data_ptr(), rows.data_ptr(), _address(rest),
            weight.data_ptr(), bias.data_ptr(), _stride(rows), 0 if rest is None else _stride(rest),
            _sizes(rows, weight, 1), eps, seed, philox.threshold(dropout_p), cuda_support.stream(),
        )  # fmt: skip
        return Normed(out, x if total is None else total, mean, rstd)


def norm_backward(
    dtotal: Tensor | None, dout: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dx and dresidual (one tensor without dropout), dweight and dbias (n,)."""
    with cuda_support.device_of(total):
        rows, drows, weight = aligned(as_rows(total)), aligned(as_rows(dout)), aligned(weight)
        through = None if dtotal is None else aligned(as_rows(dtotal))
        dresidual = torch.empty(total.shape, dtype=total.dtype, device=total.device)
        dx = torch.empty_like(dresidual) if dropout_p else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        parts = parts_for(len(rows), total.device)
        partial = torch.empty(parts, 2, total.shape[-1], dtype=torch.float32, device=total.device)
        cuda_support.load().row_norm_backward(
            _address(dx), dresidual.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), partial.data_ptr(),
            _address(through), drows.data_ptr(), rows.data_ptr(), weight.data_ptr(),
            mean.contiguous().data_ptr(), rstd.contiguous().data_ptr(),
            0 if through is None else _stride(through), _stride(drows), _stride(rows),
            _sizes(rows, weight, parts), seed, philox.threshold(dropout_p), cuda_support.stream(),
        )  # fmt: skip
        return dresidual if dx is None else dx, dresidual, dweight, dbias


def gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), contiguous; see kernels/cuda/bias_gelu.cuh."""
    with cuda_support.device_of(x):
        rows, bias = aligned(as_rows(x).contiguous()), aligned(bias)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sizes = _sizes(rows, bias, parts_for(len(rows), x.device))
        stream = cuda_support.stream()
        cuda_support.load().bias_gelu_forward(out.data_ptr(), rows.data_ptr(), bias.data_ptr(), sizes, stream)
        return out


def gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dx, contiguous, and dbias (n,)."""
    with cuda_support.device_of(x):
        rows, drows, bias = aligned(as_rows(x).contiguous()), aligned(as_rows(dout).contiguous()), aligned(bias)
        dx, dbias = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(bias)
        parts = parts_for(len(rows), x.device)
        partial = torch.empty(parts, x.shape[-1], dtype=torch.float32, device=x.device)
        cuda_support.load().bias_gelu_backward(
            dx.data_ptr(), dbias.data_ptr(), partial.data_ptr(), drows.data_ptr(), rows.data_ptr(), bias.data_ptr(),
            _sizes(rows, bias, parts), cuda_support.stream(),
        )  # fmt: skip
        return dx, dbias


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _stride(rows: Tensor) -> int:
    # One row is never stepped along, and its stride may be anything.
    return rows.shape[1] if len(rows) <= 1 else rows.stride(0)


def _sizes(rows: Tensor, weight: Tensor, parts: int) -> tuple[int, int, int, int, int]:
    return *rows.shape, parts, DTYPE_CODES[rows.dtype], DTYPE_CODES[weight.dtype]
