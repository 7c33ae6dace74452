"""The head and the loss in CUDA C++, in the emulator of a thread block: chunks, padding, ignored rows, dtypes."""

from __future__ import annotations

import importlib

import pytest
import torch
from cuda_emulation import as_cuda_backend, emulate

from fastgpt import ops
from fastgpt.ops.linear_cross_entropy import gpu_chunks
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

ROOM = importlib.import_module("fastgpt.ops.linear_cross_entropy")


@pytest.fixture(scope="module", autouse=True)
def emulated():
    emulated = emulate()
    with as_cuda_backend(emulated, ROOM.OP):
        yield emulated


def run(x, weight, targets, backend, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight)]
    loss = ops.linear_cross_entropy(*leaves, targets, backend=backend)
    return loss, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "chunk"), [(1, 1, 8), (5, 64, 8), (9, 67, 4), (3, 4500, 8)])
def test_loss_and_gradients_are_within_the_bound(emulated, monkeypatch, rows, vocab, chunk, dtype):
    monkeypatch.setattr(gpu_chunks, "CHUNK_ROWS", chunk)
    torch.manual_seed(rows)
    emulated.order(vocab)
    x, weight = torch.randn(rows, 16).to(dtype), torch.randn(vocab, 16).to(dtype)
    targets = torch.randint(vocab, (rows,))
    targets[: rows // 3] = -100
    got, naive = run(x, weight, targets, "cuda"), run(x, weight, targets, "reference")
    truth = run(x, weight, targets, "reference", torch.float64)
    for i, (g, n, t) in enumerate(zip(got, naive, truth, strict=True)):
        assert_within_bound(g, n, t, factor=GRADIENT_FACTOR if i else 2.0)


def test_a_loss_without_any_target_is_nan_and_its_gradient_zero():
    x, weight = torch.randn(3, 16), torch.randn(67, 16)
    loss, dx, dweight = run(x, weight, torch.full((3,), -100), "cuda")
    assert loss.isnan() and not dx.any() and not dweight.any()


def test_large_logits_and_those_of_minus_infinity_count_as_in_pytorch(emulated):
    logits = torch.randn(4, 72) * 1e4
    logits[1, :9] = -torch.inf
    logits[2, :] = -torch.inf
    logits[3, 5] = torch.nan
    logits[0, 67:] = torch.nan
    targets, losses = torch.tensor([3, 20, 4, 5]), torch.empty(4)
    want = torch.nn.functional.cross_entropy(logits[:, :67], targets, reduction="none")
    arguments = [t.data_ptr() for t in (losses, logits, targets, torch.tensor([4]))]
    emulated.module.cross_entropy(*arguments, 4, 72, 67, -100, True, 0, 0)
    torch.testing.assert_close(losses, want, equal_nan=True)
    assert not logits[:, 67:].any()


def test_a_target_outside_the_vocabulary_gives_nan_and_reads_nothing(emulated):
    logits, targets, losses = torch.randn(2, 8), torch.tensor([8, -1]), torch.empty(2)
    arguments = [t.data_ptr() for t in (losses, logits, targets, torch.tensor([2]))]
    emulated.module.cross_entropy(*arguments, 2, 8, 8, -100, False, 0, 0)
    assert losses.isnan().all()
    with pytest.raises(ValueError, match="multiple of 8"):
        emulated.module.cross_entropy(*arguments, 2, 7, 7, -100, False, 0, 0)
