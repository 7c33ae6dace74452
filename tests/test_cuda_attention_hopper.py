"""The sm_90a kernels of causal attention in the emulator of a thread block: TMA, mbarrier, wgmma, turns."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import as_cuda_backend, emulate
from test_cuda_attention import PACKED, ROOM, check, draw, with_gradients

from fastgpt import ops
from fastgpt.ops import philox
from fastgpt.testing import assert_within_bound

BACKEND = ROOM.OP.module("cuda")
# Tiles have 192 or 128 queries in warpgroups of 64, blocks of keys 128.
LENGTHS = [(1, 1), (63, 63), (65, 65), (128, 128), (129, 129), (193, 193), (1, 300), (130, 257), (400, 400)]


@pytest.fixture(scope="module")
def emulated():
    emulated = emulate()
    with as_cuda_backend(emulated, ROOM.OP, PACKED.OP, hopper=True):
        yield emulated


@pytest.fixture
def backward_of_hopper(emulated, monkeypatch):
    """Whether the gradients came from the kernels of sm_90a: one entry for each call."""
    calls = []
    launch = emulated.module.attention_backward_hopper
    monkeypatch.setattr(
        emulated.module, "attention_backward_hopper", lambda *arguments: calls.append(1) or launch(*arguments)
    )
    return calls


def truth(q, k, v, dtype=torch.float64, weigh=lambda weights: weights):
    """Plain PyTorch: out, and the log-sum-exp of the scores."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    unseen = torch.ones(*scores.shape[2:], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
    scores = scores.masked_fill(unseen, -torch.inf)
    return weigh(torch.softmax(scores, dim=-1)) @ v, torch.logsumexp(scores, dim=-1)


def check_forward(q, k, v, dropout_p=0.0, seed=2**40 + 3):
    """The kernel's output is within the bound, and its log-sum-exp to the rounding of float32."""
    assert BACKEND.why_not_hopper(q, k, v) is None
    keep = philox.keep_mask(*q.shape[:3], k.shape[2], dropout_p, seed) * philox.scale(dropout_p)

    def drop(weights):
        return weights * keep.to(weights.dtype)

    out, lse = BACKEND.forward(q, k, v, q.shape[3] ** -0.5, dropout_p, seed)
    wanted, wanted_lse = truth(q, k, v, weigh=drop)
    assert_within_bound(out, truth(q, k, v, q.dtype, drop)[0], wanted)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
    return out, lse


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_output_is_within_the_bound(emulated, lengths, head_dim):
    emulated.order(sum(lengths))
    check_forward(*draw(1, 2, *lengths, head_dim, torch.bfloat16)[:3])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [(3, 3), (65, 65), (130, 257), (300, 300)])
def test_output_with_dropout_is_within_the_bound(emulated, lengths, head_dim):
    emulated.order(sum(lengths))
    check_forward(*draw(2, 2, *lengths, head_dim, torch.bfloat16)[:3], dropout_p=0.2)


def test_the_mask_is_drawn_as_everywhere(emulated):
    # v is the unit matrix, so that out is the matrix of weights.
    length, dropout_p, seed = 128, 0.3, 2**40 + 17
    q, k = draw(1, 3, length, length, 128, torch.float16)[:2]
    v = torch.eye(length).half().repeat(1, 3, 1, 1)
    out = BACKEND.forward(q, k, v, 0.01, dropout_p, seed)[0]
    keep = philox.keep_mask(1, 3, length, length, dropout_p, seed)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    torch.testing.assert_close((out != 0) & seen, keep & seen, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [1, 8, 24, 72, 127, 128])
def test_every_head_dim_up_to_128_is_within_the_bound(emulated, head_dim, dtype):
    q, k, v, dout = draw(1, 2, 70, 70, head_dim, dtype)
    check([q, k, v], dout)


# Backward, a warpgroup owns 64 rows, a block 128, and reads 64 at a time.
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [(3, 3), (64, 64), (65, 65), (129, 129), (5, 130), (66, 131), (200, 200)])
def test_gradients_are_within_the_bound(emulated, backward_of_hopper, lengths, head_dim, dropout_p):
    emulated.order(sum(lengths))
    *inputs, dout = draw(1, 2, *lengths, head_dim, torch.bfloat16)
    check(inputs, dout, dropout_p=dropout_p)
    assert backward_of_hopper


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_block_takes_many_tiles_of_gradients_one_after_another(emulated, dropout_p):
    # Three blocks, 2 x 3 heads of two tiles each; the last warpgroups own nothing.
    *inputs, dout = draw(2, 3, 140, 190, 64, torch.float16)
    check(inputs, dout, dropout_p=dropout_p)


def gradients(inputs, dout, dropout_p):
    torch.manual_seed(0)
    return with_gradients(lambda *qkv: ops.causal_attention(*qkv, dropout_p=dropout_p, backend="cuda"), inputs, dout)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_gradients_do_not_depend_on_the_order_of_threads_and_copies(emulated, dropout_p):
    *inputs, dout = draw(1, 2, 200, 200, 64, torch.bfloat16)
    results = []
    for seed in (1, 2, 3):
        emulated.order(seed)
        results.append(gradients(inputs, dout, dropout_p))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_path_of_any_gpu_runs_its_gradients_too(emulated, backward_of_hopper):
    *inputs, dout = draw(1, 1, 66, 66, 64, torch.bfloat16)
    with BACKEND.cuda_path("sm_80"):
        check(inputs, dout)
    assert not backward_of_hopper


