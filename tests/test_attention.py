"""causal_attention: every backend against the plain formula, and what the door refuses."""

from __future__ import annotations

import math

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import extension, philox
from fastgpt.ops.attention import Case, backend_cpu, reference
from fastgpt.testing import FLOORS, GRADIENT_FACTOR, assert_within_bound

# The CPU kernel works on tiles of 32, 48 or 64 queries and 64 keys.
LENGTHS = [1, 2, 3, 7, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 97, 128, 129]
UNEQUAL_LENGTHS = [(1, 2), (1, 65), (3, 130), (48, 64), (49, 50), (60, 64), (63, 127), (70, 200)]
HEAD_DIMS = [1, 2, 3, 4, 6, 8, 9, 12, 16, 17, 24, 40, 64, 65, 80, 96, 128, 160, 255, 256]
DTYPES = [torch.float32, torch.bfloat16]
SEED = 7


def case(dtype=torch.float32, head_dim=64, square=True, dropout=False, grad=True):
    return Case("cpu", dtype, head_dim, square, dropout, grad)


def inputs(batch, n_heads, q_len, k_len, head_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    device = torch.empty(0).device
    shapes = [(batch, n_heads, length, head_dim) for length in (q_len, k_len, k_len)]
    return [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes]


def run(tensors, dout, backend, dropout_p=0.0, scale=None, dtype=None):
    """Output and gradients on one backend, in a wider dtype if given. "naive": the plain formula, the kernels' mask."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    torch.manual_seed(SEED)
    if backend == "naive":
        seed = philox.draw_seed() if dropout_p else None
        out = reference.apply(*leaves, scale or leaves[0].shape[-1] ** -0.5, dropout_p, seed=seed)
    else:
        out = ops.causal_attention(*leaves, softmax_scale=scale, dropout_p=dropout_p, backend=backend)
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def terms(tensors, dout, scale):
    """How far dq and dk of a row may be off where it sees few keys: they come from dout·v - dout·out, whose digits then
    cancel, so that what remains is the rounding of sums of this size."""
    q, k, v = (t.abs().double() for t in tensors)
    products = (dout.abs().double() @ v.transpose(2, 3)).max() * (scale or q.shape[-1] ** -0.5)
    return FLOORS[dout.dtype] * max(1.0, (products * torch.maximum(q.max(), k.max())).item())


def check(tensors, backend, dropout_p=0.0, scale=None, gradient_floor=None):
    dout = torch.randn_like(tensors[0])
    got = run(tensors, dout, backend, dropout_p, scale)
    naive = run(tensors, dout, "naive", dropout_p, scale)
    truth = run(tensors, dout, "naive", dropout_p, scale, torch.float64)
    assert_within_bound(got[0], naive[0], truth[0])
    floor = gradient_floor or terms(tensors, dout, scale) if dout.dtype == torch.float32 else None
    for index, allowed in ((1, floor), (2, floor), (3, gradient_floor)):
        assert_within_bound(got[index], naive[index], truth[index], factor=GRADIENT_FACTOR, floor=allowed)


# ---- values ----


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length_is_within_the_bound(op_backend, length, dtype):
    check(inputs(2, 3, length, length, 64, dtype), op_backend("attention", case(dtype)))


@pytest.mark.parametrize(("q_len", "k_len"), UNEQUAL_LENGTHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_fewer_queries_than_keys_see_all_earlier_keys(op_backend, q_len, k_len, dropout_p):
    backend = op_backend("attention", case(square=False, dropout=dropout_p > 0))
    check(inputs(2, 2, q_len, k_len, 16), backend, dropout_p)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim_is_within_the_bound(op_backend, head_dim, dtype):
    check(inputs(1, 2, 67, 67, head_dim, dtype), op_backend("attention", case(dtype, head_dim)))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_gives_output_and_gradients_of_the_same_mask(op_backend, dtype, dropout_p):
    check(inputs(2, 3, 150, 150, 64, dtype), op_backend("attention", case(dtype, dropout=True)), dropout_p)


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0, 1e-3])
def test_any_softmax_scale_is_taken(op_backend, scale):
    tensors = inputs(1, 2, 70, 70, 16)
    dout = torch.randn_like(tensors[0])
    backend = op_backend("attention", case(head_dim=16))
    leaves = [t.requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out = ops.causal_attention(*leaves, softmax_scale=scale, backend=backend)
    truth = reference.apply(*wide, scale)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-6)
    for got, want in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(truth, wide, dout.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow(op_backend):
    q, k, v = inputs(1, 2, 80, 80, 16)
    # Scores of about ± 1e4. lse is float32, whose numbers lie 1e-3 apart there, hence weights are known to 1e-3.
    check([q * 100, k * 100, v], op_backend("attention", case(head_dim=16)), gradient_floor=1e-3 * 1e2)


def test_equal_scores_give_the_mean_of_the_values_seen(op_backend):
    _, k, v = inputs(1, 2, 90, 90, 16)
    out = ops.causal_attention(
        torch.zeros_like(k), k, v, backend=op_backend("attention", case(head_dim=16, grad=False))
    )
    mean = v.double().cumsum(2) / torch.arange(1, 91)[:, None]
    torch.testing.assert_close(out.double(), mean, rtol=0, atol=1e-6)


def test_later_keys_and_values_change_nothing(op_backend):
    backend = op_backend("attention", case(grad=False))
    q, k, v = inputs(1, 2, 130, 130, 64)
    out = ops.causal_attention(q, k, v, backend=backend)
    k[:, :, 77:], v[:, :, 77:] = 1e4, -1e4
    changed = ops.causal_attention(q, k, v, backend=backend)
    assert torch.equal(out[:, :, :77], changed[:, :, :77])
    assert not torch.equal(out[:, :, 77:], changed[:, :, 77:])


def test_nan_stays_in_the_rows_that_see_it(op_backend):
    backend = op_backend("attention", case(grad=False))
    q, k, v = inputs(1, 2, 130, 130, 64)
    q[0, 0, 40, 3] = torch.nan
    k[0, 1, 77, 5] = torch.nan
    nan = ops.causal_attention(q, k, v, backend=backend).isnan()
    want = torch.zeros(2, 130, dtype=torch.bool)
    want[0, 40] = want[1, 77:] = True
    assert torch.equal(nan[0], want[:, :, None].expand(2, 130, 64))


# ---- layouts ----


def test_views_of_a_packed_projection_are_read_in_place(op_backend):
    backend = op_backend("attention", case(head_dim=20))
    qkv = torch.randn(2, 70, 3, 4, 20)
    views = [qkv[:, :, i].transpose(1, 2) for i in range(3)]
    dout = torch.randn(2, 70, 80).view(2, 70, 4, 20).transpose(1, 2)
    for got, want in zip(
        run(views, dout, backend), run([t.contiguous() for t in views], dout.contiguous(), backend), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_last_axis_that_is_not_contiguous_is_copied(op_backend):
    backend = op_backend("attention", case(head_dim=20))
    tensors = inputs(2, 2, 50, 50, 20)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors]
    dout = torch.randn(2, 2, 20, 50).transpose(2, 3)
    for got, want in zip(run(turned, dout, backend), run(tensors, dout.contiguous(), backend), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_expanded_heads_and_gradients_are_read_in_place(op_backend):
    backend = op_backend("attention", case(head_dim=20))
    q, k, v = inputs(2, 4, 50, 50, 20)
    views = [q, k[:, :1].expand(2, 4, 50, 20), v[:, :1].expand(2, 4, 50, 20)]
    dout = torch.ones(1).expand(2, 4, 50, 20)
    for got, want in zip(
        run(views, dout, backend), run([t.contiguous() for t in views], dout.contiguous(), backend), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_output_and_gradients_lie_as_the_projections_want_them(op_backend):
    backend = op_backend("attention", case(head_dim=20))
    for tensor in run(inputs(2, 4, 50, 50, 20), torch.randn(2, 4, 50, 20), backend):
        assert tensor.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 0, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(op_backend, shape):
    backend = op_backend("attention", case(head_dim=8, square=shape[2] == shape[3]))
    q, k, v = (t.requires_grad_() for t in inputs(*shape, 8))
    out = ops.causal_attention(q, k, v, backend=backend)
    assert out.shape == q.shape
    out.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k)) and torch.equal(v.grad, torch.zeros_like(v))


def test_every_number_of_the_results_is_written(op_backend, monkeypatch):
    backend = op_backend("attention", case(head_dim=20))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **kw: new_empty(*a, **kw).fill_(torch.nan))
    for tensor in run(inputs(2, 3, 70, 90, 20), torch.randn(2, 3, 70, 20), backend):
        assert not tensor.isnan().any()


# ---- dropout ----


@pytest.mark.parametrize(("q_len", "k_len"), [(200, 200), (37, 150)])
def test_the_mask_is_that_of_philox_to_the_bit(op_backend, q_len, k_len):
    """With equal scores and the identity as values, the output shows which weights were kept."""
    backend = op_backend("attention", case(head_dim=k_len, square=q_len == k_len, dropout=True, grad=False))
    q = torch.zeros(2, 3, q_len, k_len)
    v = torch.eye(k_len).expand(2, 3, k_len, k_len)
    torch.manual_seed(SEED)
    seed = philox.draw_seed()
    torch.manual_seed(SEED)
    out = ops.causal_attention(q, torch.zeros_like(v), v, dropout_p=0.3, backend=backend)
    keep = philox.keep_mask(2, 3, q_len, k_len, 0.3, seed).to(out.device).tril(k_len - q_len)
    assert torch.equal(out != 0, keep)


def test_dropping_everything_gives_zeros(op_backend):
    tensors = inputs(1, 2, 70, 70, 16)
    backend = op_backend("attention", case(head_dim=16, dropout=True))
    for tensor in run(tensors, torch.randn_like(tensors[0]), backend, dropout_p=1.0):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_a_probability_below_one_in_65536_drops_nothing(op_backend):
    tensors = inputs(1, 2, 70, 70, 16)
    backend = op_backend("attention", case(head_dim=16, dropout=True))
    dout = torch.randn_like(tensors[0])
    for got, want in zip(run(tensors, dout, backend, 1e-6), run(tensors, dout, backend), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_torch_manual_seed_reproduces_dropout(op_backend):
    backend = op_backend("attention", case(dropout=True, grad=False))
    q, k, v = inputs(1, 2, 70, 70, 64)

    def draw(seed):
        torch.manual_seed(seed)
        return ops.causal_attention(q, k, v, dropout_p=0.5, backend=backend)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# ---- threads ----


def on_threads(threads, *arguments):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run(*arguments)
    finally:
        torch.set_num_threads(before)


cpu_only = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))


@cpu_only
def test_the_number_of_threads_changes_no_bit_where_each_has_whole_heads():
    tensors = inputs(2, 4, 130, 130, 64)
    dout = torch.randn_like(tensors[0])
    for one, two in zip(*(on_threads(n, tensors, dout, "cpu", 0.1) for n in (1, 2)), strict=True):
        assert torch.equal(one, two)


@cpu_only
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_that_share_a_head_are_within_the_bound_and_repeat_their_bits(threads):
    tensors = inputs(1, 1, 300, 310, 64)
    dout = torch.randn_like(tensors[0])
    first, second = (on_threads(threads, tensors, dout, "cpu", 0.1) for _ in range(2))
    truth = run(tensors, dout, "naive", 0.1, None, torch.float64)
    naive = run(tensors, dout, "naive", 0.1)
    for a, b, plain, true in zip(first, second, naive, truth, strict=True):
        assert torch.equal(a, b)
        assert_within_bound(a, plain, true, factor=GRADIENT_FACTOR)


@cpu_only
def test_lse_is_the_logarithm_of_the_sum_of_exponentials():
    q, k, v = inputs(2, 2, 70, 90, 16)
    lse = backend_cpu.forward(q, k, v, 0.25, 0.0, 0)[1]
    hidden = torch.ones(70, 90, dtype=torch.bool).triu(21)
    scores = (q.double() @ k.double().transpose(2, 3) * 0.25).masked_fill(hidden, -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=2e-6)


# ---- autograd, torch.library, torch.compile ----


def test_float64_passes_gradcheck():
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 2, 5, 7, 3))
    for backend in ("reference", None):
        assert torch.autograd.gradcheck(lambda *a: ops.causal_attention(*a, backend=backend), (q, k, v))  # noqa: B023


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_registered_op_passes_opcheck(dropout_p):
    seed = torch.tensor(5) if dropout_p else None
    leaves = [t.requires_grad_() for t in inputs(2, 2, 9, 12, 20)]
    torch.library.opcheck(torch.ops.fastgpt.causal_attention.default, (*leaves, seed, 0.25, dropout_p, None))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_torch_compile_sees_one_graph_and_the_same_gradients(dropout_p):
    leaves = [t.requires_grad_() for t in inputs(2, 3, 40, 40, 20)]

    def model(q, k, v):
        return ops.causal_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2).flatten(2).sin()

    torch.manual_seed(SEED)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(*leaves)
    got = torch.autograd.grad(out.sum(), leaves)
    torch.manual_seed(SEED)
    eager = model(*leaves)
    torch.testing.assert_close(out, eager, rtol=0, atol=0)
    for a, b in zip(got, torch.autograd.grad(eager.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- what the door refuses ----


def heads(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: (heads(2, 3, 4), heads(2, 3, 4), heads(2, 3, 4)), "q must be .batch, n_heads, q_len, head_dim."),
        (lambda: (heads(1, 2, 3, 4), heads(1, 2, 3, 4), heads(1, 2, 3, 5)), "got q .1, 2, 3, 4., k"),
        (lambda: (heads(1, 2, 3, 4), heads(1, 1, 3, 4), heads(1, 1, 3, 4)), "got q"),
        (lambda: (heads(1, 2, 4, 4), heads(1, 2, 3, 4), heads(1, 2, 3, 4)), "q_len 4 is larger than k_len 3"),
        (lambda: [heads(1, 2, 3, 0)] * 3, "head_dim is 0"),
        (lambda: [heads(1, 2, 3, 4, dtype=torch.int64)] * 3, "one floating-point dtype"),
        (lambda: (heads(1, 2, 3, 4), heads(1, 2, 3, 4).bfloat16(), heads(1, 2, 3, 4)), "one floating-point dtype"),
        (lambda: (heads(1, 2, 3, 4), heads(1, 2, 3, 4, device="meta"), heads(1, 2, 3, 4)), "move all to one device"),
    ],
)
def test_a_bad_input_is_refused_with_what_is_wanted(make, text):
    with pytest.raises(ValueError, match=text):
        ops.causal_attention(*make())


def test_a_head_dim_above_256_is_left_to_other_backends():
    tensors = inputs(1, 2, 5, 5, 257)
    with pytest.raises(ops.BackendError, match="head_dim is 257; the kernel takes up to 256"):
        ops.causal_attention(*tensors, backend="cpu")
    torch.testing.assert_close(ops.causal_attention(*tensors), reference.apply(*tensors, 257**-0.5))


@pytest.mark.parametrize("dropout_p", [-0.1, 1.5, math.nan])
def test_a_bad_probability_is_refused(dropout_p):
    with pytest.raises(ValueError, match="it is a probability, from 0 to 1"):
        ops.causal_attention(*[heads(1, 2, 3, 4)] * 3, dropout_p=dropout_p)


def call_forward(address, strides=(64, 32, 4, 1), sizes=(1, 2, 8, 8, 4), threshold=0, dtype=0, threads=1):
    args = (address, strides) * 1 + (address,) + (address, strides) * 3
    extension.load("cpu").attention_forward(*args, sizes, 0.5, 0, threshold, dtype, threads)


def call_backward(address, strides=(64, 32, 4, 1), sizes=(1, 2, 8, 8, 4), threshold=0, dtype=0, threads=1):
    args = (address, strides) * 8 + (address,)
    extension.load("cpu").attention_backward(*args, sizes, 0.5, 0, threshold, dtype, threads)


@cpu_only
@pytest.mark.parametrize("call", [call_forward, call_backward])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"address": 0}, "null pointer"),
        ({"address": 2}, "misaligned"),
        ({"strides": (64, 32, 4, 2)}, "last axis must be contiguous"),
        ({"strides": (64, 32, -4, 1)}, "negative or too large"),
        ({"strides": (64, 32, 2**61, 1)}, "negative or too large"),
        ({"sizes": (1, 2, 8, 8, 257)}, "head_dim must be from 1 to 256"),
        ({"sizes": (1, 2, 8, 8, 0)}, "head_dim must be from 1 to 256"),
        ({"sizes": (1, 2, 9, 8, 4)}, "q_len must be from 0 to k_len"),
        ({"sizes": (1, 2, -1, 8, 4)}, "q_len must be from 0 to k_len"),
        ({"sizes": (-1, 2, 8, 8, 4)}, "negative or too large"),
        ({"sizes": (2**40, 2**40, 8, 8, 4)}, "negative or too large"),
        ({"sizes": (1, 2, 8, 2**60, 4)}, "negative or too large"),
        ({"threshold": -1}, "dropout_threshold"),
        ({"threshold": 65537}, "dropout_threshold"),
        ({"dtype": 3}, "unknown dtype code 3"),
        ({"threads": 0}, "num_threads"),
    ],
)
def test_the_binding_refuses_what_would_be_a_bad_address(call, change, text):
    buffer = torch.zeros(64)
    with pytest.raises(ValueError, match=text):
        call(**{"address": buffer.data_ptr(), **change})
