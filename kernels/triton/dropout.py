"""The dropout mask of a tile of attention weights, or of rows of the residual stream, by Philox4x32-10.

The layout is that of fastgpt/ops/philox.py:

    counter  c0 = (j // 64) · 8 + j % 8,  c1 = i,  c2 = b · n_heads + h,  c3 = 0          key = seed
    column   j takes 16 bits: slot s = j % 64 // 8, word s // 2, low half when s is even, high half when odd

Work: a tile of 64 · g columns needs BLOCK_M x 8 · g calls, each of which serves eight columns, so no draw is wasted
(a tile of 32 or 16 columns, for head dimensions that leave no room, uses a half or a quarter of them). The four words,
their two halves and the group and remainder of the column then stand as axes

    (BLOCK_M, group, j % 8, half, word // 2, word % 2)  ->  (BLOCK_M, group, word // 2, word % 2, half, j % 8)

and the second order, flattened, is that of the columns. In the layout of a tensor-core accumulator each thread draws
just the numbers of its own columns: the compiled kernels exchange nothing for it.
Paper: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
"""

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, batch_head, first_row, first_column, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True where dropout keeps the weight: (BLOCK_M, BLOCK_N). BLOCK_N, 16, 32 or 64 · g, divides first_column."""
    row = first_row + tl.arange(0, BLOCK_M)
    return keep_columns(seed, row, batch_head, first_column, threshold, BLOCK_M, BLOCK_N)


@triton.jit
def keep_rows(seed, row, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """True where dropout keeps the element of a tensor of rows, whose int64 numbers are `row`: (ROWS, BLOCK)."""
    low, high = (row & 0xFFFFFFFF).to(tl.int32), (row >> 32).to(tl.int32)
    return keep_columns(seed, low, high[:, None], 0, threshold, ROWS, BLOCK)


@triton.jit
def keep_columns(seed, c1, c2, first_column, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The mask of BLOCK_M rows with counters c1 (BLOCK_M,) and c2, a number or (BLOCK_M, 1), all of them int32."""
    GROUPS: tl.constexpr = (BLOCK_N + 63) // 64
    c0 = first_column // 64 * 8 + tl.arange(0, GROUPS * 8)
    # Not broadcast to one shape: the first rounds then work on rows and columns alone.
    w0, w1, w2, w3 = tl.philox(seed, c0[None, :], c1[:, None], c2, c2 * 0)
    part = first_column % 64 // BLOCK_N
    # A join appends an axis, along which its first argument comes first.
    if BLOCK_N == 16:
        word = tl.where(part < 2, tl.where(part == 0, w0, w1), tl.where(part == 2, w2, w3))
        halves = tl.permute(_keep_halves(word, threshold), (0, 2, 1))
    elif BLOCK_N == 32:
        even_word, odd_word = tl.where(part == 0, w0, w2), tl.where(part == 0, w1, w3)
        halves = tl.join(_keep_halves(even_word, threshold), _keep_halves(odd_word, threshold))
        halves = tl.permute(halves, (0, 3, 2, 1))
    else:
        even_words = tl.join(_keep_halves(w0, threshold), _keep_halves(w2, threshold))
        odd_words = tl.join(_keep_halves(w1, threshold), _keep_halves(w3, threshold))
        halves = tl.reshape(tl.join(even_words, odd_words), (BLOCK_M, GROUPS, 8, 2, 2, 2))
        halves = tl.permute(halves, (0, 1, 4, 5, 3, 2))
    return tl.reshape(halves, (BLOCK_M, BLOCK_N))


@triton.jit
def _keep_halves(word, threshold):
    return tl.join((word & 0xFFFF).to(tl.int32) >= threshold, (word >> 16).to(tl.int32) >= threshold)
