"""Causal attention, backward: dq, then dk and dv, each by programs that alone write their rows.

    P = exp(q kᵀ · softmax_scale - lse)      dP = dropout(dout vᵀ)      delta = Σ dout · out, one number a row
    dS = P ∘ (dP - delta)                    dq = softmax_scale · dS k
    dv = dropout(P)ᵀ dout                    dk = softmax_scale · dSᵀ q

Work of the first kernel: as in the forward, BLOCK_M queries over the keys they see; it also computes delta, which it
has the rows for, and stores it. Work of the second: BLOCK_N keys over the queries that see them, on transposed tiles,
so that the products with P and dS take them from registers. P and the dropout mask are computed again; products are
accumulated in float32. The longest walks come first in the grid: the last queries, the first keys.

Two passes or one: a single pass over the keys has P and dS once and adds dq from all its programs. Counted for one head
of N queries and keys, W = N²/2 visible weights, D = head_dim, 16-bit tensors:

                                    two passes (here)          one pass
    products of 2 W D operations    7 (3 for dq, 4 for dkdv)   5                      1.4 times as many here
    exponentials and dropout draws  2 W                        W                      twice as many here
    read for each block of rows     k, v: W D 4 / BLOCK_M      -                      bytes, mostly from the L2 cache
    read for each block of keys     q, dout: W D 4 / BLOCK_N   the same
    atomic float32 additions        none                       W D / BLOCK_N          4 of each dq at N = 1024 and
                                                                                      BLOCK_N = 128, 64 at N = 16384
    buffers                         delta, 4 N                 delta, 4 N; dq in float32, 4 N D, cleared before, read
                                                               and rounded to 16 bits after; a pass for delta

Two passes are used: every run gives the same bits, dq goes straight to its 16 bits and its place in a packed gradient,
and nothing depends on how fast a chip adds. FlashAttention takes one pass, which wins where the atomics hide behind the
products. No GPU has timed either here.

Bytes: q, k, v, dout twice and more as the L2 cache allows, out, lse, delta, dq, dk, dv once.
Paper: Dao, "FlashAttention-2", 2023.
"""

import triton
import triton.language as tl

from fastgpt.kernels.triton.attention_tile import (
    ANY_VALUE,
    LOG2E,
    head_base,
    load_out_rows,
    load_rows,
    store_rows,
    visible,
)
from fastgpt.kernels.triton.dropout import keep_tile


