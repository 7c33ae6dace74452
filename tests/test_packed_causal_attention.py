"""packed_causal_attention: the numbers of causal_attention, and one packed gradient."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops.packed_causal_attention import OP, split
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

SHAPES = [(2, 7, 3, 3, 16), (1, 1, 3, 2, 8), (2, 65, 3, 2, 64), (1, 33, 3, 1, 6), (1, 20, 3, 4, 80)]


def made(shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=dtype)


def run(qkv, dout, backend, dtype=None, p=0.0):
    leaf = qkv.detach().to(dtype or qkv.dtype).requires_grad_()
    out = ops.packed_causal_attention(leaf, dropout_p=p, backend=backend)
    return out, *torch.autograd.grad(out, leaf, dout.to(out.dtype))


def case(qkv, p=0.0):
    return ops.packed_causal_attention.__globals__["_case"](qkv, p, True)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradient_are_within_the_bound(op_backend, shape):
    qkv, dout = made(shape), made((*shape[:2], *shape[3:]), seed=1)
    backend = op_backend("packed_causal_attention", case(qkv))
    got = run(qkv, dout, backend)
    naive, truth = run(qkv, dout, "reference"), run(qkv, dout, "reference", torch.float64)
    assert_within_bound(got[0], naive[0], truth[0])
    assert_within_bound(got[1], naive[1], truth[1], factor=GRADIENT_FACTOR)
    assert got[0].is_contiguous() and got[1].is_contiguous()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_that_of_the_unpacked_op(op_backend, p):
    qkv, dout = made((2, 21, 3, 2, 16)), made((2, 21, 2, 16), seed=1)
    backend = op_backend("packed_causal_attention", case(qkv, p))
    torch.manual_seed(5)
    got = run(qkv, dout, backend, p=p)
    torch.manual_seed(5)
    leaf = qkv.detach().requires_grad_()
    out = ops.causal_attention(*split(leaf), dropout_p=p, backend=backend).transpose(1, 2)
    torch.testing.assert_close(got, (out, *torch.autograd.grad(out, leaf, dout)), rtol=1e-6, atol=1e-6)


def test_views_into_a_wider_tensor_are_read_where_they_are(op_backend):
    wide = made((2, 9, 3, 2, 24))
    qkv = wide[..., 4:20]
    backend = op_backend("packed_causal_attention", case(qkv))
    torch.testing.assert_close(
        ops.packed_causal_attention(qkv, backend=backend),
        ops.packed_causal_attention(qkv.contiguous(), backend=backend),
        rtol=0,
        atol=1e-6,
    )


def test_an_empty_batch_gives_an_empty_output_and_gradient(op_backend):
    qkv = made((0, 5, 3, 2, 8)).requires_grad_()
    backend = op_backend("packed_causal_attention", case(qkv))
    out = ops.packed_causal_attention(qkv, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 5, 2, 8) and qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_registered_op_passes_opcheck_and_compiles_whole(backend):
    qkv = made((2, 6, 3, 2, 8)).requires_grad_()
    torch.library.opcheck(torch.ops.fastgpt.packed_causal_attention.default, (qkv, torch.tensor(3), 0.3, 0.25, backend))
    compiled = torch.compile(
        lambda x: ops.packed_causal_attention(x, backend=backend), fullgraph=True, backend="aot_eager"
    )
    got = torch.autograd.grad(compiled(qkv).square().sum(), qkv)
    want = torch.autograd.grad(ops.packed_causal_attention(qkv, backend=backend).square().sum(), qkv)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_float64_passes_gradcheck():
    qkv = made((1, 4, 3, 2, 3), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ops.packed_causal_attention, qkv)


def test_another_layout_is_refused_with_the_wanted_one():
    with pytest.raises(ValueError, match=r"\(batch, n_tokens, 3, n_heads, head_dim\).*got \(2, 5, 2, 4, 8\)"):
        ops.packed_causal_attention(torch.zeros(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match="floating point"):
        ops.packed_causal_attention(torch.zeros(2, 5, 3, 4, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 to 1"):
        ops.packed_causal_attention(torch.zeros(2, 5, 3, 4, 8), dropout_p=1.5)


def test_every_backend_names_why_it_cannot():
    reason = OP.why_not("cpu", case(torch.zeros(1, 2, 3, 1, 300)))
    assert reason is not None and "head_dim" in reason
