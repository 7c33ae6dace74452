"""Causal attention, forward.

    out = dropout(softmax(q kᵀ · softmax_scale + mask)) v        lse = ln Σ exp(scores), float32

Work: one program takes BLOCK_M queries of one head and walks over the keys they see, BLOCK_N at a time; blocks above
the diagonal are never touched, those wholly below it take a loop without a mask, the few on it a loop with one. The
softmax is the running one, in base 2 with log2(e) folded into the scale; scores, sums and acc are float32. Programs
with the longest walk come first in the grid, so that none of them starts last.

    queries     keys ->
      |         f f m .        f  loop without a mask
      v         f f f m        m  loop with a mask          .  never read

Bytes: q, out and lse once; k and v once a program, which the L2 cache serves to the programs of the same head.
Paper: Dao, "FlashAttention-2", 2023.
"""

# ruff: noqa: E741 - the running softmax is m (maximum), l (sum), acc in the whole field.

import triton
import triton.language as tl

from fastgpt.kernels.triton.attention_tile import ANY_VALUE, LN2, LOG2E, head_base, load_rows, store_rows, visible
from fastgpt.kernels.triton.dropout import keep_tile


@triton.jit(do_not_specialize=ANY_VALUE)
def causal_attention_forward_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr,
    batch_heads, n_heads, q_len, k_len,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    softmax_scale, seed: tl.int64, threshold, drop_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """softmax_scale must not be negative. out is (batch, q_len, n_heads, head_dim), lse (batch, n_heads, q_len)."""
    program = tl.program_id(0)
    batch_head = program % batch_heads
    first_row = (tl.cdiv(q_len, BLOCK_M) - 1 - program // batch_heads) * BLOCK_M
    shift = k_len - q_len
    scale = softmax_scale * LOG2E

    q_base = head_base(q_ptr, batch_head, n_heads, q_batch, q_head, UNIT)
    k_base = head_base(k_ptr, batch_head, n_heads, k_batch, k_head, UNIT)
    v_base = head_base(v_ptr, batch_head, n_heads, v_batch, v_head, UNIT)
    q = load_rows(q_base, batch_head, n_heads, first_row, q_row, q_len, True, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT)

    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    unmasked_end = (first_row + shift + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_row + BLOCK_M + shift, k_len)
    for first_column in tl.range(0, unmasked_end, BLOCK_N):
        acc, l, m = _step(
            acc, l, m, q, k_base, v_base, k_row, v_row, first_row, first_column, shift, k_len, scale,
            seed, batch_head, n_heads, threshold,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, UNIT, False,
        )  # fmt: skip
    for first_column in tl.range(unmasked_end, end, BLOCK_N):
        acc, l, m = _step(
            acc, l, m, q, k_base, v_base, k_row, v_row, first_row, first_column, shift, k_len, scale,
            seed, batch_head, n_heads, threshold,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, UNIT, True,
        )  # fmt: skip

    factor = drop_scale / l if DROPOUT else 1.0 / l
    store_rows(out_ptr, acc * factor[:, None], batch_head, n_heads, first_row, q_len, BLOCK_M, HEAD_DIM, BLOCK_D)
    row = first_row + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + batch_head.to(tl.int64) * q_len + row, (m + tl.log2(l)) * LN2, mask=row < q_len)


@triton.jit
def _step(
    acc, l, m, q, k_base, v_base, k_row, v_row, first_row, first_column, shift, k_len, scale,
    seed, batch_head, n_heads, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_base, batch_head, n_heads, first_column, k_row, k_len, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (M, N)
    if MASKED:
        seen = visible(first_row, first_column, shift, BLOCK_M, BLOCK_N)
        scores = tl.where(seen, scores, -float("inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - m_new[:, None])
    if MASKED:
        # A scale of 0 makes nan of the hidden scores.
        p = tl.where(seen, p, 0.0)
    rescale = tl.exp2(m - m_new)
    l = l * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    if DROPOUT:
        keep = keep_tile(seed, batch_head, first_row, first_column, threshold, BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    v = load_rows(v_base, batch_head, n_heads, first_column, v_row, k_len, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, l, m_new
