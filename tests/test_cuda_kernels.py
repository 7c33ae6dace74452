"""The CUDA kernels of layer_norm and gelu in the emulator of a thread block, and what the emulator catches."""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch
from cuda_emulation import HOST, as_cuda_backend, compiled, emulate

from fastgpt import ops
from fastgpt.ops import philox
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

NONE, NO_WAIT, NO_BARRIER, OVERWRITE, STRAY_LANE, DEADLOCK, OUTSIDE, NOT_WAITED_FOR = range(8)
ROOMS = [importlib.import_module(f"fastgpt.ops.{name}").OP for name in ("layer_norm", "gelu", "dropout_add_layer_norm")]


@pytest.fixture(scope="module")
def emulated():
    emulated = emulate()
    with as_cuda_backend(emulated, *ROOMS):
        yield emulated


@pytest.fixture(scope="module")
def run_copy():
    library = ctypes.CDLL(str(compiled([HOST / "faults.cu"])))
    library.run_copy.restype = ctypes.c_char_p

    def run(fault):
        numbers, out = torch.arange(256.0), torch.zeros(256)
        error = library.run_copy(ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(numbers.data_ptr()), fault)
        return out, numbers, error.decode() if error else None

    return run


def test_a_correct_kernel_runs(run_copy):
    out, numbers, error = run_copy(NONE)
    assert error is None
    torch.testing.assert_close(out, numbers.roll(-128), rtol=0, atol=0)


def test_a_copy_that_nobody_waited_for_is_not_there(run_copy):
    out, _, _ = run_copy(NO_WAIT)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (NO_BARRIER, "and one writes"),
        (OVERWRITE, "and one writes"),
        (STRAY_LANE, "another at"),
        (DEADLOCK, "wait for each other for ever"),
        (OUTSIDE, "outside shared memory"),
        (NOT_WAITED_FOR, "did not wait for"),
    ],
)
def test_a_fault_is_named(run_copy, fault, message):
    error = run_copy(fault)[2]
    assert error is not None and message in error


def gradients(function, inputs, dout, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return out, torch.autograd.grad(out, leaves, dout.to(out.dtype))


def check(function, inputs, dout):
    """`function(*inputs, backend)` on the emulator is as close to the truth as plain PyTorch, gradients too."""
    out, grads = gradients(lambda *x: function(*x, "cuda"), inputs, dout)
    naive_out, naive_grads = gradients(lambda *x: function(*x, "reference"), inputs, dout)
    true_out, true_grads = gradients(lambda *x: function(*x, "reference"), inputs, dout, torch.float64)
    assert_within_bound(out, naive_out, true_out)
    for got, naive, true in zip(grads, naive_grads, true_grads, strict=True):
        assert_within_bound(got, naive, true, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 33), (9, 768), (5, 8), (1, 264), (3, 1600), (2, 2056)], ids=str)
def test_layer_norm_is_within_the_bound(emulated, shape, dtype):
    torch.manual_seed(0)
    x, dout = (torch.randn(shape).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    emulated.order(shape[0])
    check(lambda *a: ops.layer_norm(*a[:3], backend=a[3]), [x, weight, bias], dout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 8, 1025])
def test_gelu_is_within_the_bound(emulated, size, dtype):
    torch.manual_seed(0)
    x, dout = ((torch.randn(size) * 4).to(dtype) for _ in range(2))
    check(lambda x, backend: ops.gelu(x, backend=backend), [x], dout)


def test_unaligned_tensors_go_element_by_element(emulated):
    x = torch.randn(100)[1:]
    before = emulated.launches()
    torch.testing.assert_close(ops.gelu(x, backend="cuda"), ops.gelu(x, backend="reference"))
    assert emulated.launches() == before + 1


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("shape", [(1, 8), (70, 72), (9, 768), (3, 1032)], ids=str)
def test_gelu_with_a_bias_and_its_gradient_are_within_the_bound(emulated, shape, dtype, wide):
    torch.manual_seed(0)
    x, dout = ((torch.randn(shape) * 3).to(dtype) for _ in range(2))
    bias = torch.randn(shape[-1]).to(torch.float32 if wide else dtype)
    emulated.order(shape[0])
    check(lambda *a: ops.gelu(*a[:2], backend=a[2]), [x, bias], dout)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(7, 8), (33, 200), (3, 1600)], ids=str)
def test_norm_of_a_dropped_sum_is_within_the_bound(emulated, shape, dropout_p, dtype, wide):
    torch.manual_seed(0)
    x, residual, *douts = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(shape[-1]).to(torch.float32 if wide else dtype) for _ in range(2))
    torch.manual_seed(3)
    keep = philox.keep_rows(*shape, dropout_p, philox.draw_seed())
    emulated.order(shape[1])

    def run(dtype, backend, *inputs):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        torch.manual_seed(3)
        if backend == "cuda":
            outs = ops.dropout_add_layer_norm(*leaves, dropout_p=dropout_p, backend="cuda")
        else:
            total = leaves[1] + leaves[0] * keep * philox.scale(dropout_p)
            outs = total, ops.layer_norm(total, *leaves[2:], backend="reference")
        return [*outs, *torch.autograd.grad(outs, leaves, [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)])]

    inputs = x, residual, weight, bias
    truth = run(torch.float64, "plain", *inputs)
    for index, (g, n, t) in enumerate(zip(run(None, "cuda", *inputs), run(None, "plain", *inputs), truth, strict=True)):
        assert_within_bound(g, n, t, factor=GRADIENT_FACTOR if index > 1 else 2.0)


def test_the_gradient_of_the_sum_may_be_missing(emulated):
    x, residual, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((5, 16), (5, 16), (16,), (16,)))
    grads = []
    for backend in ("cuda", "reference"):
        _, normed = ops.dropout_add_layer_norm(x, residual, weight, bias, backend=backend)
        grads.append(torch.autograd.grad(normed.square().sum(), (x, residual, weight, bias)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_aligned_are_copied_first(emulated):
    x, residual = torch.randn(2, 4, 33)[..., 1:]
    weight, bias = torch.randn(2, 32)
    got = ops.dropout_add_layer_norm(x, residual, weight, bias, backend="cuda")
    torch.testing.assert_close(got, ops.dropout_add_layer_norm(x, residual, weight, bias, backend="reference"))


def test_what_the_bindings_of_rows_are_given_is_checked(emulated):
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="multiple of 8"):
        emulated.module.bias_gelu_forward(x.data_ptr(), x.data_ptr(), x.data_ptr(), (2, 12, 1, 0, 0), 0)
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        emulated.module.bias_gelu_forward(x.data_ptr() + 4, x.data_ptr(), x.data_ptr(), (2, 16, 1, 0, 0), 0)
