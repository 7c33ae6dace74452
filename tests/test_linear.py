"""linear and packed_linear: every backend against the plain product, and what the door refuses."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops import extension
from fastgpt.ops.linear.products import matmul_into
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

pytestmark = pytest.mark.usefixtures("one_thread")


def make(shape, sizes, dtype=torch.float32, bias=True):
    """x, weights and biases of numbers that fit one another as those of a network do."""
    n_in = shape[-1]
    x = torch.randn(shape).to(dtype)
    weights = [(torch.randn(n, n_in) / max(1, n_in) ** 0.5).to(dtype) for n in sizes]
    return x, weights, [torch.randn(n).to(dtype) for n in sizes] if bias else [None] * len(sizes)


def run(x, weights, biases, dout, backend, dtype=None):
    """The output and all gradients, those of x, the weights and the biases."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, *weights, *biases) if t is not None]
    count = len(weights)
    given = leaves[1 + count :] or [None] * count
    out = ops.packed_linear(leaves[0], leaves[1 : 1 + count], given, backend=backend)
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def check(x, weights, biases, backend):
    dout = torch.randn(*x.shape[:-1], sum(w.shape[0] for w in weights)).to(x.dtype)
    naive = run(x, weights, biases, dout, "reference")
    truth = run(x, weights, biases, dout, "reference", torch.float64)
    for index, got in enumerate(run(x, weights, biases, dout, backend)):
        assert_within_bound(got, naive[index], truth[index], factor=GRADIENT_FACTOR if index else 2.0)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(7,), (16, 16, 16), (3, 40, 1)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (1, 8), (2, 3, 17), (33, 20)], ids=str)
def test_output_and_gradients_are_within_the_bound(backend, shape, sizes, bias):
    torch.manual_seed(0)
    check(*make(shape, sizes, bias=bias), backend)


def test_a_layer_large_enough_for_the_own_kernel_is_within_the_bound():
    torch.manual_seed(0)
    check(*make((260, 256), (256, 263)), "cpu")


def test_linear_is_the_packed_form_of_one_weight():
    x, (weight,), (bias,) = make((4, 6), (5,))
    torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-6)


def test_a_bias_may_be_missing_for_some_weights():
    x, weights, biases = make((9, 6), (5, 4, 3))
    got = ops.packed_linear(x, weights, [biases[0], None, biases[2]])
    want = ops.packed_linear(x, weights, [biases[0], torch.zeros(4), biases[2]])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_only_the_gradients_that_are_asked_for_are_made():
    x, (weight, other), biases = make((4, 6), (5, 2))
    weight.requires_grad_()
    ops.packed_linear(x, (weight, other), biases).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 6), rtol=1e-5, atol=1e-6)
    assert x.grad is None and other.grad is None


def test_autocast_gives_its_dtype_and_float32_gradients():
    x, (weight,), (bias,) = make((4, 6), (5,))
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, want = ops.linear(x, weight, bias), F.linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


def test_float64_passes_gradcheck():
    x, weights, biases = (
        [t.double().requires_grad_() for t in part] if isinstance(part, list) else part.double().requires_grad_()
        for part in make((3, 4), (2, 5))
    )
    assert torch.autograd.gradcheck(lambda x, a, b, c, d: ops.packed_linear(x, (a, b), (c, d)), (x, *weights, *biases))


@pytest.mark.parametrize("has_bias", [(True, True), (False, False), (False, True)], ids=str)
def test_the_registered_op_passes_opcheck(has_bias):
    x, weights, biases = make((3, 7), (4, 2))
    given = [bias.requires_grad_() for bias, has in zip(biases, has_bias, strict=True) if has]
    for tensor in (x, *weights):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.fastgpt.packed_linear.default, (x, weights, given, has_bias, None))


def test_torch_compile_sees_one_graph_and_the_same_gradient():
    x, weights, biases = make((5, 9), (4, 3))
    leaves = [t.requires_grad_() for t in (x, *weights, biases[0])]

    def loss(x, a, b, c):
        return ops.packed_linear(x, (a, b), (c, None)).sin().sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves), leaves), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "biases", "words"),
    [
        ([torch.zeros(3, 5)], None, r"got x \(2, 4\), weight \(3, 5\)"),
        ([torch.zeros(3, 4)], [torch.zeros(4)], r"\(3,\); got \(4,\)"),
        ([torch.zeros(3, 4, dtype=torch.float64)], None, "one dtype and device"),
        ([], None, "at least one weight"),
        ([torch.zeros(3, 4)], [], "0 biases"),
    ],
)
def test_what_does_not_fit_is_refused(weights, biases, words):
    with pytest.raises(ValueError, match=words):
        ops.packed_linear(torch.zeros(2, 4), weights, biases)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="must be floating point"):
        ops.linear(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64))


