"""GELU in its tanh form, of x or of x + bias, forward and backward.

    y = x/2 · (1 + tanh(u)) = x · sigmoid(2u)            u = √(2/π) · (x + 0.044715 x³)
    dx = dout · (s + 2 x s (1 - s) du/dx)                s = sigmoid(2u) = 1 / (1 + e^(-2u))
    dbias = Σ dx over rows

Work without a bias: one program takes BLOCK neighbouring elements. Triton compiles one kernel for an n that is a
multiple of 16, with 16-byte accesses, and one for the others. With a bias: a program takes ROWS rows of BLOCK columns.
The backward runs a fixed number of programs for each block of columns, which stride over the rows and keep their share
of dbias in registers; a last kernel adds the shares in a fixed order, so that every run gives the same bits. All is
computed in float32.

Error: a GPU divides (div.full) and takes powers of two (ex2.approx) with an error of up to 2 units of the last place,
2.4e-7. That of the power reaches the sigmoid through s (1 - s) <= 1/4. That of the division would reach it whole, and
with the rounding of 1 + e end above 3e-7; so a quotient y of x and d is corrected by its residual, y + (x - y d) / d,
in fused multiply-adds, and then errs by little more than one rounding. That takes 3 to 4 instructions an element, the
exactly rounded division (div_rn) 23 and a branch, counted in what Triton 3.9 compiles for sm_90.
tests/test_triton_rounding.py lets both instructions err as far as they may.
Bytes: forward one read and one write of the tensor, backward two reads and one write.
Paper: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.
"""

import triton
import triton.language as tl

# Factors stand on the right: in the interpreter constexpr * tensor is no tensor.
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)
# Beyond it the sigmoid is 0 or 1 to the last bit, and powers of x would overflow.
FAR = tl.constexpr(10.0)


@triton.jit
def gelu_forward_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    """out and x hold n elements, contiguous."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, _gelu(x).to(out_ptr.dtype.element_ty), mask=offset < n)


@triton.jit
def gelu_backward_kernel(dx_ptr, dout_ptr, x_ptr, n, BLOCK: tl.constexpr):
    """dx, dout and x hold n elements, contiguous."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dout = tl.load(dout_ptr + offset, mask=offset < n, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offset, (dout * _derivative(x)).to(dx_ptr.dtype.element_ty), mask=offset < n)


@triton.jit(do_not_specialize=["rows"])
def gelu_bias_forward_kernel(
    out_ptr, x_ptr, bias_ptr, rows: tl.int64, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out and x are (rows, N), contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    place = (row * N)[:, None] + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(out_ptr + place, _gelu(x).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gelu_bias_backward_kernel(
    dx_ptr, partial_ptr, dout_ptr, x_ptr, bias_ptr, rows: tl.int64,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, dout and x are (rows, N), contiguous; partial, (programs, N) in float32, takes the shares of dbias."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for group in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = group * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        place = (row * N)[:, None] + column[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        # Zeros beyond the last row, so that the sum may take them.
        dout = tl.load(dout_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dx = dout * _derivative(x)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += dx
    tl.store(partial_ptr + program.to(tl.int64) * N + column, tl.sum(dbias, 0), mask=column < N)


@triton.jit(do_not_specialize=["parts"])
def gelu_bias_sum_kernel(dbias_ptr, partial_ptr, parts, N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the shares of BLOCK columns, PARTS at a time."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dbias = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in tl.range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (column < N)[None, :]
        dbias += tl.load(partial_ptr + (part.to(tl.int64) * N)[:, None] + column[None, :], mask=inside, other=0.0)
    tl.store(dbias_ptr + column, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=column < N)


@triton.jit
def _gelu(x):
    d = 1.0 + _exponential(_near(x))
    reciprocal = 1.0 / d
    y = x * reciprocal
    y = tl.fma(tl.fma(-y, d, x), reciprocal, y)
    # Far out the value is x or 0, and the products would end as -inf * 0 or inf - inf.
    return tl.where(x > FAR, x, tl.where(x < -FAR, 0.0, y))


@triton.jit
def _derivative(x):
    x = _near(x)
    e = _exponential(x)
    d = 1.0 + e
    reciprocal = 1.0 / d
    s = tl.fma(tl.fma(-reciprocal, d, 1.0), reciprocal, reciprocal)
    # 1 - s as e * s: the difference would lose the digits that the large factor behind it brings back.
    return s + x * s * (e * s) * ((1.0 + x * x * (3.0 * CUBIC)) * TWO_SQRT_2_OVER_PI)


@triton.jit
def _near(x):
    """x cut to -FAR ... FAR; comparisons, unlike a minimum, keep nan."""
    return tl.where(x > FAR, FAR, tl.where(x < -FAR, -FAR, x))


@triton.jit
def _exponential(x):
    """e^(-2u)"""
    return tl.exp((x + x * x * x * CUBIC) * -TWO_SQRT_2_OVER_PI)
