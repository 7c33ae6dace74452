"""causal_attention in Triton: on a GPU, or in Triton's interpreter, where test_triton_interpreter.py runs this file."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import philox
from fastgpt.ops.attention import OP, Case, reference
from fastgpt.testing import FLOORS, GRADIENT_FACTOR, assert_within_bound

pytestmark = pytest.mark.parametrize("op_backend", ["triton"], indirect=True)

# batch, n_heads, q_len, k_len, head_dim: 1, odd, tile ± 1, q_len < k_len, head dimensions that are padded.
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 2, 31, 31, 40),
    (1, 3, 65, 65, 64),
    (2, 1, 33, 150, 64),
    (1, 2, 1, 97, 80),
    (1, 1, 130, 130, 4),
    (1, 1, 64, 128, 96),
    (1, 1, 40, 41, 256),
]
TILES = [(16, 16), (64, 32), (32, 128), (128, 64)]


def ready(op_backend, dtype=torch.float32, head_dim=64):
    return op_backend("attention", Case("cpu", dtype, head_dim, True, True, True))


def inputs(shape, dtype=torch.float32, seed=0):
    batch, n_heads, q_len, k_len, head_dim = shape
    torch.manual_seed(seed)
    sizes = ((batch, n_heads, length, head_dim) for length in (q_len, k_len, k_len))
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


def attention(tensors, dropout_p=0.0, softmax_scale=None, seed=7):
    """The op on the backend under test, and the dropout seed that it drew."""
    torch.manual_seed(seed)
    drawn = philox.draw_seed()
    torch.manual_seed(seed)
    out = ops.causal_attention(*tensors, softmax_scale=softmax_scale, dropout_p=dropout_p, backend="triton")
    return out, drawn


def check(tensors, dropout_p=0.0, softmax_scale=None, scores=1.0):
    """Output and gradients against plain PyTorch with the same dropout mask.

    The backward computes weights again, as exp(score - lse), and so errs by a rounding of its large `scores`.
    """
    with torch.no_grad():
        dout = torch.randn_like(tensors[0])
    out, seed = attention(tensors, dropout_p, softmax_scale)
    grads = torch.autograd.grad(out, tensors, dout)

    def plain(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        scale = softmax_scale or tensors[0].shape[-1] ** -0.5
        result = reference.apply(*leaves, scale, dropout_p, seed=seed)
        return result, torch.autograd.grad(result, leaves, dout.to(dtype))

    naive, naive_grads = plain(tensors[0].dtype)
    truth, true_grads = plain(torch.float64)
    assert_within_bound(out, naive, truth)
    # dq and dk are sums of differences between numbers of this size, which may themselves be 0.
    q, k, v = (t.detach().float().abs() for t in tensors)
    terms = (softmax_scale or q.shape[-1] ** -0.5) * (dout.float().abs() @ v.transpose(2, 3)).max()
    sizes = *((terms * factor.max()).item() for factor in (k, q)), true_grads[2].abs().max().item()
    for got, near, true, size in zip(grads, naive_grads, true_grads, sizes, strict=True):
        floor = FLOORS[got.dtype] * max(1.0, size) * scores
        assert_within_bound(got, near, true, factor=GRADIENT_FACTOR, floor=floor)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_within_the_bound(op_backend, shape, dropout_p):
    ready(op_backend)
    check(inputs(shape), dropout_p)


# Triton's interpreter multiplies bfloat16 matrices wrongly.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16])
def test_16_bit_output_and_gradients_are_within_the_bound(op_backend, dtype):
    ready(op_backend, dtype)
    check(inputs((1, 2, 70, 90, 64), dtype), 0.1)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_shape_gives_the_values_and_the_dropout_mask(op_backend, tile, monkeypatch):
    ready(op_backend)
    from fastgpt.kernels.triton import attention_tables as tables

    monkeypatch.setattr(tables, "choose", lambda *unused: tables.Tile(*tile, num_warps=4, num_stages=1))
    check(inputs((1, 1, 75, 90, 16)), 0.3)


# Odd lengths, one that ends a tile, a padded head_dim, one row: where descriptors must give zeros.
TMA_SHAPES = [(1, 2, 37, 70, 48), (1, 1, 64, 64, 64), (1, 1, 1, 9, 16), (2, 1, 33, 33, 80)]


@pytest.fixture
def by_descriptor(monkeypatch):
    """Kernels read by TMA descriptors; gives the descriptors that were made."""
    from fastgpt.kernels.triton import attention_tables as tables
    from fastgpt.ops.attention import tma

    made, descriptor = [], tma.descriptor
    monkeypatch.setattr(tma, "descriptor", lambda *a: made.append(descriptor(*a)) or made[-1])
    monkeypatch.setattr(tables, "choose", lambda *unused: tables.Tile(32, 64, 4, 1, tma=1))
    if tma.why_not(torch.zeros(1, 1, 1, 16)):
        pytest.skip(tma.why_not(torch.zeros(1, 1, 1, 16)))
    return made


def all_results(tensors, dropout_p):
    out, _ = attention(tensors, dropout_p)
    return out, *torch.autograd.grad(out, tensors, torch.cos(out.detach() * 9))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("shape", TMA_SHAPES, ids=str)
def test_tma_descriptors_give_the_bits_of_pointers(op_backend, shape, dropout_p, by_descriptor, monkeypatch):
    ready(op_backend)
    tensors = inputs(shape)
    got = all_results(tensors, dropout_p)
    assert len(by_descriptor) == 3 + 4 + 4
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(got, all_results(tensors, dropout_p), strict=True))


def test_tma_descriptors_of_packed_views_end_where_the_tensor_does(op_backend, by_descriptor, monkeypatch):
    ready(op_backend)
    # Neighbours in memory, beyond the last row and head_dim, are other heads, other parts and nan.
    packed = torch.full((2, 40, 3, 2, 32), torch.nan)
    packed[:, :37, :, :, :20] = torch.randn(2, 37, 3, 2, 20)
    q, k, v = (t.transpose(1, 2) for t in packed[:, :37, :, :, :20].unbind(2))
    got = attention((q, k, v), 0.2)[0]
    assert len(by_descriptor) == 3
    monkeypatch.undo()
    assert torch.equal(got, attention((q, k, v), 0.2)[0]) and got.isfinite().all()


def test_what_a_descriptor_cannot_say_is_read_by_pointers(op_backend, by_descriptor):
    ready(op_backend)
    odd = [torch.randn(1, 2, 9, 17)[..., :16] for _ in range(3)]
    expanded = [torch.randn(1, 1, 9, 16).expand(1, 2, 9, 16) for _ in range(3)]
    shifted = [torch.randn(1, 2, 9, 20)[..., 1:17] for _ in range(3)]
    for tensors in (odd, expanded, shifted):
        check([t.clone().requires_grad_() for t in tensors])
        by_descriptor.clear()
        want = attention([t.contiguous() for t in tensors])[0]
        by_descriptor.clear()
        assert torch.equal(attention(tensors)[0], want) and not by_descriptor


LENGTH = 72


def uniform(op_backend):
    """Zeros, ones in column 0 and the unit matrix, as q, k or v; the mask where weights are seen and kept."""
    ready(op_backend, head_dim=LENGTH)
    torch.manual_seed(11)
    mask = philox.keep_mask(1, 2, LENGTH, LENGTH, 0.3, philox.draw_seed()).to(op_backend.device)
    zeros = torch.zeros(1, 2, LENGTH, LENGTH)
    ones = zeros.clone()
    ones[..., 0] = 1
    return zeros, ones, torch.eye(LENGTH).expand_as(zeros).contiguous(), mask.tril()


def test_the_forward_drops_what_philox_says_to_the_bit(op_backend):
    zeros, _, eye, mask = uniform(op_backend)
    out, _ = attention((zeros, zeros, eye), 0.3, seed=11)
    assert torch.equal(out != 0, mask)


def test_the_gradient_of_v_drops_what_philox_says_to_the_bit(op_backend):
    zeros, _, eye, mask = uniform(op_backend)
    v = torch.randn_like(zeros).requires_grad_()
    out, _ = attention((zeros, zeros, v), 0.3, seed=11)
    dv = torch.autograd.grad(out, v, eye)[0]
    assert torch.equal(dv.transpose(2, 3) != 0, mask)


@pytest.mark.parametrize("name", ["q", "k"])
def test_the_gradients_of_q_and_k_drop_what_philox_says_to_the_bit(op_backend, name):
    zeros, ones, eye, mask = uniform(op_backend)
    # The gradient is dS: all of dP that is kept is 1, so dS is positive just there, in rows that drop anything.
    q, k = (zeros.requires_grad_(), eye) if name == "q" else (eye, zeros.requires_grad_())
    out, _ = attention((q, k, ones), 0.3, seed=11)
    ds = torch.autograd.grad(out, zeros, ones)[0]
    ds = ds if name == "q" else ds.transpose(2, 3)
    seen = torch.arange(1, LENGTH + 1)[:, None]
    mixed = mask.sum(-1, keepdim=True) < seen
    assert torch.equal((ds > 0) & mixed, mask & mixed)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_packed_views_are_read_in_place_and_their_gradients_match(op_backend, dropout_p):
    ready(op_backend)
    packed = torch.randn(2, 37, 3, 2, 24, requires_grad=True)
    views = [t.transpose(1, 2) for t in packed.unbind(2)]
    copies = [t.detach().contiguous().requires_grad_() for t in views]
    dout = torch.randn_like(copies[0])
    got, want = attention(views, dropout_p)[0], attention(copies, dropout_p)[0]
    assert torch.equal(got, want)
    dpacked = torch.autograd.grad(got, packed, dout)[0]
    for grad, like in zip(torch.autograd.grad(want, copies, dout), dpacked.unbind(2), strict=True):
        assert torch.equal(grad, like.transpose(1, 2))


def test_rows_of_an_odd_width_in_a_field_of_nan_are_read_alone(op_backend):
    ready(op_backend)
    tensors = [t.detach() for t in inputs((1, 2, 35, 35, 24))]
    wide = [torch.full((1, 2, 35, 33), torch.nan) for _ in tensors]
    for field, t in zip(wide, tensors, strict=True):
        field[..., :24] = t
    assert torch.equal(attention([field[..., :24] for field in wide])[0], attention(tensors)[0])


def test_a_last_axis_with_a_stride_gives_the_same_values(op_backend):
    ready(op_backend)
    tensors = [t.detach() for t in inputs((1, 2, 20, 20, 16))]
    strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors]
    assert torch.equal(attention(strided)[0], attention(tensors)[0])


def test_every_element_of_the_results_is_written(op_backend):
    ready(op_backend)
    # In this mode PyTorch fills new memory with nan.
    torch.use_deterministic_algorithms(True)
    try:
        tensors = inputs((2, 1, 35, 70, 24))
        out, _ = attention(tensors, 0.2)
        grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in (out, *grads))


def test_out_and_gradients_are_laid_out_by_position(op_backend):
    ready(op_backend)
    tensors = inputs((2, 3, 20, 33, 16))
    out, _ = attention(tensors)
    grads = torch.autograd.grad(out, tensors, torch.randn_like(out))
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, *grads))


@pytest.mark.parametrize("softmax_scale", [1e3, 3.0, 1e-30])
def test_extreme_scales_are_within_the_bound(op_backend, softmax_scale):
    ready(op_backend)
    tensors = inputs((1, 1, 40, 70, 16))
    scores = (tensors[0] @ tensors[1].transpose(2, 3)).abs().max().item() * softmax_scale
    check(tensors, 0.0, softmax_scale, max(1.0, scores))


@pytest.mark.parametrize("softmax_scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive_gives_the_formula(op_backend, softmax_scale):
    ready(op_backend)
    tensors = inputs((1, 1, 70, 70, 16))
    # Plain PyTorch in the book's order, and SDPA, scale the -inf of hidden scores and get nan.
    q, k, v = tensors
    seen = torch.ones(70, 70, dtype=torch.bool).tril()
    want = (q @ k.transpose(2, 3) * softmax_scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    got, _ = attention(tensors, softmax_scale=softmax_scale)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    dout = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(out, tensors, dout) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_dropping_everything_gives_zeros(op_backend):
    ready(op_backend)
    tensors = inputs((1, 1, 33, 33, 16))
    out, _ = attention(tensors, 1.0)
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert not any(t.any() for t in (out, *grads))


def test_two_runs_give_the_same_bits(op_backend):
    ready(op_backend)
    tensors = inputs((1, 2, 70, 70, 16))
    runs = [torch.autograd.grad(attention(tensors, 0.2)[0].sin().sum(), tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 16), (2, 0, 5, 5, 16), (1, 1, 0, 5, 16)], ids=str)
def test_empty_inputs_give_empty_outputs_and_zero_gradients(op_backend, shape):
    ready(op_backend)
    tensors = inputs(shape)
    out, _ = attention(tensors)
    assert out.shape == tensors[0].shape
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert not any(grad.any() for grad in grads)


def test_the_registered_op_passes_opcheck(op_backend):
    ready(op_backend)
    seed = torch.tensor(5, device="cpu")
    torch.library.opcheck(
        torch.ops.fastgpt.causal_attention.default,
        (*inputs((1, 1, 5, 9, 16)), seed, 0.25, 0.1, "triton"),
    )


def test_torch_compile_sees_one_graph_and_the_same_gradients(op_backend):
    ready(op_backend)
    tensors = inputs((1, 2, 20, 20, 16))

    def call(*leaves):
        return ops.causal_attention(*leaves, dropout_p=0.2, backend="triton")

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        out = function(*tensors)
        results.append((out, *torch.autograd.grad(out.sin().sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "text"), [({"head_dim": 257}, "up to 256"), ({"dtype": torch.float64}, "not float64")]
)
def test_what_the_kernels_do_not_take_is_refused_with_the_reason(op_backend, change, text):
    ready(op_backend)
    case = Case(op_backend.device, torch.float32, 64, True, False, False)._replace(**change)
    assert text in OP.why_not("triton", case)
