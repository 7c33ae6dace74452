"""Token and position embedding with dropout, forward and backward.

    out[r] = dropout(weight[ids[r]] + position_weight[t])        r = b · n_tokens + t
    dweight[v] = Σ dropout(dout[r]) over the r with ids[r] = v        dposition[t] = Σ over b

Work: the forward takes ROWS rows of out a program. Backward: one program for BLOCK columns of one row of a gradient.
The caller gives the rows of out sorted by their token, and where each token's run begins and ends; the program adds its
run, ROWS at a time, in float32, and writes the sum, or zeros. So every element of the gradient is written once, there
is nothing to clear beforehand, and every run gives the same bits. Atomic adds would need float32 copies of both
gradients, cleared, and give other bits each time. The price is paid by a token that fills a batch: its run is walked
by the few programs of its row alone.

Bytes: forward two reads (the positions come from the cache) and one write of out; backward two reads of dout, one write
of each gradient. A row whose id is outside the vocabulary becomes nan, and nothing outside is read.
"""

import triton
import triton.language as tl

from fastgpt.kernels.triton.dropout import keep_columns, keep_rows


@triton.jit(do_not_specialize=["rows", "n_tokens", "vocab_size", "seed", "threshold"])
def embedding_forward_kernel(
    out_ptr, ids_ptr, weight_ptr, position_ptr,
    rows: tl.int64, n_tokens: tl.int64, vocab_size: tl.int64, seed: tl.int64, threshold, drop_scale,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """out is (rows, N); the weights have rows of N. All are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    token = tl.load(ids_ptr + row, mask=row < rows, other=0).to(tl.int64)
    known = inside & ((token >= 0) & (token < vocab_size))[:, None]
    x = tl.load(weight_ptr + (token * N)[:, None] + column[None, :], mask=known, other=float("nan")).to(tl.float32)
    place = (row % n_tokens * N)[:, None] + column[None, :]
    x += tl.load(position_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        x = tl.where(keep_rows(seed, row, threshold, ROWS, BLOCK), x * drop_scale, 0.0)
    tl.store(out_ptr + (row * N)[:, None] + column[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold"])
def embedding_backward_weight_kernel(
    dweight_ptr, dout_ptr, order_ptr, begins_ptr, seed: tl.int64, threshold, drop_scale,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """order lists the rows of dout by token; those of token v stand from begins[v] to begins[v + 1]."""
    token = tl.program_id(0)
    first_column = tl.program_id(1) * BLOCK
    begin, end = tl.load(begins_ptr + token), tl.load(begins_ptr + token + 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(begin, end, ROWS):
        index = first + tl.arange(0, ROWS)
        row = tl.load(order_ptr + index, mask=index < end, other=0).to(tl.int64)
        total += _gradient(
            dout_ptr, row, index < end, first_column, seed, threshold, drop_scale, N, ROWS, BLOCK, DROPOUT
        )
    column = first_column + tl.arange(0, BLOCK)
    value = tl.sum(total, 0).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + token.to(tl.int64) * N + column, value, mask=column < N)


@triton.jit(do_not_specialize=["batch", "n_tokens", "seed", "threshold"])
def embedding_backward_position_kernel(
    dposition_ptr, dout_ptr, batch: tl.int64, n_tokens: tl.int64, seed: tl.int64, threshold, drop_scale,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Positions from n_tokens on get zeros."""
    position = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK
    end = tl.where(position < n_tokens, batch, 0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, end, ROWS):
        index = first + tl.arange(0, ROWS).to(tl.int64)
        row = index * n_tokens + position
        total += _gradient(
            dout_ptr, row, index < end, first_column, seed, threshold, drop_scale, N, ROWS, BLOCK, DROPOUT
        )
    column = first_column + tl.arange(0, BLOCK)
    value = tl.sum(total, 0).to(dposition_ptr.dtype.element_ty)
    tl.store(dposition_ptr + position * N + column, value, mask=column < N)


@triton.jit
def _gradient(
    dout_ptr, row, known, first_column, seed, threshold, drop_scale,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dropout(dout) of BLOCK columns of some rows, zeros where a row is not known: (ROWS, BLOCK), float32."""
    column = first_column + tl.arange(0, BLOCK)
    inside = known[:, None] & (column < N)[None, :]
    dout = tl.load(dout_ptr + (row * N)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        low, high = (row & 0xFFFFFFFF).to(tl.int32), (row >> 32).to(tl.int32)
        keep = keep_columns(seed, low, high[:, None], first_column, threshold, ROWS, BLOCK)
        dout = tl.where(keep, dout * drop_scale, 0.0)
    return dout
