"""Causal attention in CUDA C++, whole kernels in the emulator of a thread block: forward, gradients, dropout."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from cuda_emulation import as_cuda_backend, emulate

from fastgpt import ops
from fastgpt.ops import philox
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

ROOM = importlib.import_module("fastgpt.ops.attention")
PACKED = importlib.import_module("fastgpt.ops.packed_causal_attention")
# Blocks of the kernels are 64 and 128 long.
LENGTHS = [(1, 1), (3, 3), (63, 63), (64, 64), (65, 65), (129, 129), (1, 70), (5, 130), (66, 131)]


@pytest.fixture(scope="module")
def emulated():
    emulated = emulate()
    with as_cuda_backend(emulated, ROOM.OP, PACKED.OP):
        yield emulated


def draw(batch, n_heads, q_len, k_len, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n_heads, length, head_dim) for length in (q_len, k_len, k_len, q_len)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attend(q, k, v, scale=None, dropout_p=0.0, keep=None):
    """Plain PyTorch, in the dtype of q, with the given dropout mask."""
    q_len, k_len = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = q @ k.transpose(2, 3) * scale
    unseen = torch.ones(q_len, k_len, dtype=torch.bool).triu(k_len - q_len + 1)
    weights = torch.softmax(scores.masked_fill(unseen, -torch.inf), dim=-1)
    if keep is not None:
        weights = weights * keep * philox.scale(dropout_p)
    return weights @ v


def with_gradients(function, inputs, dout, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def check(inputs, dout, scale=None, dropout_p=0.0):
    """The kernels' output and gradients are within the bound of plain PyTorch, dropout mask and all."""
    q, k = inputs[:2]
    keep = None
    if dropout_p:
        torch.manual_seed(5)
        keep = philox.keep_mask(*q.shape[:3], k.shape[2], dropout_p, philox.draw_seed())
        torch.manual_seed(5)

    def kernel(*qkv):
        return ops.causal_attention(*qkv, softmax_scale=scale, dropout_p=dropout_p, backend="cuda")

    def plain(*qkv):
        return attend(*qkv, scale, dropout_p, keep)

    got = with_gradients(kernel, inputs, dout)
    naive = with_gradients(plain, inputs, dout)
    truth = with_gradients(plain, inputs, dout, torch.float64)
    for index, (g, n, t) in enumerate(zip(got, naive, truth, strict=True)):
        assert_within_bound(g, n, t, factor=GRADIENT_FACTOR if index else 2.0)


# With one key the gradient of its score is 0 but for the rounding of out, which scaling by dropout brings in.
@pytest.mark.parametrize("lengths, dropout_p", [*((x, 0.0) for x in LENGTHS), *((x, 0.2) for x in LENGTHS[1:])])
def test_output_and_gradients_are_within_the_bound(emulated, lengths, dropout_p):
    emulated.order(sum(lengths))
    *inputs, dout = draw(2, 2, *lengths, 64, torch.bfloat16)
    check(inputs, dout, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [1, 6, 8, 24, 72, 127, 128])
def test_every_head_dim_up_to_128_is_within_the_bound(emulated, head_dim, dtype):
    *inputs, dout = draw(1, 2, 70, 70, head_dim, dtype)
    check(inputs, dout, dropout_p=0.1)


def test_the_mask_is_drawn_as_everywhere(emulated):
    # v is the unit matrix, so that out is the matrix of weights.
    length, dropout_p, seed = 64, 0.3, 2**40 + 17
    q, k, _, _ = draw(1, 3, length, length, 64, torch.float16)
    v = torch.eye(length).half().expand(1, 3, -1, -1)
    out = ROOM.OP.module("cuda").forward(q, k, v, 0.01, dropout_p, seed)[0]
    keep = philox.keep_mask(1, 3, length, length, dropout_p, seed)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    torch.testing.assert_close((out != 0) & seen, keep & seen, rtol=0, atol=0)


def test_everything_dropped_gives_zeros(emulated):
    *inputs, dout = draw(1, 1, 65, 65, 64, torch.bfloat16)
    got = with_gradients(lambda *a: ops.causal_attention(*a, dropout_p=1.0, backend="cuda"), inputs, dout)
    assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale_is_within_the_bound(emulated, scale):
    *inputs, dout = draw(1, 1, 66, 66, 64, torch.bfloat16)
    check(inputs, dout, scale=scale)


