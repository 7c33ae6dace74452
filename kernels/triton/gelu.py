"""GELU in its tanh form, forward and backward.

    y = x/2 · (1 + tanh(u)) = x · sigmoid(2u)            u = √(2/π) · (x + 0.044715 x³)
    dx = dout · (s + 2 x s (1 - s) du/dx)                s = sigmoid(2u) = 1 / (1 + e^(-2u))

Work: one program takes BLOCK neighbouring elements, computed in float32. Triton compiles one kernel for an n that is a
multiple of 16, with 16-byte accesses, and one for the others.
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
    # Far left the product would end as -inf * 0.
    y = tl.where(x < -FAR, 0.0, x / (1.0 + _exponential(_near(x))))
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=offset < n)


@triton.jit
def gelu_backward_kernel(dx_ptr, dout_ptr, x_ptr, n, BLOCK: tl.constexpr):
    """dx, dout and x hold n elements, contiguous."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dout = tl.load(dout_ptr + offset, mask=offset < n, other=0.0).to(tl.float32)
    x = _near(tl.load(x_ptr + offset, mask=offset < n, other=0.0).to(tl.float32))
    e = _exponential(x)
    s = 1.0 / (1.0 + e)
    # 1 - s as e * s: the difference would lose the digits that the large factor behind it brings back.
    derivative = s + x * s * (e * s) * ((1.0 + x * x * (3.0 * CUBIC)) * TWO_SQRT_2_OVER_PI)
    tl.store(dx_ptr + offset, (dout * derivative).to(dx_ptr.dtype.element_ty), mask=offset < n)


@triton.jit
def _near(x):
    """x cut to -FAR ... FAR; comparisons, unlike a minimum, keep nan."""
    return tl.where(x > FAR, FAR, tl.where(x < -FAR, -FAR, x))


@triton.jit
def _exponential(x):
    """e^(-2u)"""
    return tl.exp((x + x * x * x * CUBIC) * -TWO_SQRT_2_OVER_PI)
