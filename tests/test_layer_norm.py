"""layer_norm: every backend against the plain formula, and what the door refuses."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops.layer_norm import Case
from fastgpt.testing import FLOORS, GRADIENT_FACTOR, assert_within_bound

EPS = 1e-5
SIZES = [1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 768, 1600]


def inputs(rows, n, dtype, weight_dtype=None, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(*rows, n) * 3 + 1
    weight, bias = torch.randn(2, n)
    weight_dtype = weight_dtype or dtype
    return [t.to(d).requires_grad_() for t, d in ((x, dtype), (weight, weight_dtype), (bias, weight_dtype))]


def run(tensors, dout, backend, dtype=None):
    """Output and gradients on one backend; `dtype` computes in a wider one."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = ops.layer_norm(*leaves, EPS, backend=backend)
    return out, torch.autograd.grad(out, leaves, dout.to(out.dtype))


def check(tensors, backend):
    dout = torch.randn_like(tensors[0])
    out, grads = run(tensors, dout, backend)
    naive_out, naive_grads = run(tensors, dout, "reference")
    true_out, true_grads = run(tensors, dout, "reference", torch.float64)
    assert_within_bound(out, naive_out, true_out)
    # dx is a difference of numbers of this size, which for short rows is far above dx itself.
    x, weight, _ = tensors
    rstd = (x.double().var(-1, unbiased=False) + EPS).rsqrt().max()
    terms = FLOORS[x.dtype] * max(1.0, (rstd * (dout * weight).abs().max()).item())
    for got, naive, truth, floor in zip(grads, naive_grads, true_grads, (terms, None, None), strict=True):
        assert_within_bound(got, naive, truth, factor=GRADIENT_FACTOR, floor=floor)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_within_the_bound(op_backend, n, dtype):
    backend = op_backend("layer_norm", Case("cpu", dtype, dtype, n))
    check(inputs((5,), n, dtype), backend)


def test_many_rows_split_over_threads_are_within_the_bound(op_backend):
    backend = op_backend("layer_norm", Case("cpu", torch.float32, torch.float32, 768))
    check(inputs((4, 67), 768, torch.float32), backend)


def test_weight_gradients_of_thousands_of_rows_keep_their_digits(op_backend):
    # One running sum over all rows erred by seven times as much as plain PyTorch's pairwise sum.
    backend = op_backend("layer_norm", Case("cpu", torch.float32, torch.float32, 96))
    check(inputs((8192,), 96, torch.float32), backend)


def test_float32_weights_serve_a_bfloat16_input(op_backend):
    backend = op_backend("layer_norm", Case("cpu", torch.bfloat16, torch.float32, 48))
    check(inputs((3, 5), 48, torch.bfloat16, torch.float32), backend)


def test_rows_with_a_stride_are_read_in_place_and_do_not_leak_into_each_other(op_backend):
    backend = op_backend("layer_norm", Case("cpu", torch.float32, torch.float32, 20))
    x, weight, bias = inputs((9,), 20, torch.float32)
    wide = torch.full((9, 33), torch.nan)
    wide[:, :20] = x.detach()
    torch.testing.assert_close(
        ops.layer_norm(wide[:, :20], weight, bias, EPS, backend=backend),
        ops.layer_norm(x.contiguous(), weight, bias, EPS, backend=backend),
        rtol=0, atol=0,
    )  # fmt: skip


def test_a_transposed_input_gives_the_same_values(op_backend):
    backend = op_backend("layer_norm", Case("cpu", torch.float32, torch.float32, 20))
    x, weight, bias = inputs((9,), 20, torch.float32)
    transposed = x.detach().t().contiguous().t()
    torch.testing.assert_close(
        ops.layer_norm(transposed, weight, bias, EPS, backend=backend),
        ops.layer_norm(x, weight, bias, EPS, backend=backend),
        rtol=0, atol=0,
    )  # fmt: skip


def test_constant_rows_give_the_bias(op_backend):
    backend = op_backend("layer_norm", Case("cpu", torch.float32, torch.float32, 33))
    _, weight, bias = inputs((1,), 33, torch.float32)
    out = ops.layer_norm(torch.full((4, 33), 1e4), weight, bias, EPS, backend=backend)
    torch.testing.assert_close(out, bias.expand(4, 33), rtol=0, atol=2e-6)


def test_a_large_mean_does_not_cancel_the_variance(op_backend):
    # E[x²] - E[x]² would lose every digit of a variance of 1 at a mean of 4,096.
    backend = op_backend("layer_norm", Case("cpu", torch.float32, torch.float32, 768))
    x, weight, bias = inputs((4,), 768, torch.float32)
    shifted = (x.detach() + 4096).requires_grad_()
    check([shifted, weight, bias], backend)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (2, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(op_backend, shape):
    backend = op_backend("layer_norm", Case("cpu", torch.float32, torch.float32, shape[-1]))
    x, weight, bias = inputs(shape[:-1], shape[-1], torch.float32)
    out = ops.layer_norm(x, weight, bias, EPS, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(shape[-1]))


def test_nan_stays_in_its_row(op_backend):
    backend = op_backend("layer_norm", Case("cpu", torch.float32, torch.float32, 16))
    x, weight, bias = (t.detach() for t in inputs((3,), 16, torch.float32))
    x[1, 5] = torch.nan
    out = ops.layer_norm(x, weight, bias, EPS, backend=backend)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


def test_float64_passes_gradcheck():
    x, weight, bias = inputs((3,), 7, torch.float64)
    assert torch.autograd.gradcheck(ops.layer_norm, (x, weight, bias, EPS))


def test_the_registered_op_passes_opcheck():
    torch.library.opcheck(torch.ops.fastgpt.layer_norm.default, (*inputs((3,), 20, torch.float32), EPS, None))


def test_torch_compile_sees_one_graph_and_the_same_gradients():
    # Large enough to run our kernel, and not PyTorch's, without the compiler too.
    tensors = inputs((3, 90), 500, torch.float32)
    compiled = torch.compile(lambda *a: ops.layer_norm(*a, EPS), fullgraph=True, backend="aot_eager")
    out = compiled(*tensors)
    got = torch.autograd.grad(out.sin().sum(), tensors)
    want = torch.autograd.grad(ops.layer_norm(*tensors, EPS).sin().sum(), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: (torch.ones(3, 4), torch.ones(5), torch.ones(5)), "shape of the last axis"),
        (lambda: (torch.ones(3, 4), torch.ones(4), torch.ones(3)), "shape of the last axis"),
        (lambda: (torch.ones(3, 4, dtype=torch.int64), torch.ones(4), torch.ones(4)), "floating point"),
        (lambda: (torch.ones(3, 4), torch.ones(4).bfloat16(), torch.ones(4).bfloat16()), "must be torch.float32"),
        (lambda: (torch.ones(3, 4), torch.ones(4, device="meta"), torch.ones(4)), "move all to one device"),
    ],
)
def test_a_bad_input_is_refused_with_what_is_wanted(make, text):
    with pytest.raises(ValueError, match=text):
        ops.layer_norm(*make())
