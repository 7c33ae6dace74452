"""dropout_add_layer_norm: every backend against the plain formula with the same mask, and what the door refuses."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import philox
from fastgpt.ops.dropout_add_layer_norm import Case, reference
from fastgpt.testing import FLOORS, GRADIENT_FACTOR, assert_within_bound

EPS = 1e-5
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 193, 768]


def case(n, dtype=torch.float32, weight_dtype=None, dropout=False):
    return Case("cpu", dtype, weight_dtype or dtype, n, dropout)


def inputs(rows, n, dtype=torch.float32, weight_dtype=None, seed=0):
    torch.manual_seed(seed)
    x, residual = torch.randn(2, *rows, n) * 2 + 0.5
    weight, bias = torch.randn(2, n)
    weight_dtype = weight_dtype or dtype
    tensors = ((x, dtype), (residual, dtype), (weight, weight_dtype), (bias, weight_dtype))
    return [t.to(d).requires_grad_() for t, d in tensors]


def ours(backend, dropout_p=0.0):
    def run(*leaves):
        torch.manual_seed(7)
        return ops.dropout_add_layer_norm(*leaves, dropout_p=dropout_p, eps=EPS, backend=backend)

    return run


def plain(dropout_p=0.0):
    torch.manual_seed(7)
    seed = philox.draw_seed()
    return lambda *leaves: reference.apply(*leaves, EPS, dropout_p, seed=seed)


def results(function, tensors, douts, dtype=None):
    """total, normed and the gradients of all inputs; `dtype` computes in a wider one."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outs = function(*leaves)
    return [*outs, *torch.autograd.grad(outs, leaves, [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)])]


