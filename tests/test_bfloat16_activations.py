"""bfloat16_activations: the same forward, less memory, gradients within a bound, and the curve of float32."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from test_loss_curve import curve

import fastgpt
from fastgpt import ops
from fastgpt.memory import bfloat16_activations
from fastgpt.ops import extension
from fastgpt.training import calc_loss_batch

CFG = {
    "vocab_size": 300, "context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 3, "drop_rate": 0.1,
    "qkv_bias": True,
}  # fmt: skip
# bfloat16 rounds by at most 2^-8 of a number, and a gradient is a sum of products of such; 0.0034 was seen.
GRADIENT_BOUND = 2**-7
# Of 200 losses that fall from 5.16 to 2.47; 0.00005 was seen.
CURVE_BOUND = 0.001


@pytest.fixture(autouse=True)
def own_kernels():
    """The rooms' own backward for small tensors too: PyTorch's keeps float32."""
    reason = extension.why_not("cpu")
    if reason:
        pytest.skip(reason)
    with ops.use_backend("cpu"):
        yield


def step(compact):
    """Loss, gradients by name, and the bytes of each dtype that backward was given."""
    torch.manual_seed(0)
    model = fastgpt.GPTModel(CFG)
    ids = torch.randint(300, (2, 65))
    kept: dict[int, torch.Tensor] = {}
    with (
        bfloat16_activations() if compact else nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t),
    ):
        loss = calc_loss_batch(ids[:, :-1], ids[:, 1:], model, "cpu")
    loss.backward()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    held = sum(t.nbytes for address, t in kept.items() if address not in own)
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}, held


def test_the_loss_is_the_same_to_the_bit_and_half_the_memory_is_kept():
    (loss, _, held), (compact_loss, _, compact_held) = step(False), step(True)
    assert torch.equal(loss, compact_loss)
    # The output of attention is kept once in float32, twice in bfloat16.
    assert compact_held < 0.6 * held, (compact_held, held)


def test_gradients_are_within_the_bound_of_float32s():
    (_, wanted, _), (_, got, _) = step(False), step(True)
    errors = {name: ((got[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}
    # The keys' bias moves no softmax: its gradient is rounding alone.
    del (
        errors["trf_blocks.0.att.W_key.bias"],
        errors["trf_blocks.1.att.W_key.bias"],
        errors["trf_blocks.2.att.W_key.bias"],
    )
    assert 0 < max(errors.values()) < GRADIENT_BOUND, max(errors.items(), key=lambda item: item[1])


def test_200_losses_follow_float32(one_thread):
    wanted = curve(fastgpt.GPTModel, torch.float32)
    with bfloat16_activations():
        got = curve(fastgpt.GPTModel, torch.float32)
    assert got[0] == wanted[0] and got[-1] < 0.75 * got[0]
    assert 0 < (got - wanted).abs().max() < CURVE_BOUND, (got - wanted).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rooms_that_the_model_does_not_use_keep_their_activations_in_half_too(dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((40, 64), (64,), (64,)))
    q = torch.randn(1, 2, 40, 32).to(dtype).requires_grad_()
    for run, leaves in (
        (lambda: ops.layer_norm(x, weight, bias, 1e-5), (x, weight, bias)),
        (lambda: ops.gelu(x, bias), (x, bias)),
        (lambda: ops.causal_attention(q, q, q), (q,)),
        (lambda: ops.dropout_add_layer_norm(x, x, weight, bias, dropout_p=0.1)[1], (x, weight, bias)),
    ):
        torch.manual_seed(1)
        wanted = torch.autograd.grad(run().square().sum(), leaves)
        torch.manual_seed(1)
        with bfloat16_activations():
            got = torch.autograd.grad(run().square().sum(), leaves)
        for one, other in zip(got, wanted, strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other) if dtype == torch.bfloat16 else (one - other).norm() < 2**-6 * other.norm()


def test_outside_everything_is_as_before():
    with bfloat16_activations():
        pass
    (_, before, held), (_, after, held_after) = step(False), step(False)
    assert held == held_after and all(torch.equal(before[name], after[name]) for name in before)