def test_extreme_scores_stay_finite(emulated):
    q, k, v, dout = draw(1, 1, 66, 66, 64, torch.bfloat16)
    check([q * 100, k * 100, v], dout)


def test_packed_views_are_read_in_place(emulated):
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(2, 67, 3, 2, 64, generator=generator).to(torch.bfloat16)
    inputs = [x.transpose(1, 2) for x in packed.unbind(2)]
    backend = ROOM.OP.module("cuda")
    assert all(backend._readable(x) is x for x in inputs)
    check(inputs, torch.randn(2, 2, 67, 64, generator=generator).to(torch.bfloat16))


@pytest.mark.parametrize(("head_dim", "dropout_p"), [(64, 0.2), (24, 0.0), (7, 0.0)])
def test_the_packed_gradient_is_written_in_place_and_equals_the_unpacked_one(emulated, head_dim, dropout_p):
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(2, 66, 3, 2, head_dim, generator=generator).to(torch.bfloat16)
    dout = torch.randn(2, 66, 2, head_dim, generator=generator).to(torch.bfloat16)

    def unpacked(qkv):
        q, k, v = PACKED.split(qkv)
        return ops.causal_attention(q, k, v, dropout_p=dropout_p, backend="cuda").transpose(1, 2)

    def packed(qkv):
        return ops.packed_causal_attention(qkv, dropout_p=dropout_p, backend="cuda")

    results = []
    for function in (packed, unpacked):
        torch.manual_seed(0)
        results.append(with_gradients(function, [qkv], dout))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert results[0][1].is_contiguous()


def test_rows_that_are_not_aligned_are_copied(emulated):
    wide = torch.randn(1, 2, 66, 70).to(torch.bfloat16)
    inputs = [wide[..., 1:65], wide[..., 2:66], wide[..., 3:67]]
    check(inputs, torch.randn(1, 2, 66, 64).to(torch.bfloat16))


def test_what_lies_around_the_tensors_is_not_read(emulated):
    *inputs, dout = draw(1, 2, 65, 65, 40, torch.bfloat16)
    framed = []
    for x in inputs:
        frame = torch.full((1, 2, 130, 64), torch.nan).to(torch.bfloat16)
        frame[:, :, :65, :40] = x
        framed.append(frame[:, :, :65, :40])
    check(framed, dout)


def test_the_result_does_not_depend_on_the_order_of_threads(emulated):
    *inputs, dout = draw(1, 1, 130, 130, 64, torch.bfloat16)
    results = []
    for seed in (1, 2):
        emulated.order(seed)
        torch.manual_seed(0)
        results.append(with_gradients(lambda *a: ops.causal_attention(*a, dropout_p=0.1, backend="cuda"), inputs, dout))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (2, 0, 4, 8), (1, 1, 0, 8)], ids=str)
def test_nothing_gives_nothing(emulated, shape):
    *inputs, dout = draw(*shape[:2], shape[2], shape[2], shape[3], torch.bfloat16)
    out = with_gradients(lambda *a: ops.causal_attention(*a, backend="cuda"), inputs, dout)[0]
    assert out.shape == shape


def test_no_query_but_keys_gives_zero_gradients(emulated):
    *inputs, dout = draw(1, 1, 0, 66, 64, torch.bfloat16)
    _, dq, dk, dv = with_gradients(lambda *a: ops.causal_attention(*a, backend="cuda"), inputs, dout)
    assert dq.shape == (1, 1, 0, 64) and (dk == 0).all() and (dv == 0).all()


def test_a_misaligned_input_is_refused_by_the_bindings(emulated):
    x = torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)
    strides, lse = x.stride(), torch.zeros(4)
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        emulated.module.attention_forward(
            x.data_ptr(), strides, lse.data_ptr(), x.data_ptr() + 2, strides, x.data_ptr(), strides,
            x.data_ptr(), strides, (1, 1, 4, 4, 64), 1.0, 0, 0, 1, 0,
        )  # fmt: skip
