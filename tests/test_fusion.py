"""fusion: neighbours join into one op, and whatever stands between them is still called."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import fusion, ops, reference
from fastgpt.finetuning.lora import LinearWithLoRA
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast, convert_state_dict
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound
from fastgpt.training import calc_loss_batch

CFG = {
    "vocab_size": 97,
    "context_length": 12,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 3,
    "drop_rate": 0.0,
    "qkv_bias": True,
}


def twins(cfg=CFG, seed=123):
    torch.manual_seed(seed)
    fused = GPTModel(cfg)
    plain = reference.GPTModel(cfg)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def tokens(seed=7, batch=2):
    torch.manual_seed(seed)
    return torch.randint(0, CFG["vocab_size"], (batch, CFG["context_length"]))


def assert_same_logits(fused, plain):
    idx = tokens()
    assert_within_bound(fused(idx), plain(idx), copy.deepcopy(plain).double()(idx))


class Doubled(nn.Module):
    """A reader's own layer around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2.0 * self.inner(x)


PLACES = [
    *("trf_blocks.1", "trf_blocks.1.att", "trf_blocks.1.ff", "trf_blocks.0.norm1", "trf_blocks.1.norm1"),
    *("trf_blocks.1.norm2", "final_norm", "trf_blocks", "trf_blocks.1.drop_shortcut", "trf_blocks.1.att.W_key"),
    *("trf_blocks.1.att.out_proj", "trf_blocks.1.ff.layers.0", "trf_blocks.1.ff.layers.1", "trf_blocks.1.ff.layers.2"),
    *("out_head", "drop_emb"),
]


def replace(model, path):
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, Doubled(getattr(owner, name)))


@pytest.mark.parametrize("path", PLACES)
def test_a_module_in_the_place_of_another_is_called(path):
    fused, plain = twins()
    before = plain(tokens())
    for model in (fused, plain):
        replace(model, path)
    assert_same_logits(fused, plain)
    assert not torch.allclose(plain(tokens()), before)


@pytest.mark.parametrize("path", PLACES)
def test_a_hook_that_changes_the_output_is_obeyed(path):
    fused, plain = twins()
    for model in (fused, plain):
        model.get_submodule(path).register_forward_hook(lambda module, args, out: 2.0 * out)
    assert_same_logits(fused, plain)


@pytest.mark.parametrize("path", PLACES)
def test_a_forward_put_on_the_instance_is_obeyed(path):
    fused, plain = twins()
    for model in (fused, plain):
        module = model.get_submodule(path)
        module.forward = lambda x, module=module: 3.0 * type(module).forward(module, x)
    torch.testing.assert_close(fused(tokens()), plain(tokens()), rtol=1e-4, atol=1e-5)


def test_lora_on_one_projection_is_called():
    fused, plain = twins()
    for model in (fused, plain):
        torch.manual_seed(5)
        att = model.trf_blocks[1].att
        att.W_value = LinearWithLoRA(att.W_value, 4, 8)
        nn.init.normal_(att.W_value.lora.B)
    assert_same_logits(fused, plain)


def test_projections_that_differ_in_bias_are_not_packed():
    fused, plain = twins()
    for model in (fused, plain):
        model.trf_blocks[0].att.W_key.bias = None
    assert_same_logits(fused, plain)


@pytest.mark.parametrize("layers", [1, 3])
def test_dropout_draws_the_plain_models_numbers_in_the_reference_mode(layers):
    fused, plain = twins(CFG | {"drop_rate": 0.25, "n_layers": layers})
    idx = tokens()
    with ops.use_backend("reference"):
        torch.manual_seed(3)
        got = fused(idx)
    torch.manual_seed(3)
    torch.testing.assert_close(got, plain(idx), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_class", [GPTModel, GPTModelFast])
def test_the_loss_without_logits_is_the_loss_of_the_logits_with_its_gradients(model_class):
    torch.manual_seed(0)
    fused = model_class(CFG)
    plain = reference.GPTModel(CFG)
    plain.load_state_dict(convert_state_dict(fused.state_dict(), "book"))
    targets = tokens(8)
    targets[0, :5] = -100

    def run(model, dtype=torch.float32):
        model = copy.deepcopy(model).to(dtype)
        loss = calc_loss_batch(tokens(), targets, model, "cpu")
        loss.backward()
        state = {name: p.grad for name, p in model.named_parameters()}
        return {"loss": loss.detach(), **(convert_state_dict(state, "book") if model_class is GPTModelFast else state)}

    got = run(fused)
    naive, truth = run(plain), run(plain, torch.float64)
    if model_class is GPTModelFast:
        got = convert_state_dict(got, "book")
    for name in truth:
        assert_within_bound(got[name], naive[name], truth[name], factor=GRADIENT_FACTOR)


def test_a_hooked_model_is_called_for_its_loss():
    fused, plain = twins()
    for model in (fused, plain):
        model.register_forward_hook(lambda module, args, out: 0.5 * out)
    got, want = (calc_loss_batch(tokens(), tokens(8), model, "cpu") for model in (fused, plain))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_the_loss_makes_no_tensor_of_all_logits(monkeypatch):
    torch.manual_seed(0)
    fused = GPTModel(CFG | {"vocab_size": 5000})
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)
            )
            return out

    idx = torch.randint(5000, (400, 12))
    with Watch():
        calc_loss_batch(idx, idx, fused, "cpu").backward()
    assert max(sizes) < 400 * 12 * 5000 / 2


def test_under_autocast_the_sum_stays_float32():
    fused, plain = twins()
    idx = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        got, naive = fused.hidden_states(idx), plain(idx)
    assert got.dtype == torch.float32 and naive.dtype == torch.bfloat16


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_p_is_the_share_of_this_moment(p):
    drop = nn.Dropout(p)
    assert fusion.dropout_p(drop) == p
    assert fusion.dropout_p(drop.eval()) == 0.0
    assert fusion.dropout_p(nn.Identity()) == 0.0
    assert fusion.dropout_p(nn.Dropout1d(p)) is None


def test_a_module_compiled_in_place_is_not_plain():
    layer = nn.Linear(3, 3)
    assert fusion.is_plain(layer, nn.Linear)
    layer.compile(backend="eager")
    assert not fusion.is_plain(layer, nn.Linear)


def test_cross_entropy_of_a_head_with_bias_takes_the_logits():
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 11), torch.randn(2, 3, 8)
    targets = torch.randint(11, (2, 3))
    want = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(fusion.loss(hidden, head, targets), want)
