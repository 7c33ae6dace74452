"""The CUDA kernels of layer_norm and gelu in the emulator of a thread block, and what the emulator catches."""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch
from cuda_emulation import HOST, as_cuda_backend, compiled, emulate

from fastgpt import ops
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

NONE, NO_WAIT, NO_BARRIER, OVERWRITE, STRAY_LANE, DEADLOCK, OUTSIDE, NOT_WAITED_FOR = range(8)
ROOMS = [importlib.import_module(f"fastgpt.ops.{name}").OP for name in ("layer_norm", "gelu")]


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
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 33), (9, 768)], ids=str)
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
