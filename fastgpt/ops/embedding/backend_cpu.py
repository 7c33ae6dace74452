"""Token and position embedding on the CPU: kernels/cpu/embedding.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastgpt.ops import buffers, cpu_support, philox
from fastgpt.ops.extension import DTYPE_CODES, load, num_threads

if TYPE_CHECKING:
    from fastgpt.ops.embedding import Case

# The kernel raises IndexError for an id outside the vocabulary.
CHECKS_RANGE = True


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU."""
    return cpu_support.why_not(case.device, case.dtype)


def forward(ids: Tensor, weight: Tensor, position_weight: Tensor, dropout_p: float, seed: int) -> Tensor:
    """Returns (batch, n_tokens, n), contiguous."""
    ids, weight, position_weight = ids.long().contiguous(), weight.contiguous(), position_weight.contiguous()
    out = buffers.empty((*ids.shape, weight.shape[1]), weight.dtype)
    load("cpu").embedding_forward(
        out.data_ptr(), ids.data_ptr(), weight.data_ptr(), position_weight.data_ptr(),
        *out.shape, weight.shape[0], position_weight.shape[0], seed,
        philox.threshold(dropout_p), DTYPE_CODES[weight.dtype], num_threads(),
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, ids: Tensor, vocab_size: int, context_length: int, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns dweight (vocab_size, n) and dposition (context_length, n)."""
    dout, ids = dout.contiguous(), ids.long().contiguous()
    dweight, dposition = (buffers.empty((length, dout.shape[2]), dout.dtype) for length in (vocab_size, context_length))
    load("cpu").embedding_backward(
        dweight.data_ptr(), dposition.data_ptr(), dout.data_ptr(), ids.data_ptr(),
        *dout.shape, vocab_size, context_length, seed,
        philox.threshold(dropout_p), DTYPE_CODES[dout.dtype], num_threads(),
    )  # fmt: skip
    return dweight, dposition
