"""Dropout, residual addition and layer normalisation in one pass, forward and backward.

    total = residual + dropout(x)        normed = (total - mean) · rstd · weight + bias
    dresidual = dtotal + rstd · (g - mean(g) - t̂ · mean(g ∘ t̂))        g = dnormed ∘ weight, t̂ = (total - mean) · rstd
    dx = dropout(dresidual)        dweight = Σ dnormed ∘ t̂        dbias = Σ dnormed        over rows

Work: as in layer_norm.py. A program holds ROWS whole rows at a time in registers; the backward runs a fixed number of
programs that keep their share of dweight and dbias, which layer_norm_backward_sum_kernel adds in a fixed order. The
mask is drawn in registers (dropout.py), in the backward once more. The statistics are those of the total as it is
stored, which is what the backward reads. Float32 throughout.
Bytes: forward two reads and two writes of the tensor; backward two reads (three when dtotal is used) and one write (two
with dropout).
Papers: Srivastava et al., "Dropout", 2014; Ba, Kiros, Hinton, "Layer Normalization", 2016.
"""

import triton
import triton.language as tl

from fastgpt.kernels.triton.dropout import keep_rows


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def dropout_add_layer_norm_forward_kernel(
    total_ptr, normed_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr,
    rows: tl.int64, x_stride, residual_stride, eps, seed: tl.int64, threshold, drop_scale,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """total and normed are (rows, N) and contiguous; rows of x and residual lie a stride apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    x = tl.load(x_ptr + (row * x_stride)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        x = tl.where(keep_rows(seed, row, threshold, ROWS, BLOCK), x * drop_scale, 0.0)
    place = (row * residual_stride)[:, None] + column[None, :]
    total = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32) + x
    stored = total.to(total_ptr.dtype.element_ty)
    out = (row * N)[:, None] + column[None, :]
    tl.store(total_ptr + out, stored, mask=inside)
    total = stored.to(tl.float32)
    # As in layer_norm.py: the mean must be rounded correctly.
    mean = tl.div_rn(tl.sum(total, 1), tl.full((ROWS,), N, tl.float32))
    centred = tl.where((column < N)[None, :], total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / N + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + out, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def dropout_add_layer_norm_backward_kernel(
    dx_ptr, dresidual_ptr, partial_ptr, dtotal_ptr, dnormed_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr,
    rows: tl.int64, dtotal_stride, dnormed_stride, total_stride, seed: tl.int64, threshold, drop_scale,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr, HAS_DTOTAL: tl.constexpr,
):  # fmt: skip
    """dx (with DROPOUT alone) and dresidual are (rows, N), contiguous; partial is (programs, 2, N), float32."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for group in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = group * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        place = (row * total_stride)[:, None] + column[None, :]
        total = tl.load(total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        place = (row * dnormed_stride)[:, None] + column[None, :]
        dnormed = tl.load(dnormed_ptr + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normalised = (total - mean[:, None]) * rstd[:, None]
        g = dnormed * weight[None, :]
        mean_g = tl.sum(g, 1) / N
        mean_g_normalised = tl.sum(g * normalised, 1) / N
        d = rstd[:, None] * (g - mean_g[:, None] - normalised * mean_g_normalised[:, None])
        if HAS_DTOTAL:
            place = (row * dtotal_stride)[:, None] + column[None, :]
            d += tl.load(dtotal_ptr + place, mask=inside, other=0.0).to(tl.float32)
        out = (row * N)[:, None] + column[None, :]
        tl.store(dresidual_ptr + out, d.to(dresidual_ptr.dtype.element_ty), mask=inside)
        dweight += dnormed * normalised
        dbias += dnormed
        if DROPOUT:
            dx = tl.where(keep_rows(seed, row, threshold, ROWS, BLOCK), d * drop_scale, 0.0)
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    share = partial_ptr + program.to(tl.int64) * 2 * N + column
    tl.store(share, tl.sum(dweight, 0), mask=column < N)
    tl.store(share + N, tl.sum(dbias, 0), mask=column < N)
