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


def test_float64_passes_gradcheck():
    assert torch.autograd.gradcheck(ops.gelu, (torch.randn(11, dtype=torch.float64, requires_grad=True),))


def test_the_registered_op_passes_opcheck():
    torch.library.opcheck(torch.ops.fastgpt.gelu.default, (torch.randn(3, 7, requires_grad=True), None))


def test_torch_compile_sees_one_graph_and_the_same_gradient():
    x = torch.randn(5, 9, requires_grad=True)
    compiled = torch.compile(ops.gelu, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).sin().sum(), x)[0]
    want = torch.autograd.grad(ops.gelu(x).sin().sum(), x)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="must be floating point"):
        ops.gelu(torch.ones(3, dtype=torch.int64))
