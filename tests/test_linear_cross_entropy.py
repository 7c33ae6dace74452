"""linear_cross_entropy: every backend against F.cross_entropy of the logits, and what the door refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops.linear_cross_entropy import Case, backend_torch
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound


def case(n, dtype=torch.float32, weight_dtype=None):
    return Case("cpu", dtype, weight_dtype or dtype, n)


def inputs(rows, n, vocab, dtype=torch.float32, weight_dtype=None, size=1.0):
    torch.manual_seed(0)
    x = (torch.randn(*rows, n) * size).to(dtype)
    weight = torch.randn(vocab, n).to(weight_dtype or dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, rows)


def results(tensors, backend, dtype=None, scale=1.0, ignore_index=-100):
    """Loss and the gradients of `scale` times it; `dtype` computes in a wider one."""
    x, weight, targets = tensors
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight)]
    loss = ops.linear_cross_entropy(*leaves, targets, ignore_index, backend=backend)
    return [loss, *torch.autograd.grad(loss * scale, leaves)]


def check(tensors, backend, **options):
    got = results(tensors, backend, **options)
    naive = results(tensors, "reference", **options)
    truth = results(tensors, "reference", torch.float64, **options)
    for index in range(3):
        assert_within_bound(got[index], naive[index], truth[index], factor=GRADIENT_FACTOR if index else 2.0)


@pytest.mark.parametrize(("rows", "n", "vocab"), [
    ((1,), 1, 1), ((1,), 8, 2), ((5,), 7, 3), ((3, 5), 16, 17), ((9,), 33, 65), ((70,), 64, 257), ((2, 65), 48, 1000),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_within_the_bound(any_backend, rows, n, vocab, dtype):
    backend = any_backend("linear_cross_entropy", case(n, dtype))
    check(inputs(rows, n, vocab, dtype, size=n**-0.5), backend)


def test_many_chunks_are_within_the_bound(any_backend):
    backend = any_backend("linear_cross_entropy", case(24))
    # The whole vocabulary of GPT-2: several chunks of rows, the last one shorter.
    check(inputs((1100,), 24, 50257, size=0.3), backend)


def test_float32_weights_serve_a_bfloat16_input(any_backend):
    backend = any_backend("linear_cross_entropy", case(48, torch.bfloat16, torch.float32))
    check(inputs((40,), 48, 300, torch.bfloat16, torch.float32, size=0.2), backend)


def test_a_scaled_loss_scales_the_gradients(any_backend):
    backend = any_backend("linear_cross_entropy", case(16))
    check(inputs((33,), 16, 50, size=0.5), backend, scale=-2.5)


@pytest.mark.parametrize("ignore_index", [-100, 3, 10**6])
def test_ignored_rows_count_for_nothing(any_backend, ignore_index):
    backend = any_backend("linear_cross_entropy", case(16))
    x, weight, targets = inputs((33,), 16, 50, size=0.5)
    targets[::3] = ignore_index
    check((x, weight, targets), backend, ignore_index=ignore_index)
    dx = results((x, weight, targets), backend, ignore_index=ignore_index)[1]
    assert not dx[::3].any() and dx[1].any()


def test_nothing_but_ignored_rows_gives_nan_and_zero_gradients(any_backend):
    backend = any_backend("linear_cross_entropy", case(16))
    x, weight, targets = inputs((9,), 16, 50)
    loss, dx, dweight = results((x, weight, torch.full_like(targets, -100)), backend)
    assert loss.isnan() and not dx.any() and not dweight.any()


def test_no_rows_give_nan_and_zero_gradients(any_backend):
    backend = any_backend("linear_cross_entropy", case(16))
    loss, dx, dweight = results(inputs((0, 4), 16, 50), backend)
    assert loss.isnan() and dx.shape == (0, 4, 16) and not dweight.any()


def test_extreme_logits_stay_finite(any_backend):
    backend = any_backend("linear_cross_entropy", case(16))
    check(inputs((20,), 16, 50, size=3e3), backend)


def test_nan_in_a_row_reaches_the_loss(any_backend):
    backend = any_backend("linear_cross_entropy", case(16))
    x, weight, targets = inputs((20,), 16, 50)
    x.data[3, 2] = torch.nan
    loss, dx, _ = results((x, weight, targets), backend)
    assert loss.isnan() and dx[3].isnan().all() and not dx[[0, 2, 4, 19]].isnan().any()


def test_an_infinite_logit_against_the_target_gives_an_infinite_loss(any_backend):
    backend = any_backend("linear_cross_entropy", case(1))
    weight = torch.tensor([[1.0], [-torch.inf], [2.0]])
    loss = ops.linear_cross_entropy(torch.ones(2, 1), weight, torch.tensor([1, 0]), backend=backend)
    assert loss == torch.inf


def test_tensors_with_strides_give_the_same_values(any_backend):
    backend = any_backend("linear_cross_entropy", case(16))
    x, weight, targets = inputs((6, 10), 16, 50, size=0.5)
    want = results((x, weight, targets), backend)
    wide = torch.full((6, 10, 40), torch.nan)
    wide[..., :16] = x.detach()
    got = results((wide[..., :16], weight.detach().t().contiguous().t(), targets.t().contiguous().t()), backend)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    got = results((x.detach().transpose(0, 1).contiguous().transpose(0, 1), weight, targets), backend)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_a_second_backward_gives_the_same_gradients(any_backend):
    backend = any_backend("linear_cross_entropy", case(16))
    x, weight, targets = inputs((33,), 16, 50, size=0.5)
    loss = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    first = torch.autograd.grad(loss * 3, (x, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, (x, weight)), first, rtol=0, atol=0)


@pytest.mark.parametrize("trained", [0, 1], ids=["x", "weight"])
def test_one_gradient_alone_may_be_asked_for(any_backend, trained):
    backend = any_backend("linear_cross_entropy", case(16))
    x, weight, targets = inputs((33,), 16, 50, size=0.5)
    want = results((x, weight, targets), "reference")[1 + trained]
    (weight, x)[trained].requires_grad_(False)
    leaf = (x, weight)[trained]
    got = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets, backend=backend), leaf)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_without_gradients_the_loss_is_the_same(any_backend):
    backend = any_backend("linear_cross_entropy", case(16))
    tensors = inputs((33,), 16, 50)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(*tensors, backend=backend)
    torch.testing.assert_close(loss, results(tensors, "reference")[0], rtol=1e-6, atol=0)


def test_the_gradient_of_the_head_becomes_its_grad_without_a_copy(monkeypatch):
    handed = []
    forward = backend_torch.forward
    monkeypatch.setattr(backend_torch, "forward", lambda *a: handed.append((out := forward(*a))[2].data_ptr()) or out)
    x, weight, targets = inputs((33,), 16, 50)
    ops.linear_cross_entropy(x, weight, targets, backend="torch").backward()
    assert weight.grad.data_ptr() == handed[0]


def test_no_tensor_holds_the_logits_of_all_rows(monkeypatch):
    seen = []
    log_softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, *a, **k: seen.append(len(x)) or log_softmax(x, *a, **k))
    monkeypatch.setitem(backend_torch.CHUNK_ELEMENTS, "cpu", 64 * 1000)
    check(inputs((300,), 8, 1000), "torch")
    assert max(seen) == 64 and sum(seen) == 300


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_under_autocast_products_are_rounded_and_the_loss_is_not(backend):
    x, weight, targets = inputs((33,), 16, 50)
    # What PyTorch does there: products of bfloat16, then a float32 loss.
    with torch.autocast("cpu", torch.bfloat16):
        naive = F.cross_entropy(F.linear(x, weight), targets)
        naive_grads = torch.autograd.grad(naive, (x, weight))
        got = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    grads = torch.autograd.grad(got, (x, weight))
    truth = F.cross_entropy(x.double() @ weight.double().t(), targets)
    true_grads = torch.autograd.grad(truth, (x, weight))
    assert got.dtype == torch.float32
    assert_within_bound(got, naive, truth, floor=2e-4)
    for grad, plain, true in zip(grads, naive_grads, true_grads, strict=True):
        assert grad.dtype == torch.float32
        assert_within_bound(grad, plain, true, factor=GRADIENT_FACTOR)


def test_float64_passes_gradcheck():
    x, weight, targets = inputs((3, 2), 5, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: ops.linear_cross_entropy(*a, targets), (x, weight))


def test_the_loss_has_the_dtype_of_pytorchs(any_backend):
    backend = any_backend("linear_cross_entropy", case(16, torch.bfloat16))
    x, weight, targets = inputs((9,), 16, 50, torch.bfloat16)
    loss = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    assert loss.dtype == F.cross_entropy(x @ weight.t(), targets).dtype


@pytest.mark.parametrize("bad", [-1, 50, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_a_target_outside_the_vocabulary_is_named_with_its_place(bad, backend):
    x, weight, targets = inputs((3, 11), 16, 50)
    targets[1, 4] = bad
    with pytest.raises(IndexError, match=f"target {bad} .number 15 of 33. is outside the vocabulary, 0 to 49"):
        ops.linear_cross_entropy(x, weight, targets, backend=backend)


def test_the_registered_op_passes_opcheck():
    x, weight, targets = inputs((33,), 16, 50)
    op = torch.ops.fastgpt.linear_cross_entropy.default
    torch.library.opcheck(op, (x, weight, targets, -100, True, True, None))


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_torch_compile_sees_one_graph_and_the_same_gradients(backend):
    x, weight, targets = inputs((3, 11), 16, 50)
    function = lambda *a: ops.linear_cross_entropy(*a, backend=backend).sin()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight, targets), (x, weight))
    want = torch.autograd.grad(function(x, weight, targets), (x, weight))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, w, t: (x, w[:, :5], t), "x must be"),
        (lambda x, w, t: (x, w, t[:2]), "targets"),
        (lambda x, w, t: (x, w[:0], t), "vocabulary is empty"),
        (lambda x, w, t: (x, w.bfloat16(), t), "of its dtype or torch.float32"),
        (lambda x, w, t: (x, w, t.int()), "use targets.long"),
        (lambda x, w, t: (x, w.to("meta"), t), "move all to one device"),
    ],
)
def test_a_bad_input_is_refused_with_what_is_wanted(change, text):
    with pytest.raises(ValueError, match=text):
        ops.linear_cross_entropy(*change(*inputs((3,), 16, 50)))
