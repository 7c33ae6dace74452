"""What the attention kernels share: tiles of rows read and written, and the causal mask.

    1 1 1 0 0        q_len = 3, k_len = 5, shift = k_len - q_len = 2: query i sees key j when j <= i + shift
    1 1 1 1 0
    1 1 1 1 1

Strides come in units of UNIT elements (8 where all allow it), which tells the compiler that rows are aligned for
16-byte accesses also when head_dim is 40. Offsets are int64.

UNIT 0 says that a tensor comes not as a pointer but as a TMA descriptor of (batch, n_heads, length, head_dim) with
blocks of (1, 1, BLOCK, BLOCK_D): from sm_90 on one thread then asks for a whole tile, no register holds an address, and
what lies beyond length or head_dim arrives as zeros. The two leading ones let the compiler leave the tile where it
arrives, in shared memory, for the products; with the heads behind the rows, as packed tensors lie, it takes it
through registers (seen in what Triton 3.9 compiles), so the descriptor names the axes in this order, whatever the
strides.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# One compiled kernel serves every length and layout; what the compiler may know of strides, UNIT says.
STRIDES = [f"{tensor}_{axis}" for tensor in "dqkv" for axis in ("batch", "head", "row")]
ANY_VALUE = ["batch_heads", "n_heads", "q_len", "k_len", "seed", "threshold", *STRIDES]


@triton.jit
def head_base(ptr, batch_head, n_heads, stride_batch, stride_head, UNIT: tl.constexpr):
    """Where the head of one batch element begins; a descriptor stays what it is."""
    if UNIT == 0:
        base = ptr
    else:
        base = ptr + (batch_head // n_heads * stride_batch + batch_head % n_heads * stride_head) * UNIT
    return base


@triton.jit
def load_rows(
    base, batch_head, n_heads, first, stride, n_rows, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows first ... first + BLOCK as (BLOCK, BLOCK_D), zeros beyond head_dim and, when BOUNDED, beyond n_rows.

    base is what head_base gave for this head."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    if UNIT == 0:
        value = base.load([batch_head // n_heads, batch_head % n_heads, first, 0]).reshape(BLOCK, BLOCK_D)
    else:
        ptrs = base + first * stride * UNIT + (row * stride * UNIT)[:, None] + column[None, :]
        if BOUNDED:
            inside = (first + row < n_rows)[:, None]
            if HEAD_DIM != BLOCK_D:
                inside = inside & (column < HEAD_DIM)[None, :]
            value = tl.load(ptrs, mask=inside, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            value = tl.load(ptrs, mask=(column < HEAD_DIM)[None, :], other=0.0)
        else:
            value = tl.load(ptrs)
    return value


@triton.jit
def store_rows(
    ptr, value, batch_head, n_heads, first, n_rows,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PACK: tl.constexpr = 1,
):  # fmt: skip
    """Rows of one head, rounded to the dtype of what ptr begins: a contiguous (batch, n_rows, n_heads, head_dim), or
    one part of (batch, n_rows, PACK, n_heads, head_dim)."""
    row, column = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    batch, head = (batch_head // n_heads).to(tl.int64), batch_head % n_heads
    line = (batch * n_rows + row) * (PACK * n_heads) + head
    inside = (row < n_rows)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(ptr + (line * HEAD_DIM)[:, None] + column[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_out_rows(
    ptr, batch_head, n_heads, first, n_rows,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows that store_rows wrote."""
    row, column = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    batch, head = (batch_head // n_heads).to(tl.int64), batch_head % n_heads
    line = (batch * n_rows + row) * n_heads + head
    inside = (row < n_rows)[:, None] & (column < HEAD_DIM)[None, :]
    return tl.load(ptr + (line * HEAD_DIM)[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def visible(first_row, first_column, shift, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The causal mask of one tile, (BLOCK_M, BLOCK_N)."""
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    return column[None, :] <= (row + shift)[:, None]
