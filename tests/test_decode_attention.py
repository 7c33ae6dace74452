"""decode_attention: every backend against the plain formula, and what the door refuses."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops.decode_attention import Case
from fastgpt.testing import assert_within_bound

HEAD_DIMS = [1, 3, 4, 6, 8, 16, 20, 48, 64, 65, 80, 127, 128, 200, 256]
# The kernel works on blocks of 64 keys, shared among the threads.
LENGTHS = [1, 2, 7, 63, 64, 65, 127, 128, 129, 300]


def inputs(batch, n_heads, max_len, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n_heads, head_dim, generator=generator, device="cpu")
    k, v = torch.randn(2, batch, n_heads, max_len, head_dim, generator=generator, device="cpu")
    device = torch.empty(0).device
    return [t.to(device=device, dtype=dtype) for t in (q, k, v)]


def row_lengths(*values):
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def check(q, k, v, lengths, backend, **options):
    got = ops.decode_attention(q, k, v, lengths, backend=backend, **options)
    naive = ops.decode_attention(q, k, v, lengths, backend="reference", **options)
    truth = ops.decode_attention(q.double(), k.double(), v.double(), lengths, backend="reference", **options)
    assert_within_bound(got, naive, truth)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_head_dim_is_within_the_bound(op_backend, head_dim, dtype):
    backend = op_backend("decode_attention", Case("cpu", dtype, head_dim))
    check(*inputs(2, 3, 70, head_dim, dtype), row_lengths(70, 5), backend)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_length_is_within_the_bound(op_backend, length, dtype):
    backend = op_backend("decode_attention", Case("cpu", dtype, 64))
    check(*inputs(1, 2, length, 64, dtype), row_lengths(length), backend)


@pytest.mark.parametrize(("batch", "n_heads"), [(1, 1), (1, 3), (5, 1), (3, 12)])
def test_heads_that_threads_share_are_joined_exactly(op_backend, batch, n_heads):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 64))
    lengths = row_lengths(*[1000, 641, 1, 64, 65][:batch])
    check(*inputs(batch, n_heads, 1000, 64, torch.float32), lengths, backend)


def test_random_shapes_are_within_the_bound(op_backend):
    draw = torch.Generator().manual_seed(5)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw, device="cpu"))

    for seed in range(60):
        batch, n_heads, max_len, head_dim = pick(1, 6), pick(1, 5), pick(1, 400), pick(1, 140)
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        backend = op_backend("decode_attention", Case("cpu", dtype, head_dim))
        lengths = row_lengths(*[pick(1, max_len) for _ in range(batch)])
        check(*inputs(batch, n_heads, max_len, head_dim, dtype, seed), lengths, backend)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_is_within_the_bound(op_backend, threads):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 32))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*inputs(2, 3, 500, 32, torch.float32), row_lengths(500, 433), backend)
    finally:
        torch.set_num_threads(before)


def test_the_result_does_not_depend_on_what_lies_behind_the_length(op_backend):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 20))
    q, k, v = inputs(3, 2, 90, 20, torch.float32)
    lengths = row_lengths(1, 64, 89)
    want = ops.decode_attention(q, k, v, lengths, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:] = torch.nan
        v[row, :, length:] = torch.nan
    got = ops.decode_attention(q, k, v, lengths, backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_cache_views_with_any_strides_are_read_in_place(op_backend):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 24))
    q, k, v = inputs(2, 3, 40, 24, torch.float32)
    lengths = row_lengths(40, 17)
    # (n_heads, batch, layer, max_len, head_dim + 5) with NaN all around.
    buffer = torch.full((3, 2, 2, 50, 29), torch.nan)
    buffer[:, :, 0, :40, :24], buffer[:, :, 1, :40, :24] = k.transpose(0, 1), v.transpose(0, 1)
    views = [buffer[:, :, i, :40, :24].transpose(0, 1) for i in (0, 1)]
    joined = torch.full((2, 3, 3, 24), torch.nan)
    joined[:, 1] = q
    got = ops.decode_attention(joined[:, 1], *views, lengths, backend=backend)
    want = ops.decode_attention(q, k, v, lengths, backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_transposed_cache_gives_the_same_values(op_backend):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 8))
    q, k, v = inputs(1, 2, 9, 8, torch.float32)
    k_t, v_t = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (k, v))
    got = ops.decode_attention(q, k_t, v_t, row_lengths(9), backend=backend)
    want = ops.decode_attention(q, k, v, row_lengths(9), backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite_and_within_the_bound(op_backend, scale):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 16))
    q, k, v = inputs(1, 4, 200, 16, torch.float32)
    check(q * scale, k, v, row_lengths(200), backend)


def test_equal_scores_give_the_mean_of_the_values(op_backend):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 12))
    q, k, v = inputs(2, 2, 100, 12, torch.float32)
    got = ops.decode_attention(q * 0, k, v, row_lengths(100, 100), backend=backend)
    torch.testing.assert_close(got, v.mean(dim=2), rtol=0, atol=1e-6)


def test_a_nan_key_reaches_its_own_head_alone(op_backend):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 16))
    q, k, v = inputs(2, 2, 70, 16, torch.float32)
    k[1, 0, 65, 3] = torch.nan
    out = ops.decode_attention(q, k, v, row_lengths(70, 70), backend=backend)
    assert out[1, 0].isnan().all() and out.isnan().sum() == 16


def test_scores_of_minus_infinity_have_no_weight(op_backend):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 16))
    q, k, v = inputs(1, 1, 130, 16, torch.float32)
    q = q.abs()
    k[:, :, :100] = -torch.inf
    got = ops.decode_attention(q, k, v, row_lengths(130), backend=backend)
    want = ops.decode_attention(q, k[:, :, 100:], v[:, :, 100:], row_lengths(30), backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_softmax_scale_is_applied_to_the_scores(op_backend):
    backend = op_backend("decode_attention", Case("cpu", torch.float32, 16))
    check(*inputs(1, 2, 30, 16, torch.float32), row_lengths(30), backend, softmax_scale=0.7)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_negative_or_zero_softmax_scale_gives_hidden_keys_no_weight(backend, scale):
    q, k, v = inputs(2, 3, 20, 16, torch.float32)
    rows = [scale * k[b, :, :n] @ q[b, :, :, None] for b, n in enumerate((20, 7))]
    want = [(row.softmax(1) * v[b, :, : row.shape[1]]).sum(1) for b, row in enumerate(rows)]
    got = ops.decode_attention(q, k, v, row_lengths(20, 7), softmax_scale=scale, backend=backend)
    torch.testing.assert_close(got, torch.stack(want), atol=1e-6, rtol=1e-5)


def test_the_newest_query_agrees_with_causal_attention():
    q, k, v = inputs(2, 3, 33, 16, torch.float32)
    queries = torch.randn(2, 3, 33, 16)
    queries[:, :, -1] = q
    want = ops.causal_attention(queries, k, v)[:, :, -1]
    torch.testing.assert_close(ops.decode_attention(q, k, v, row_lengths(33, 33)), want, rtol=1e-5, atol=1e-6)


def test_the_torch_backend_agrees_with_the_reference_for_ragged_and_even_rows():
    q, k, v = inputs(2, 3, 33, 16, torch.float32)
    for lengths in (row_lengths(33, 33), row_lengths(4, 33)):
        got = ops.decode_attention(q, k, v, lengths, backend="torch")
        torch.testing.assert_close(got, ops.decode_attention(q, k, v, lengths, backend="reference"))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_an_empty_batch_gives_an_empty_output(backend):
    q, k, v = inputs(0, 2, 5, 8, torch.float32)
    assert ops.decode_attention(q, k, v, row_lengths(), backend=backend).shape == (0, 2, 8)


def test_float16_and_float64_run_too():
    for dtype in (torch.float16, torch.float64):
        q, k, v = inputs(1, 2, 20, 8, dtype)
        out = ops.decode_attention(q, k, v, row_lengths(20))
        assert out.dtype == dtype
        want = ops.decode_attention(q.float(), k.float(), v.float(), row_lengths(20))
        torch.testing.assert_close(out.float(), want, rtol=2e-3, atol=2e-3)


def test_the_registered_op_passes_opcheck():
    call = torch.ops.fastgpt.decode_attention.default
    torch.library.opcheck(call, (*inputs(2, 3, 20, 16, torch.float32), row_lengths(20, 3), 0.25, None))


def test_torch_compile_sees_one_graph_and_the_same_values():
    q, k, v = inputs(2, 3, 20, 16, torch.float32)
    lengths = row_lengths(20, 3)
    compiled = torch.compile(ops.decode_attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v, lengths), ops.decode_attention(q, k, v, lengths), rtol=0, atol=0)


def bad(**changes):
    tensors = dict(zip(("q", "k", "v"), inputs(2, 3, 9, 8, torch.float32), strict=True))
    return [*(changes.get(name, tensor) for name, tensor in tensors.items()), changes.get("lengths", row_lengths(9, 1))]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: bad(q=torch.ones(2, 3, 1, 8)), "q must be"),
        (lambda: bad(q=torch.ones(2, 4, 8)), "q must be"),
        (lambda: bad(v=torch.ones(2, 3, 9, 7)), "q must be"),
        (lambda: bad(q=torch.ones(2, 3, 8).bfloat16()), "one floating-point dtype"),
        (lambda: bad(q=torch.ones(2, 3, 8, device="meta")), "move all to one device"),
        (lambda: bad(lengths=row_lengths(9)), r"lengths must be \(2,\)"),
        (lambda: bad(lengths=row_lengths(9, 1).int()), "torch.int64"),
        (lambda: bad(lengths=row_lengths(9, 0)), r"from 1 to max_len = 9.*got \[9, 0\]"),
        (lambda: bad(lengths=row_lengths(10, 1)), "from 1 to max_len = 9"),
        (lambda: bad(q=torch.ones(2, 3, 8, requires_grad=True)), "no gradient"),
    ],
)
def test_a_bad_input_is_refused_with_what_is_wanted(make, text):
    with pytest.raises(ValueError, match=text):
        ops.decode_attention(*make())


def test_a_head_of_more_than_256_is_refused():
    q, k, v = inputs(1, 1, 2, 257, torch.float32)
    with pytest.raises(ValueError, match="from 1 to 256"):
        ops.decode_attention(q, k, v, row_lengths(2))
