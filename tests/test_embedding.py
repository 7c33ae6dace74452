"""embedding: every backend against the plain formula with the same mask, and what the door refuses."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import philox
from fastgpt.ops.embedding import Case, reference
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

VOCAB, CONTEXT = 20, 12


def case(n, dtype=torch.float32, ids_dtype=torch.int64, dropout=False):
    return Case("cpu", dtype, ids_dtype, n, dropout)


def inputs(batch, n_tokens, n, dtype=torch.float32, ids_dtype=torch.int64, vocab=VOCAB, context=CONTEXT):
    torch.manual_seed(0)
    ids = torch.randint(vocab, (batch, n_tokens), dtype=ids_dtype)
    weight, position = torch.randn(vocab, n).to(dtype), torch.randn(context, n).to(dtype)
    return ids, weight.requires_grad_(), position.requires_grad_()


def ours(backend, dropout_p=0.0):
    def run(*leaves):
        torch.manual_seed(7)
        return ops.embedding(*leaves, dropout_p=dropout_p, backend=backend)

    return run


def plain(dropout_p=0.0):
    torch.manual_seed(7)
    seed = philox.draw_seed()
    return lambda *leaves: reference.apply(*leaves, dropout_p, seed=seed)


def results(function, tensors, dout, dtype=None):
    """Output and the two gradients; `dtype` computes in a wider one."""
    ids, *weights = tensors
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in weights]
    out = function(ids, *leaves)
    return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def check(tensors, backend, dropout_p=0.0):
    ids, weight, _ = tensors
    dout = torch.randn(*ids.shape, weight.shape[1]).to(weight.dtype)
    got = results(ours(backend, dropout_p), tensors, dout)
    naive = results(plain(dropout_p), tensors, dout)
    truth = results(plain(dropout_p), tensors, dout, torch.float64)
    for index in range(3):
        assert_within_bound(got[index], naive[index], truth[index], factor=GRADIENT_FACTOR if index else 2.0)


@pytest.mark.parametrize("n", [1, 3, 7, 8, 9, 16, 17, 63, 65, 129, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_output_and_gradients_are_within_the_bound(op_backend, n, dtype, dropout_p):
    backend = op_backend("embedding", case(n, dtype, dropout=dropout_p > 0))
    check(inputs(3, 11, n, dtype), backend, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_batch_that_threads_share_is_within_the_bound(op_backend, dropout_p):
    backend = op_backend("embedding", case(768, dropout=dropout_p > 0))
    check(inputs(4, 64, 768, vocab=300, context=64), backend, dropout_p)


def test_a_token_seen_a_thousand_times_keeps_its_digits(op_backend):
    backend = op_backend("embedding", case(64))
    check(inputs(32, 128, 64, vocab=2, context=128), backend)


def test_int32_ids_give_the_same_values(op_backend):
    backend = op_backend("embedding", case(20, ids_dtype=torch.int32))
    check(inputs(3, 11, 20, ids_dtype=torch.int32), backend)


def test_pytorchs_own_ops_are_within_the_bound():
    check(inputs(3, 11, 20), "torch")


def test_the_mask_is_the_one_that_philox_draws(op_backend):
    backend = op_backend("embedding", case(300, dropout=True))
    out = ours(backend, 0.4)(torch.zeros(7, 10, dtype=torch.int64), torch.ones(4, 300), torch.ones(10, 300))
    torch.manual_seed(7)
    keep = philox.keep_rows(70, 300, 0.4, philox.draw_seed()).to(out.device)
    assert torch.equal(out != 0, keep.view(7, 10, 300))


def test_rows_that_nothing_used_have_gradient_zero(any_backend):
    backend = any_backend("embedding", case(20))
    _, weight, position = inputs(1, 1, 20)
    ours(backend)(torch.tensor([[4, 4, 9]]), weight, position).sum().backward()
    want = torch.zeros(VOCAB)
    want[4], want[9] = 2, 1
    assert torch.equal(weight.grad, want[:, None].expand(-1, 20))
    assert torch.equal(position.grad[:, 0], torch.tensor([1.0] * 3 + [0.0] * (CONTEXT - 3)))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(any_backend, shape):
    backend = any_backend("embedding", case(20))
    ids, weight, position = inputs(*shape, 20)
    out = ours(backend)(ids, weight, position)
    assert out.shape == (*shape, 20)
    out.sum().backward()
    assert not weight.grad.any() and not position.grad.any()


def test_transposed_tensors_give_the_same_values(op_backend):
    backend = op_backend("embedding", case(20, dropout=True))
    ids, weight, position = inputs(3, 11, 20)
    others = (ids.t().contiguous().t(), *(w.detach().t().contiguous().t().requires_grad_() for w in (weight, position)))
    dout = torch.randn(11, 3, 20).transpose(0, 1)
    got, want = (results(ours(backend, 0.3), tensors, dout) for tensors in (others, (ids, weight, position)))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_only_one_of_the_weights_may_be_trained(any_backend):
    backend = any_backend("embedding", case(20))
    ids, weight, position = inputs(3, 11, 20)
    ours(backend)(ids, weight.detach(), position).sum().backward()
    assert weight.grad is None and torch.equal(position.grad[:11], torch.full((11, 20), 3.0))


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31 - 1])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(bad, backend):
    ids, weight, position = inputs(3, 11, 20)
    ids[1, 4] = bad
    if ops.embedding.__globals__["OP"].why_not(backend, case(20)):
        pytest.skip(f"embedding has no {backend} backend")
    with pytest.raises(
        IndexError, match=f"Token id {bad} at row 1, position 4 is outside the vocabulary, 0 to {VOCAB - 1}"
    ):
        ops.embedding(ids, weight, position, backend=backend)


def test_the_reference_drops_as_the_book_does():
    ids, weight, position = (t.detach() for t in inputs(3, 11, 20))
    torch.manual_seed(3)
    out = ops.embedding(ids, weight, position, dropout_p=0.5, backend="reference")
    torch.manual_seed(3)
    assert torch.equal(out, torch.nn.Dropout(0.5)(weight[ids] + position[:11]))


def test_float64_passes_gradcheck():
    ids, weight, position = inputs(2, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda *w: ops.embedding(ids, *w), (weight, position))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_registered_op_passes_opcheck(dropout_p):
    seed = torch.tensor(5) if dropout_p else None
    torch.library.opcheck(torch.ops.fastgpt.embedding.default, (*inputs(3, 11, 20), seed, dropout_p, None))


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_torch_compile_sees_one_graph_and_the_kernels_own_gradients(backend, dropout_p):
    ids, *weights = inputs(3, 11, 20)

    def function(*leaves):
        return ops.embedding(*leaves, dropout_p=dropout_p, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    got = torch.autograd.grad(compiled(ids, *weights).sin().sum(), weights)
    want = torch.autograd.grad(plain(dropout_p)(ids, *weights).sin().sum(), weights)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda i, w, p: (i[0], w, p), "ids must be"),
        (lambda i, w, p: (i, w, p[:, :5]), "position_weight"),
        (lambda i, w, p: (i, w, p[:5]), "11 tokens, but position_weight has 5 positions"),
        (lambda i, w, p: (i.float(), w, p), "torch.int64 or torch.int32"),
        (lambda i, w, p: (i, w.bfloat16(), p), "one floating-point dtype"),
        (lambda i, w, p: (i, w.to("meta"), p), "move all to one device"),
    ],
)
def test_a_bad_input_is_refused_with_what_is_wanted(change, text):
    with pytest.raises(ValueError, match=text):
        ops.embedding(*change(*inputs(3, 11, 20)))


def test_the_gradient_of_a_vocabulary_beyond_the_cache_is_zero_where_no_token_is(isa):
    # 66,000 rows of 129: above the size from which zeros are streamed, and no row begins at a whole vector.
    ids = torch.tensor([[0, 65999, 7], [7, 65998, 30000]])
    weight, position = torch.zeros(66000, 129, requires_grad=True), torch.zeros(3, 129, requires_grad=True)
    dout = torch.randn(2, 3, 129)
    got, _ = torch.autograd.grad(ops.embedding(ids, weight, position, backend="cpu"), (weight, position), dout)
    want = torch.zeros(66000, 129).index_add_(0, ids.flatten(), dout.flatten(0, 1))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
