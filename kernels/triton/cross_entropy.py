"""Cross-entropy of rows of logits, whose gradient is written over them.

    loss[r] = ln Σ exp(logits[r]) - logits[r, targets[r]]        dlogits = (softmax(logits) - onehot(targets)) / count

Work: one program takes one row and walks over it twice, BLOCK columns at a time: once for its maximum and its sum (the
running sum is rescaled when the maximum grows), once to write the gradient, for which the second read comes from the
L2 cache. count, how many targets are not ignored, lies on the device, so nothing waits for it. Columns from vocab_size
to PADDED, which make the rows a multiple of 128 bytes for the products around, count for nothing and get gradient 0.
Exponentials are of differences to the maximum, in float32. An ignored row has loss and gradient 0; a target outside
the vocabulary has loss nan, and nothing outside is read.

Bytes: two reads and one write of the logits; without the gradient one read.
Papers: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018; Hsu et al., "Liger Kernel", 2024.
"""

# ruff: noqa: E741 - the running softmax is m (maximum), l (sum) in the whole field.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["vocab_size", "ignore_index"])
def cross_entropy_kernel(
    losses_ptr, logits_ptr, targets_ptr, count_ptr, logits_stride: tl.int64, vocab_size, ignore_index: tl.int64,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Rows of logits, PADDED wide, lie logits_stride apart; losses are float32, one a row."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * logits_stride
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index

    m = tl.full((), -float("inf"), tl.float32)
    l = tl.zeros((), tl.float32)
    for first in tl.range(0, vocab_size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = _logits(base, column, vocab_size, PADDED)
        m_new = tl.maximum(m, tl.max(x, 0))
        # Where all so far is -inf, a difference to it would be nan.
        pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
        l = l * tl.exp2((m - pivot) * LOG2E) + tl.sum(tl.exp2((x - pivot) * LOG2E), 0)
        m = m_new
    known = (target >= 0) & (target < vocab_size)
    picked = tl.load(base + target, mask=known, other=float("nan")).to(tl.float32)
    # The small difference first: the logarithm would lose its digits in a large maximum.
    tl.store(losses_ptr + row, tl.where(counted, (m - picked) + tl.log(l), 0.0))

    if GRADIENT:
        # No column is the target of an ignored row, and its weights are 0.
        count = tl.load(count_ptr).to(tl.float32)
        one = 1.0 / count
        factor = one / l
        for first in tl.range(0, PADDED, BLOCK):
            column = first + tl.arange(0, BLOCK)
            x = _logits(base, column, vocab_size, PADDED)
            d = tl.exp2((x - m) * LOG2E) * factor - tl.where(column == target, one, 0.0)
            d = tl.where(counted & (column < vocab_size), d, 0.0)
            tl.store(base + column, d.to(logits_ptr.dtype.element_ty), mask=column < PADDED)


@triton.jit
def _logits(base, column, vocab_size, PADDED: tl.constexpr):
    """float32, -inf beyond the vocabulary. The bound of the read is a multiple of 64, which allows 16-byte accesses."""
    x = tl.load(base + column, mask=column < PADDED, other=0.0).to(tl.float32)
    return tl.where(column < vocab_size, x, -float("inf"))
