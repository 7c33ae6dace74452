"""Layer normalisation, forward and backward.

    y = (x - mean) · rstd · weight + bias             rstd = 1 / sqrt(var + eps), var biased, about the mean
    dx = rstd · (g - mean(g) - x̂ · mean(g ∘ x̂))       g = dout ∘ weight, x̂ = (x - mean) · rstd
    dweight = Σ dout ∘ x̂     dbias = Σ dout           over rows

Work: a program holds ROWS whole rows at a time, BLOCK >= n wide, in registers. The forward runs one program a group of
rows. The backward runs a fixed number of programs that stride over the groups and keep their share of dweight and dbias
in registers; a last kernel adds the shares in a fixed order, so that every run gives the same bits. Float32 throughout.
Bytes: forward one read and one write of the tensor, backward two reads and one write.
Paper: Ba, Kiros, Hinton, "Layer Normalization", 2016.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def layer_norm_forward_kernel(
    out_ptr, mean_ptr, rstd_ptr, x_ptr, weight_ptr, bias_ptr, rows: tl.int64, x_stride, eps,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out is (rows, N) and contiguous; rows of x lie x_stride elements apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    x = tl.load(x_ptr + (row * x_stride)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    # A plain division errs by two units of the last place, which a large mean would carry into every element.
    mean = tl.div_rn(tl.sum(x, 1), tl.full((ROWS,), N, tl.float32))
    centred = tl.where((column < N)[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / N + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + (row * N)[:, None] + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    dx_ptr, partial_ptr, dout_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, rows: tl.int64, dout_stride, x_stride,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx is (rows, N) and contiguous; partial, (programs, 2, N) in float32, takes each program's dweight and dbias."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for group in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = group * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        x = tl.load(x_ptr + (row * x_stride)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + (row * dout_stride)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normalised = (x - mean[:, None]) * rstd[:, None]
        g = dout * weight[None, :]
        mean_g = tl.sum(g, 1) / N
        mean_g_normalised = tl.sum(g * normalised, 1) / N
        dx = rstd[:, None] * (g - mean_g[:, None] - normalised * mean_g_normalised[:, None])
        tl.store(dx_ptr + (row * N)[:, None] + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dout * normalised
        dbias += dout
    share = partial_ptr + program.to(tl.int64) * 2 * N + column
    tl.store(share, tl.sum(dweight, 0), mask=column < N)
    tl.store(share + N, tl.sum(dbias, 0), mask=column < N)


@triton.jit(do_not_specialize=["parts"])
def layer_norm_backward_sum_kernel(
    dweight_ptr, dbias_ptr, partial_ptr, parts,
    N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the shares of BLOCK columns, PARTS at a time."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros((PARTS, BLOCK), tl.float32)
    dbias = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in tl.range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (column < N)[None, :]
        share = partial_ptr + (part.to(tl.int64) * 2 * N)[:, None] + column[None, :]
        dweight += tl.load(share, mask=inside, other=0.0)
        dbias += tl.load(share + N, mask=inside, other=0.0)
    tl.store(dweight_ptr + column, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=column < N)
    tl.store(dbias_ptr + column, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=column < N)
