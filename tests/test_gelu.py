"""gelu: every backend against the plain formula, and what the door refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops.gelu import Case
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

SHAPES = [(1,), (2,), (7,), (8,), (9,), (15,), (17,), (31,), (33,), (3, 5, 7), (64, 257)]


def run(x, dout, backend, dtype=None):
    leaf = x.detach().to(dtype or x.dtype).requires_grad_()
    out = ops.gelu(leaf, backend=backend)
    return out, torch.autograd.grad(out, leaf, dout.to(out.dtype))[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_within_the_bound(op_backend, shape, dtype):
    backend = op_backend("gelu", Case("cpu", dtype))
    torch.manual_seed(0)
    x, dout = ((torch.randn(shape) * 4).to(dtype) for _ in range(2))
    out, grad = run(x, dout, backend)
    naive_out, naive_grad = run(x, dout, "reference")
    true_out, true_grad = run(x, dout, "reference", torch.float64)
    assert_within_bound(out, naive_out, true_out)
    assert_within_bound(grad, naive_grad, true_grad, factor=GRADIENT_FACTOR)


def test_the_whole_range_of_float32_is_as_close_as_pytorch(op_backend):
    backend = op_backend("gelu", Case("cpu", torch.float32))
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 38, 500), -torch.logspace(-30, 38, 500)])
    truth = F.gelu(x.double(), approximate="tanh")
    # Relative to |x|: far left the value itself vanishes.
    error = ((ops.gelu(x, backend=backend) - truth) / x.abs().clamp(min=1e-30)).abs().max()
    assert error < 3e-7, error


def test_infinities_and_nan_give_their_limits(op_backend):
    backend = op_backend("gelu", Case("cpu", torch.float32))
    got = ops.gelu(torch.tensor([torch.inf, -torch.inf, torch.nan]), backend=backend)
    assert got[0] == torch.inf and got[1] == 0 and got[2].isnan()


def test_the_gradient_at_huge_inputs_is_one_or_zero(op_backend):
    backend = op_backend("gelu", Case("cpu", torch.float32))
    x = torch.tensor([1e20, -1e20, 3e38, -3e38, 40.0, -40.0], requires_grad=True)
    ops.gelu(x, backend=backend).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 0, 1, 0, 1, 0]), rtol=0, atol=1e-6)


def test_a_transposed_input_gives_the_same_values(op_backend):
    backend = op_backend("gelu", Case("cpu", torch.float32))
    x = torch.randn(6, 50)
    torch.testing.assert_close(ops.gelu(x.t(), backend=backend), ops.gelu(x, backend=backend).t(), rtol=0, atol=0)


def test_an_empty_input_gives_an_empty_output(op_backend):
    backend = op_backend("gelu", Case("cpu", torch.float32))
    assert ops.gelu(torch.empty(0, 4), backend=backend).shape == (0, 4)


def run_biased(x, bias, dout, backend, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias)]
    out = ops.gelu(*leaves, backend=backend)
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def check_biased(shape, dtype, bias_dtype, backend):
    torch.manual_seed(0)
    x, dout = ((torch.randn(shape) * 4).to(dtype) for _ in range(2))
    bias = torch.randn(shape[-1]).to(bias_dtype)
    naive, truth = run_biased(x, bias, dout, "reference"), run_biased(x, bias, dout, "reference", torch.float64)
    for index, got in enumerate(run_biased(x, bias, dout, backend)):
        factor = GRADIENT_FACTOR if index else 2.0
        assert_within_bound(got, naive[index], truth[index], factor=factor)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 33, 65, 129, 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_and_its_gradient_are_within_the_bound(any_backend, n, dtype):
    backend = any_backend("gelu", Case("cpu", dtype, dtype))
    check_biased((3, 7, n), dtype, dtype, backend)


def test_a_float32_bias_serves_a_bfloat16_input(any_backend):
    backend = any_backend("gelu", Case("cpu", torch.bfloat16, torch.float32))
    check_biased((5, 40), torch.bfloat16, torch.float32, backend)


def test_the_bias_gradient_of_thousands_of_rows_keeps_its_digits(op_backend):
    backend = op_backend("gelu", Case("cpu", torch.float32, torch.float32))
    check_biased((8192, 96), torch.float32, torch.float32, backend)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (2, 0)])
def test_empty_inputs_with_a_bias_give_a_zero_gradient(any_backend, shape):
    backend = any_backend("gelu", Case("cpu", torch.float32, torch.float32))
    bias = torch.randn(shape[-1], requires_grad=True)
    out = ops.gelu(torch.empty(shape), bias, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert torch.equal(bias.grad, torch.zeros(shape[-1]))


def test_a_transposed_input_with_a_bias_gives_the_same_values(op_backend):
    backend = op_backend("gelu", Case("cpu", torch.float32, torch.float32))
    x, bias, dout = torch.randn(6, 50), torch.randn(50), torch.randn(6, 50)
    got = run_biased(x.t().contiguous().t(), bias, dout.t().contiguous().t(), backend)
    torch.testing.assert_close(got, run_biased(x, bias, dout, backend), rtol=0, atol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_float64_passes_gradcheck(biased):
    inputs = (torch.randn(3, 11), torch.randn(11))[: 1 + biased]
    assert torch.autograd.gradcheck(ops.gelu, [t.double().requires_grad_() for t in inputs])


@pytest.mark.parametrize("bias", [None, torch.randn(7, requires_grad=True)], ids=["plain", "biased"])
def test_the_registered_op_passes_opcheck(bias):
    torch.library.opcheck(torch.ops.fastgpt.gelu.default, (torch.randn(3, 7, requires_grad=True), bias, None))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_torch_compile_sees_one_graph_and_the_same_gradient(biased, backend):
    leaves = [torch.randn(5, 9, requires_grad=True), torch.randn(9, requires_grad=True)][: 1 + biased]
    function = lambda *a: ops.gelu(*a, backend=backend).sin().sum()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(function(*leaves), leaves), rtol=0, atol=0)


def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"bias \(3,\) must have the shape of the last axis of x, \(4,\)"):
        ops.gelu(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="bias is torch.bfloat16"):
        ops.gelu(torch.ones(2, 4), torch.ones(4).bfloat16())


def test_integers_are_refused():
    with pytest.raises(ValueError, match="must be floating point"):
        ops.gelu(torch.ones(3, dtype=torch.int64))
