"""The approximate instructions of a GPU at their worst: Triton's interpreter with divisions and powers that err.

PTX gives div.full.f32 and ex2.approx.f32 an error of up to 2 units of the last place, 2^-22 of the value, and an
exponential is the power of a rounded product. The interpreter is exact, so a formula that passes there by a hair may
fail on a GPU. test_triton_interpreter.py runs this file.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops import triton_support
from fastgpt.ops.gelu import Case
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

if not triton_support.interpreting():
    pytest.skip("test_triton_interpreter.py runs this in the interpreter", allow_module_level=True)

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

pytestmark = pytest.mark.parametrize("op_backend", ["triton"], indirect=True)
ERROR = 2.0**-22


@pytest.fixture(params=["low", "high", "mixed"])
def erring(request, monkeypatch):
    """Divisions and powers too low, too high, or by chance one or the other."""
    generator = np.random.default_rng(0)

    def off(value):
        signs = {"low": -1.0, "high": 1.0, "mixed": generator.choice([-1.0, 1.0], np.shape(value))}
        return np.asarray(value * (1.0 + ERROR * signs[request.param]), np.float32)

    def divide(self, x, y):
        return self.binary_op(x, y, lambda a, b: off(a.astype(np.float64) / b))

    def exponential(self, x):
        return self.unary_op(x, lambda a: off(np.exp2((a * np.float32(np.log2(np.e))).astype(np.float64))))

    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", divide)
    monkeypatch.setattr(InterpreterBuilder, "create_exp", exponential)


def test_gelu_keeps_its_bound_over_the_whole_range(op_backend, erring):
    op_backend("gelu", Case("cpu", torch.float32))
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 38, 500), -torch.logspace(-30, 38, 500)])
    truth = F.gelu(x.double(), approximate="tanh")
    error = ((ops.gelu(x, backend="triton") - truth) / x.abs().clamp(min=1e-30)).abs().max()
    assert error < 3e-7, error


def test_the_gradient_of_gelu_keeps_its_bound(op_backend, erring):
    op_backend("gelu", Case("cpu", torch.float32))
    x, grads = torch.linspace(-12, 12, 4001), []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(ops.gelu(leaf, backend=backend).sum(), leaf)[0])
    assert_within_bound(*grads, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_layer_norm_keeps_its_bound(op_backend, erring, shift):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(64, 200) + shift, torch.randn(200), torch.randn(200)
    plain = [F.layer_norm(x.to(t), (200,), weight.to(t), bias.to(t)) for t in (torch.float32, torch.float64)]
    assert_within_bound(ops.layer_norm(x, weight, bias, backend="triton"), *plain)