def test_everything_dropped_gives_zeros(emulated):
    *inputs, dout = draw(1, 1, 65, 65, 64, torch.bfloat16)
    assert all((x == 0).all() for x in gradients(inputs, dout, 1.0))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_packed_gradient_is_written_in_place_and_equals_the_unpacked_one(emulated, dropout_p):
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 130, 3, 2, 64, generator=generator).to(torch.bfloat16)
    dout = torch.randn(2, 130, 2, 64, generator=generator).to(torch.bfloat16)

    def packed(qkv):
        return ops.packed_causal_attention(qkv, dropout_p=dropout_p, backend="cuda")

    torch.manual_seed(0)
    got = with_gradients(packed, [qkv], dout)[1]
    _, *want = gradients([x.transpose(1, 2) for x in qkv.unbind(2)], dout.transpose(1, 2), dropout_p)
    assert got.is_contiguous()
    for a, b in zip(got.unbind(2), want, strict=True):
        torch.testing.assert_close(a.transpose(1, 2), b, rtol=0, atol=0)


def test_a_block_takes_many_tiles_one_after_another(emulated):
    # Three blocks, 4 x 5 heads of three tiles each.
    out, lse = check_forward(*draw(4, 5, 400, 400, 64, torch.bfloat16)[:3])
    assert out.isfinite().all() and lse.isfinite().all()


def test_extreme_scores_stay_finite(emulated):
    q, k, v, dout = draw(1, 1, 200, 200, 64, torch.bfloat16)
    check([q * 100, k * 100, v], dout)


def test_packed_views_are_read_in_place(emulated):
    packed = torch.randn(2, 131, 3, 2, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    inputs = [x.transpose(1, 2) for x in packed.unbind(2)]
    assert all(BACKEND._readable(x) is x for x in inputs)
    check_forward(*inputs)


def test_what_lies_around_the_tensors_is_not_read(emulated):
    framed = []
    for x in draw(1, 2, 129, 129, 40, torch.bfloat16):
        frame = torch.full((1, 2, 260, 64), torch.nan).to(torch.bfloat16)
        frame[:, :, :129, :40] = x
        framed.append(frame[:, :, :129, :40])
    check_forward(*framed[:3])
    check(framed[:3], framed[3])


def test_the_result_does_not_depend_on_the_order_of_threads_and_copies(emulated):
    inputs = draw(1, 2, 400, 400, 64, torch.bfloat16)[:3]
    results = []
    for seed in (1, 2, 3):
        emulated.order(seed)
        results.append(check_forward(*inputs))
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(lse, results[0][1], rtol=0, atol=0)


def test_nan_reaches_its_row_and_no_earlier_one(emulated):
    q, k, v = draw(1, 1, 130, 130, 64, torch.bfloat16)[:3]
    k[0, 0, 129, 0] = torch.nan
    out = BACKEND.forward(q, k, v, 0.125, 0.0, 0)[0]
    assert out[0, 0, :129].isfinite().all() and out[0, 0, 129].isnan().all()


def test_expanded_heads_run_the_kernels_of_any_gpu(emulated):
    *inputs, dout = draw(1, 2, 66, 66, 64, torch.bfloat16)
    q, k, v = (x[:, :1].expand(-1, 2, -1, -1) for x in inputs)
    assert "expanded" in BACKEND.why_not_hopper(q, k, v)
    check([q, k, v], dout)


def test_the_path_of_any_gpu_can_be_asked_for(emulated):
    inputs = draw(1, 1, 66, 66, 64, torch.bfloat16)[:3]
    hopper = ops.causal_attention(*inputs, backend="cuda")
    with BACKEND.cuda_path("sm_80"):
        assert "asked for" in BACKEND.why_not_hopper(*inputs)
        assert_within_bound(ops.causal_attention(*inputs, backend="cuda"), hopper, truth(*inputs)[0])
    assert BACKEND.why_not_hopper(*inputs) is None
    with pytest.raises(ValueError, match="sm_90"), BACKEND.cuda_path("sm_90"):
        pass


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (2, 0, 4, 8), (1, 1, 0, 8)], ids=str)
def test_nothing_gives_nothing(emulated, shape):
    inputs = draw(*shape[:2], shape[2], shape[2], shape[3], torch.bfloat16)[:3]
    assert ops.causal_attention(*inputs, backend="cuda").shape == shape


def test_no_query_but_keys_gives_zero_gradients(emulated):
    *inputs, dout = draw(1, 1, 0, 66, 64, torch.bfloat16)
    _, dq, dk, dv = gradients(inputs, dout, 0.0)
    assert dq.shape == (1, 1, 0, 64) and (dk == 0).all() and (dv == 0).all()