@triton.jit(do_not_specialize=ANY_VALUE)
def causal_attention_backward_dq_kernel(
    dq_ptr, delta_ptr, dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    batch_heads, n_heads, q_len, k_len,
    d_batch: tl.int64, d_head: tl.int64, d_row: tl.int64, q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64, v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    softmax_scale, seed: tl.int64, threshold, drop_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """dq is (batch, q_len, n_heads, head_dim) or part of a packed gradient (PACK 3), lse (batch, n_heads, ...)."""
    program = tl.program_id(0)
    batch_head = program % batch_heads
    first_row = (tl.cdiv(q_len, BLOCK_M) - 1 - program // batch_heads) * BLOCK_M
    shift = k_len - q_len

    q_base = head_base(q_ptr, batch_head, n_heads, q_batch, q_head, UNIT)
    d_base = head_base(dout_ptr, batch_head, n_heads, d_batch, d_head, UNIT)
    k_base = head_base(k_ptr, batch_head, n_heads, k_batch, k_head, UNIT)
    v_base = head_base(v_ptr, batch_head, n_heads, v_batch, v_head, UNIT)

    dout = load_rows(d_base, batch_head, n_heads, first_row, d_row, q_len, True, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT)
    out = load_out_rows(out_ptr, batch_head, n_heads, first_row, q_len, BLOCK_M, HEAD_DIM, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    row = first_row + tl.arange(0, BLOCK_M)
    stats = batch_head.to(tl.int64) * q_len + row
    tl.store(delta_ptr + stats, delta, mask=row < q_len)
    # Rows beyond the last get weights of 0.
    lse = tl.load(lse_ptr + stats, mask=row < q_len, other=float("inf")) * LOG2E
    q = load_rows(q_base, batch_head, n_heads, first_row, q_row, q_len, True, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    unmasked_end = (first_row + shift + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_row + BLOCK_M + shift, k_len)
    for first_column in tl.range(0, unmasked_end, BLOCK_N):
        dq = _dq_step(
            dq, dout, q, lse, delta, k_base, v_base, k_row, v_row, first_row, first_column, shift, k_len,
            softmax_scale * LOG2E, seed, batch_head, n_heads, threshold, drop_scale,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, UNIT, False,
        )  # fmt: skip
    for first_column in tl.range(unmasked_end, end, BLOCK_N):
        dq = _dq_step(
            dq, dout, q, lse, delta, k_base, v_base, k_row, v_row, first_row, first_column, shift, k_len,
            softmax_scale * LOG2E, seed, batch_head, n_heads, threshold, drop_scale,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, UNIT, True,
        )  # fmt: skip
    store_rows(dq_ptr, dq * softmax_scale, batch_head, n_heads, first_row, q_len, BLOCK_M, HEAD_DIM, BLOCK_D, PACK)


@triton.jit
def _dq_step(
    dq, dout, q, lse, delta, k_base, v_base, k_row, v_row, first_row, first_column, shift, k_len,
    scale, seed, batch_head, n_heads, threshold, drop_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_base, batch_head, n_heads, first_column, k_row, k_len, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT)
    v = load_rows(v_base, batch_head, n_heads, first_column, v_row, k_len, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])  # (M, N)
    if MASKED:
        p = tl.where(visible(first_row, first_column, shift, BLOCK_M, BLOCK_N), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        keep = keep_tile(seed, batch_head, first_row, first_column, threshold, BLOCK_M, BLOCK_N)
        dp = tl.where(keep, dp * drop_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=ANY_VALUE)
def causal_attention_backward_dkdv_kernel(
    dk_ptr, dv_ptr, dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr,
    batch_heads, n_heads, q_len, k_len,
    d_batch: tl.int64, d_head: tl.int64, d_row: tl.int64, q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64, v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    softmax_scale, seed: tl.int64, threshold, drop_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """dk and dv are (batch, k_len, n_heads, head_dim) or parts of a packed gradient (PACK 3); lse, delta as there."""
    program = tl.program_id(0)
    batch_head = program % batch_heads
    first_column = program // batch_heads * BLOCK_N
    shift = k_len - q_len

    q_base = head_base(q_ptr, batch_head, n_heads, q_batch, q_head, UNIT)
    d_base = head_base(dout_ptr, batch_head, n_heads, d_batch, d_head, UNIT)
    k_base = head_base(k_ptr, batch_head, n_heads, k_batch, k_head, UNIT)
    v_base = head_base(v_ptr, batch_head, n_heads, v_batch, v_head, UNIT)
    stats = batch_head.to(tl.int64) * q_len

    k = load_rows(k_base, batch_head, n_heads, first_column, k_row, k_len, True, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT)
    v = load_rows(v_base, batch_head, n_heads, first_column, v_row, k_len, True, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    # The first row that sees any key of the block, and the first from which on all rows see all of them.
    begin = tl.maximum(first_column - shift, 0) // BLOCK_M * BLOCK_M
    unmasked_begin = tl.cdiv(tl.maximum(first_column + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
    for first_row in tl.range(begin, tl.minimum(unmasked_begin, q_len), BLOCK_M):
        dk, dv = _dkdv_step(
            dk, dv, k, v, q_base, d_base, q_row, d_row, lse_ptr + stats, delta_ptr + stats,
            first_row, first_column, shift, q_len,
            softmax_scale * LOG2E, seed, batch_head, n_heads, threshold, drop_scale,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, UNIT, True,
        )  # fmt: skip
    for first_row in tl.range(unmasked_begin, q_len, BLOCK_M):
        dk, dv = _dkdv_step(
            dk, dv, k, v, q_base, d_base, q_row, d_row, lse_ptr + stats, delta_ptr + stats,
            first_row, first_column, shift, q_len,
            softmax_scale * LOG2E, seed, batch_head, n_heads, threshold, drop_scale,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, UNIT, False,
        )  # fmt: skip
    if DROPOUT:
        dv = dv * drop_scale
    store_rows(dk_ptr, dk * softmax_scale, batch_head, n_heads, first_column, k_len, BLOCK_N, HEAD_DIM, BLOCK_D, PACK)
    store_rows(dv_ptr, dv, batch_head, n_heads, first_column, k_len, BLOCK_N, HEAD_DIM, BLOCK_D, PACK)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q_base, d_base, q_row, d_row, lse_ptr, delta_ptr,
    first_row, first_column, shift, q_len, scale, seed, batch_head, n_heads, threshold, drop_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_M)
    q = load_rows(q_base, batch_head, n_heads, first_row, q_row, q_len, True, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT)
    # Rows beyond the last get weights of 0.
    lse = tl.load(lse_ptr + row, mask=row < q_len, other=float("inf")) * LOG2E
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])  # (N, M)
    if MASKED:
        p = tl.where(tl.trans(visible(first_row, first_column, shift, BLOCK_M, BLOCK_N)), p, 0.0)
    if DROPOUT:
        # Dropped weights are marked by their sign, so that the mask need not stay in registers.
        keep = tl.trans(keep_tile(seed, batch_head, first_row, first_column, threshold, BLOCK_M, BLOCK_N))
        p = tl.where(keep, p, -p)
    dout = load_rows(d_base, batch_head, n_heads, first_row, d_row, q_len, True, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT)
    dropped = tl.where(p < 0.0, 0.0, p) if DROPOUT else p
    dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(p < 0.0, 0.0, dp * drop_scale)
        p = tl.abs(p)
    delta = tl.load(delta_ptr + row, mask=row < q_len, other=0.0)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
