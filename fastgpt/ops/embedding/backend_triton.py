"""Token and position embedding in Triton: kernels/triton/embedding.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.ops import philox, triton_support
from fastgpt.ops.layer_norm.backend_triton import MAX_N, block

if TYPE_CHECKING:
    from fastgpt.ops.embedding import Case

AUTOMATIC = triton_support.UNPROVEN


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU, rows of up to 16,384."""
    if case.n > MAX_N:
        return f"the kernel holds a row of up to {MAX_N} in registers, not {case.n}"
    return triton_support.why_not(case.device, case.dtype)


def forward(ids: Tensor, weight: Tensor, position_weight: Tensor, dropout_p: float, seed: int) -> Tensor:
    """Returns (batch, n_tokens, n), contiguous. An id outside the vocabulary gives a row of nan."""
    from fastgpt.kernels.triton.embedding import embedding_forward_kernel as kernel

    ids = ids.contiguous()
    n = weight.shape[1]
    out = torch.empty(*ids.shape, n, dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    tile = triton_support.row_tile("embedding_forward", out, n, dropout_p > 0.0)
    with triton_support.device_of(out):
        kernel[(-(-ids.numel() // tile.rows),)](
            out, ids, weight.contiguous(), position_weight.contiguous(), ids.numel(), ids.shape[1], weight.shape[0],
            seed, philox.threshold(dropout_p), philox.scale(dropout_p),
            N=n, ROWS=tile.rows, BLOCK=block(n), DROPOUT=dropout_p > 0.0,
            num_warps=tile.num_warps, **triton_support.OPTIONS,
        )  # fmt: skip
    return out


def backward(
    dout: Tensor, ids: Tensor, vocab_size: int, context_length: int, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns dweight (vocab_size, n) and dposition (context_length, n), the same bits in every run."""
    from fastgpt.kernels.triton import embedding as kernels

    dout = dout.contiguous()
    batch, n_tokens, n = dout.shape
    dweight, dposition = (
        torch.empty(length, n, dtype=dout.dtype, device=dout.device) for length in (vocab_size, context_length)
    )
    if n == 0:
        return dweight, dposition
    # Ids outside the vocabulary lie in no run, and are left out.
    tokens, order = torch.sort(ids.reshape(-1).long(), stable=True)
    begins = torch.searchsorted(tokens, torch.arange(vocab_size + 1, device=dout.device))
    tile = triton_support.row_tile("embedding_backward", dout, n, dropout_p > 0.0)
    width = min(tile.columns, block(n))
    settings = seed, philox.threshold(dropout_p), philox.scale(dropout_p)
    constants = {"N": n, "ROWS": tile.rows, "BLOCK": width, "DROPOUT": dropout_p > 0.0, "num_warps": tile.num_warps}
    columns = -(-n // width)
    with triton_support.device_of(dout):
        if vocab_size:
            kernels.embedding_backward_weight_kernel[(vocab_size, columns)](
                dweight, dout, order, begins, *settings, **constants, **triton_support.OPTIONS
            )
        if context_length:
            kernels.embedding_backward_position_kernel[(context_length, columns)](
                dposition, dout, batch, n_tokens, *settings, **constants, **triton_support.OPTIONS
            )
    return dweight, dposition
