"""gelu_linear: the bits of both rooms one after the other, and less kept for backward."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import extension

# Above the size from which products are ours, and below it.
SIZES = [(96, 512, 256), (5, 24, 8)]


def tensors(rows, n_in, n_out, dtype=torch.float32, gelu_bias=True, bias=True):
    torch.manual_seed(0)
    made = [torch.randn(3, rows, n_in), torch.randn(n_in), torch.randn(n_out, n_in), torch.randn(n_out)]
    given = (True, gelu_bias, True, bias)
    return [t.to(dtype).requires_grad_() if has else None for t, has in zip(made, given, strict=True)]


def composed(x, gelu_bias, weight, bias, backend=None):
    return ops.linear(ops.gelu(x, gelu_bias, backend=backend), weight, bias, backend=backend)


def results(function, inputs, dout, backend=None):
    out = function(*inputs, backend=backend)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return out, *torch.autograd.grad(out, wanted, dout.to(out.dtype))


def assert_same_bits(inputs, backend=None):
    dout = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[0])
    pairs = zip(results(ops.gelu_linear, inputs, dout, backend), results(composed, inputs, dout, backend), strict=True)
    assert all(torch.equal(got, wanted) for got, wanted in pairs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_results_and_gradients_are_those_of_the_two_rooms(size, dtype, backend):
    assert_same_bits(tensors(*size, dtype), backend)


@pytest.mark.parametrize("given", [(False, True), (True, False), (False, False)], ids=str)
def test_either_bias_may_be_missing(given):
    assert_same_bits(tensors(*SIZES[0], gelu_bias=given[0], bias=given[1]))


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_what_is_frozen_gets_no_gradient(frozen):
    inputs = tensors(*SIZES[0])
    inputs[frozen].requires_grad_(False)
    assert_same_bits(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_bits_of_the_two_rooms(dtype):
    x, *parameters = tensors(*SIZES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits([x.detach().to(dtype).requires_grad_(), *parameters])


def test_the_output_of_gelu_is_not_kept():
    if extension.why_not("cpu"):
        pytest.skip(extension.why_not("cpu"))
    x, gelu_bias, weight, bias = tensors(*SIZES[0])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.gelu_linear(x, gelu_bias, weight, bias)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), gelu_bias.data_ptr(), weight.data_ptr()}


def test_compile_sees_the_registered_ops():
    inputs = tensors(*SIZES[0])
    compiled = torch.compile(ops.gelu_linear, fullgraph=True, backend="aot_eager")
    dout = torch.randn(3, 96, 256)
    pairs = zip(results(compiled, inputs, dout), results(composed, inputs, dout), strict=True)
    assert all(torch.equal(got, wanted) for got, wanted in pairs)


def test_what_does_not_fit_is_named():
    x, gelu_bias, weight, bias = tensors(*SIZES[0])
    with pytest.raises(ValueError, match="gelu: bias"):
        ops.gelu_linear(x, gelu_bias[:-1], weight, bias)
    with pytest.raises(ValueError, match="gelu_linear: weight"):
        ops.gelu_linear(x, gelu_bias, weight[:, :-1], bias)
