"""The Triton backends of the ops on rows through their doors, under torch.compile, and at their edges."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops.attention import Case as AttentionCase
from fastgpt.ops.dropout_add_layer_norm import Case as NormCase
from fastgpt.ops.embedding import OP as EMBEDDING
from fastgpt.ops.embedding import Case as EmbeddingCase
from fastgpt.ops.gelu import Case as GeluCase
from fastgpt.ops.layer_norm import Case as LayerNormCase
from fastgpt.ops.linear_cross_entropy import OP as LOSS
from fastgpt.ops.linear_cross_entropy import Case as LossCase
from fastgpt.ops.linear_cross_entropy import gpu_chunks

pytestmark = pytest.mark.parametrize("op_backend", ["triton"], indirect=True)
F32 = torch.float32


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def norm(op_backend):
    op_backend("dropout_add_layer_norm", NormCase("cpu", F32, F32, 20, True))
    op = torch.ops.fastgpt.dropout_add_layer_norm.default
    inputs = leaf(3, 20), leaf(3, 20), leaf(20), leaf(20)
    door = lambda *a: ops.dropout_add_layer_norm(*a, dropout_p=0.3, backend="triton")  # noqa: E731
    return op, (*inputs, torch.tensor(5, device="cpu"), 0.3, 1e-5, "triton"), door, inputs


def layer_norm(op_backend):
    op_backend("layer_norm", LayerNormCase("cpu", F32, F32, 20))
    inputs = leaf(3, 20), leaf(20), leaf(20)
    door = lambda *a: (ops.layer_norm(*a, backend="triton"),)  # noqa: E731
    return torch.ops.fastgpt.layer_norm.default, (*inputs, 1e-5, "triton"), door, inputs


def packed(op_backend):
    op_backend("packed_causal_attention", AttentionCase("cpu", F32, 16, True, True, True))
    inputs = (leaf(1, 5, 3, 1, 16),)
    door = lambda *a: (ops.packed_causal_attention(*a, dropout_p=0.3, backend="triton"),)  # noqa: E731
    settings = torch.tensor(5, device="cpu"), 0.25, 0.3, "triton"
    return torch.ops.fastgpt.packed_causal_attention.default, (*inputs, *settings), door, inputs


def gelu(op_backend):
    op_backend("gelu", GeluCase("cpu", F32, F32))
    inputs = leaf(3, 20), leaf(20)
    door = lambda *a: (ops.gelu(*a, backend="triton"),)  # noqa: E731
    return torch.ops.fastgpt.gelu.default, (*inputs, "triton"), door, inputs


def embedding(op_backend):
    op_backend("embedding", EmbeddingCase("cpu", F32, torch.int64, 20, True))
    ids, weights = torch.randint(50, (3, 11)), (leaf(50, 20), leaf(12, 20))
    door = lambda *a: (ops.embedding(ids, *a, dropout_p=0.3, backend="triton"),)  # noqa: E731
    settings = torch.tensor(5, device="cpu"), 0.3, "triton"
    return torch.ops.fastgpt.embedding.default, (ids, *weights, *settings), door, weights


def loss(op_backend):
    op_backend("linear_cross_entropy", LossCase("cpu", F32, F32, 16))
    targets, inputs = torch.randint(50, (9,)), (leaf(9, 16), leaf(50, 16))
    door = lambda *a: (ops.linear_cross_entropy(*a, targets, backend="triton"),)  # noqa: E731
    op = torch.ops.fastgpt.linear_cross_entropy.default
    return op, (*inputs, targets, -100, True, True, "triton"), door, inputs


ROOMS = pytest.mark.parametrize("make", [norm, layer_norm, gelu, embedding, loss, packed], ids=lambda f: f.__name__)


@ROOMS
def test_the_registered_op_passes_opcheck(op_backend, make):
    op, arguments, _, _ = make(op_backend)
    torch.library.opcheck(op, arguments)


@ROOMS
def test_torch_compile_sees_one_graph_and_the_same_gradients(op_backend, make):
    _, _, door, inputs = make(op_backend)
    results = []
    for function in (door, torch.compile(door, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        outs = function(*inputs)
        results.append((*outs, *torch.autograd.grad(sum(out.sin().sum() for out in outs), inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@ROOMS
def test_two_runs_give_the_same_bits(op_backend, make):
    _, _, door, inputs = make(op_backend)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(torch.autograd.grad(sum(out.sin().sum() for out in door(*inputs)), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_id_outside_the_vocabulary_gives_a_row_of_nan_and_no_gradient(op_backend):
    backend = op_backend("embedding", EmbeddingCase("cpu", F32, torch.int64, 20, False))
    room = EMBEDDING.module(backend)
    ids = torch.tensor([[1, 50, -1, 3]])
    out = room.forward(ids, torch.randn(50, 20), torch.randn(12, 20), 0.0, 0)
    assert out[0, 1:3].isnan().all() and not out[0, [0, 3]].isnan().any()
    dweight, _ = room.backward(torch.ones(1, 4, 20), ids, 50, 12, 0.0, 0)
    assert dweight.sum() == 40 and dweight[[1, 3]].eq(1).all()


@pytest.mark.parametrize("rounded_chunks", [1, 100], ids=["wide", "rounded"])
def test_chunks_of_rows_give_the_gradients_of_one(op_backend, rounded_chunks, monkeypatch):
    backend = op_backend("linear_cross_entropy", LossCase("cpu", F32, F32, 16))
    room = LOSS.module(backend)
    x, weight, targets = torch.randn(70, 16), torch.randn(100, 16), torch.randint(100, (70,))
    want = room.forward(x, weight, targets, -100, True, True)
    monkeypatch.setattr(gpu_chunks, "CHUNK_ROWS", 32)
    monkeypatch.setattr(gpu_chunks, "MAX_ROUNDED_CHUNKS", rounded_chunks)
    got = room.forward(x, weight, targets, -100, True, True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    got = room.forward(x.half(), weight.half(), targets, -100, True, True)
    torch.testing.assert_close(got[2].float(), want[2], rtol=2e-2, atol=2e-4)


def test_a_target_outside_the_vocabulary_gives_a_loss_of_nan(op_backend):
    backend = op_backend("linear_cross_entropy", LossCase("cpu", F32, F32, 16))
    room = LOSS.module(backend)
    for bad in (-1, 100, 127, 2**62):
        loss, *_ = room.forward(torch.randn(3, 16), torch.randn(100, 16), torch.tensor([4, bad, 5]), -100, True, True)
        assert loss.isnan()


def test_programs_that_take_several_groups_of_rows_sum_all_of_them(op_backend):
    op_backend("gelu", GeluCase("cpu", F32, F32))
    x, residual, weight, bias = leaf(600, 40), leaf(600, 40), leaf(40), leaf(40)
    grads = []
    for backend in ("triton", "reference"):
        total, normed = ops.dropout_add_layer_norm(x, residual, weight, bias, backend=backend)
        biased = ops.gelu(x, bias, backend=backend)
        outs = total.sin().sum() + normed.sin().sum() + biased.sin().sum()
        grads.append(torch.autograd.grad(outs, (x, residual, weight, bias)))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