# The products by themselves: sizes around the tiles and the blocks of kernels/cpu/gemm.h, operands of any layout.

SIZES = [(1, 1, 1), (7, 17, 3), (6, 16, 8), (14, 32, 16), (33, 257, 777), (97, 8, 1537), (128, 1600, 401), (3, 5, 0)]


def matrix(rows, columns, layout, dtype):
    """A matrix of one layout: by rows, by columns, or every second row and third column of a larger one."""
    if layout == "columns":
        return torch.randn(columns, rows).to(dtype).t()
    return (
        torch.randn(rows * 2, columns * 3).to(dtype)[::2, ::3]
        if layout == "strided"
        else torch.randn(rows, columns).to(dtype)
    )


def check_product(m, n, k, layouts, dtype=torch.float32, out_dtype=torch.float32):
    a, b = (matrix(*shape, layout, dtype) for shape, layout in zip(((m, k), (k, n)), layouts, strict=True))
    bias, sums = torch.randn(n), torch.full((m,), torch.nan)
    whole = torch.full((m, n + 9), torch.nan, dtype=out_dtype)
    out = whole[:, 4 : 4 + n]
    matmul_into(out, a, b, bias=bias, row_sums=sums, by="own")
    truth, naive = a.double() @ b.double() + bias, (a.float() @ b.float() + bias).to(out_dtype)
    assert_within_bound(out, naive, truth)
    assert_within_bound(sums, a.float().sum(1), a.double().sum(1))
    assert whole[:, :4].isnan().all() and whole[:, 4 + n :].isnan().all(), "columns beside the result were written"
    before = out.clone()
    matmul_into(out, a, b, accumulate=True, by="own")
    plain = (before.float() + a.float() @ b.float()).to(out_dtype)
    assert_within_bound(out, plain, before.double() + a.double() @ b.double())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layouts", [*itertools.product(("rows", "columns", "strided"), repeat=2)], ids="-".join)
def test_products_of_any_layout_are_within_the_bound(isa, size, layouts):
    torch.manual_seed(0)
    check_product(*size, layouts)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(7, 17, 3), (33, 257, 777), (2100, 40, 800)], ids=str)
def test_bfloat16_products_are_summed_in_float32(isa, size, out_dtype):
    torch.manual_seed(0)
    for layouts in (("rows", "columns"), ("columns", "rows")):
        check_product(*size, layouts, torch.bfloat16, out_dtype)


def test_two_threads_give_the_same_bits(isa):
    a, b = torch.randn(301, 900), torch.randn(900, 1700)
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs.append(matmul_into(torch.empty(301, 1700), a, b, by="own"))
        outs.append(matmul_into(torch.empty(20, 1700), a[:20], b, by="own"))
    torch.set_num_threads(1)
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[0], outs[4])
    assert torch.equal(outs[1], outs[3]) and torch.equal(outs[1], outs[5])


def test_nan_and_infinity_stay_in_their_row(isa):
    a, b = torch.randn(20, 30), torch.randn(30, 40)
    a[3, 5], a[7, 2] = torch.nan, torch.inf
    got = matmul_into(torch.empty(20, 40), a, b, by="own")
    assert got[3].isnan().all() and got[7].isinf().all() and got[[0, 1, 2, 4, 5, 6, *range(8, 20)]].isfinite().all()


@pytest.mark.parametrize("by", ["own", "torch", "onednn"])
def test_every_engine_gives_the_three_products_of_a_layer(by):
    x, weight, dout, bias = torch.randn(64, 48), torch.randn(80, 48), torch.randn(64, 80), torch.randn(80)
    sums = torch.empty(80)
    if by == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(matmul_into(torch.empty(64, 80), x, weight.t(), bias=bias, by=by), F.linear(x, weight, bias))
    close(matmul_into(torch.empty(64, 48), dout, weight, by=by), dout @ weight)
    close(matmul_into(torch.ones(80, 48), dout.t(), x, row_sums=sums, accumulate=True, by=by), 1 + dout.t() @ x)
    close(sums, dout.sum(0))


def test_overlapping_rows_of_the_result_are_refused():
    extension.load("cpu")
    with pytest.raises(ValueError, match="must not overlap"):
        matmul_into(torch.empty(1, 4).expand(3, 4), torch.ones(3, 2), torch.ones(2, 4), by="own")