def check(tensors, backend, dropout_p=0.0):
    douts = [torch.randn_like(tensors[0]) for _ in range(2)]
    got = results(ours(backend, dropout_p), tensors, douts)
    naive = results(plain(dropout_p), tensors, douts)
    truth = results(plain(dropout_p), tensors, douts, torch.float64)
    for index in range(2):
        assert_within_bound(got[index], naive[index], truth[index])
    # dx is a difference of numbers of this size, which for short rows is far above dx itself.
    rstd = (truth[0].var(-1, unbiased=False) + EPS).rsqrt().max()
    terms = (rstd * (douts[1] * tensors[2]).abs().max()).item() * max(1.0, philox.scale(dropout_p))
    floor = FLOORS[tensors[0].dtype] * max(1.0, terms)
    for index, allowed in zip(range(2, 6), (floor, floor, None, None), strict=True):
        assert_within_bound(got[index], naive[index], truth[index], factor=GRADIENT_FACTOR, floor=allowed)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_outputs_and_gradients_are_within_the_bound(op_backend, n, dtype, dropout_p):
    backend = op_backend("dropout_add_layer_norm", case(n, dtype, dropout=dropout_p > 0))
    check(inputs((5,), n, dtype), backend, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_many_rows_split_over_threads_are_within_the_bound(op_backend, dropout_p):
    backend = op_backend("dropout_add_layer_norm", case(768, dropout=dropout_p > 0))
    check(inputs((4, 67), 768), backend, dropout_p)


def test_weight_gradients_of_thousands_of_rows_keep_their_digits(op_backend):
    backend = op_backend("dropout_add_layer_norm", case(96))
    check(inputs((8192,), 96), backend)


def test_float32_weights_serve_a_bfloat16_input(op_backend):
    backend = op_backend("dropout_add_layer_norm", case(48, torch.bfloat16, torch.float32, True))
    check(inputs((3, 5), 48, torch.bfloat16, torch.float32), backend, 0.2)


def test_pytorchs_own_ops_are_within_the_bound():
    check(inputs((5,), 65), "torch")


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_the_mask_is_the_one_that_philox_draws(op_backend, dropout_p):
    backend = op_backend("dropout_add_layer_norm", case(300, dropout=True))
    _, _, weight, bias = inputs((1,), 300)
    torch.manual_seed(7)
    keep = philox.keep_rows(70, 300, dropout_p, philox.draw_seed()).to(weight.device)
    total, _ = ours(backend, dropout_p)(torch.ones(70, 300), torch.zeros(70, 300), weight, bias)
    assert torch.equal(total != 0, keep)


def test_dropping_everything_leaves_the_residual(op_backend):
    backend = op_backend("dropout_add_layer_norm", case(40, dropout=True))
    x, residual, weight, bias = inputs((3,), 40)
    total, _ = ours(backend, 1.0)(x, residual, weight, bias)
    assert torch.equal(total, residual)
    total.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(residual.grad, torch.ones_like(x))


@pytest.mark.parametrize("used", [0, 1], ids=["total", "normed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_one_output_alone_may_be_used(any_backend, used, dropout_p):
    backend = any_backend("dropout_add_layer_norm", case(20, dropout=dropout_p > 0))
    if backend == "torch" and dropout_p:
        pytest.skip("PyTorch draws another mask")
    tensors = inputs((6,), 20)
    got = torch.autograd.grad(ours(backend, dropout_p)(*tensors)[used].sin().sum(), tensors[:2])
    want = torch.autograd.grad(plain(dropout_p)(*tensors)[used].sin().sum(), tensors[:2])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_rows_with_a_stride_give_the_same_values(op_backend):
    backend = op_backend("dropout_add_layer_norm", case(20, dropout=True))
    tensors = inputs((9,), 20)
    wide = torch.full((2, 9, 33), torch.nan)
    wide[0, :, :20], wide[1, :, :20] = tensors[0].detach(), tensors[1].detach()
    apart = [wide[0, :, :20].requires_grad_(), wide[1, :, :20].requires_grad_(), *tensors[2:]]
    douts = torch.full((2, 9, 33), torch.nan)
    douts[:, :, :20] = torch.randn(2, 9, 20)

    def run(leaves, douts):
        outs = ours(backend, 0.3)(*leaves)
        return *outs, *torch.autograd.grad(outs, leaves, list(douts))

    got, want = run(apart, douts[:, :, :20]), run(tensors, douts[:, :, :20].contiguous())
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_transposed_input_gives_the_same_values(op_backend):
    backend = op_backend("dropout_add_layer_norm", case(20, dropout=True))
    x, residual, weight, bias = (t.detach() for t in inputs((9,), 20))
    got = ours(backend, 0.3)(x.t().contiguous().t(), residual.t().contiguous().t(), weight, bias)
    torch.testing.assert_close(got, ours(backend, 0.3)(x, residual, weight, bias), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (2, 0)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(any_backend, shape, dropout_p):
    backend = any_backend("dropout_add_layer_norm", case(shape[-1], dropout=dropout_p > 0))
    x, residual, weight, bias = inputs(shape[:-1], shape[-1])
    total, normed = ours(backend, dropout_p)(x, residual, weight, bias)
    assert total.shape == normed.shape == shape
    (total.sum() + normed.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(shape[-1]))


def test_nan_stays_in_its_row(op_backend):
    backend = op_backend("dropout_add_layer_norm", case(16))
    x, residual, weight, bias = (t.detach() for t in inputs((3,), 16))
    x[1, 5] = torch.nan
    total, normed = ours(backend)(x, residual, weight, bias)
    assert normed[1].isnan().all() and not normed[[0, 2]].isnan().any() and total.isnan().sum() == 1


def test_without_dropout_both_gradients_are_one_tensor(op_backend):
    backend = op_backend("dropout_add_layer_norm", case(16))
    tensors = inputs((3,), 16)
    dx, dresidual = torch.autograd.grad(ours(backend)(*tensors)[1].sum(), tensors[:2])
    assert dx.data_ptr() == dresidual.data_ptr()


def test_the_reference_drops_as_the_book_does():
    x, residual, weight, bias = (t.detach() for t in inputs((3,), 16))
    torch.manual_seed(3)
    total, _ = ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.5, backend="reference")
    torch.manual_seed(3)
    assert torch.equal(total, torch.nn.Dropout(0.5)(x) + residual)


def test_float64_passes_gradcheck():
    assert torch.autograd.gradcheck(ops.dropout_add_layer_norm, inputs((3,), 7, torch.float64))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_registered_op_passes_opcheck(dropout_p):
    seed = torch.tensor(5) if dropout_p else None
    op = torch.ops.fastgpt.dropout_add_layer_norm.default
    torch.library.opcheck(op, (*inputs((3,), 20), seed, dropout_p, EPS, None))


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_torch_compile_sees_one_graph_and_the_kernels_own_gradients(backend, dropout_p):
    tensors = inputs((3, 5), 20)

    def function(*leaves):
        return ops.dropout_add_layer_norm(*leaves, dropout_p=dropout_p, eps=EPS, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    got = torch.autograd.grad(sum(out.sin().sum() for out in compiled(*tensors)), tensors)
    want = torch.autograd.grad(sum(out.sin().sum() for out in plain(dropout_p)(*tensors)), tensors)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x, w: (x, x[:2], w, w), "one shape, dtype and device"),
        (lambda x, w: (x, x.bfloat16(), w, w), "one shape, dtype and device"),
        (lambda x, w: (x, x, w[:3], w[:3]), "dropout_add_layer_norm: weight .* shape of the last axis"),
        (lambda x, w: (x, x, w.bfloat16(), w.bfloat16()), "must be torch.float32"),
    ],
)
def test_a_bad_input_is_refused_with_what_is_wanted(make, text):
    with pytest.raises(ValueError, match=text):
        ops.dropout_add_layer_norm(*make(torch.ones(3, 4), torch.ones(4)))


def test_a_probability_outside_its_range_is_refused():
    x, w = torch.ones(3, 4), torch.ones(4)
    with pytest.raises(ValueError, match="dropout_p is 1.5"):
        ops.dropout_add_layer_norm(x, x, w, w, dropout_p=1.5)
