"""accelerate: what is recognised, with equal numbers before and after, and what is refused for which reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from handwritten import (
    ACCEPTED,
    CFG,
    HOT,
    REFUSED,
    MultiHeadAttention,
    assert_close,
    build,
    gradients,
    is_swapped,
    tokens,
)
from torch import nn

import fastgpt
from fastgpt import accelerate, attention_variants, reference, restore
from fastgpt.testing import assert_within_bound

accepted = pytest.mark.parametrize("name", ACCEPTED)
refused = pytest.mark.parametrize("name", REFUSED)


@accepted
def test_logits_gradients_and_greedy_tokens_stay(name):
    model, idx = build(name), tokens()
    model.tok_emb.weight.requires_grad_(False)
    want, want_grads = gradients(model, idx)
    want_tokens = reference.generate_text_simple(model, idx[:, :4], 9, CFG["context_length"])
    assert len(accelerate(model).swapped) == HOT
    got, got_grads = gradients(model, idx)
    assert_close(got, want)
    assert got_grads["tok_emb.weight"] is None and got_grads.keys() == want_grads.keys()
    for key, grad in want_grads.items():
        assert (grad is None) == (got_grads[key] is None), key
        if grad is not None:
            assert_close(got_grads[key], grad, 1e-4)
    assert torch.equal(reference.generate_text_simple(model, idx[:, :4], 9, CFG["context_length"]), want_tokens)


@accepted
def test_restored_models_give_the_old_bits(name):
    model, idx = build(name), tokens()
    before = [dict(vars(module)) for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    want, want_grads = gradients(model, idx)
    accelerate(model)
    model(idx)
    assert restore(model) is restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [vars(module).keys() for module in model.modules()] == [old.keys() for old in before]
    got, got_grads = gradients(model, idx)
    assert torch.equal(got, want)
    assert all(grad is got_grads[key] is None or torch.equal(grad, got_grads[key]) for key, grad in want_grads.items())


@refused
def test_what_computes_something_else_is_left_untouched_with_the_reason(name):
    model, (_, kind, words) = build(name, drop_rate=0.1), REFUSED[name]
    classes = {path: type(module) for path, module in model.named_modules()}
    report = accelerate(model)
    assert {row.kind for row in report.skipped} == {kind}
    for row in report.skipped:
        assert words in row.reason
        assert type(model.get_submodule(row.path)) is classes[row.path]
    assert {row.kind for row in report.swapped} == {"attention", "layer norm", "GELU"} - {kind}


@pytest.mark.parametrize("marks", [torch.zeros, torch.ones], ids=["zeros", "ones"])
def test_a_mask_that_is_not_causal_is_refused(marks):
    model = build()
    for block in model.trf_blocks:
        block.att.mask = marks(CFG["context_length"], CFG["context_length"])
    skipped = accelerate(model).skipped
    assert [row.path for row in skipped] == ["trf_blocks.0.att", "trf_blocks.1.att"]
    assert all("mask is not strictly causal" in row.reason for row in skipped)


def test_attention_without_mask_is_refused():
    skipped = accelerate(nn.ModuleList([attention_variants.SelfAttention_v2(8, 8)])).skipped
    assert "earlier outputs change when later tokens do" in skipped[0].reason


def test_an_output_projection_of_zeros_does_not_hide_another_formula():
    model = build("overridden")
    for block in model.trf_blocks:
        nn.init.zeros_(block.att.out_proj.weight)
    assert all("not plain causal attention" in row.reason for row in accelerate(model).skipped)
    assert len(accelerate(model).skipped) == 2


def test_a_forward_set_on_the_instance_is_refused():
    model = build()
    att = model.trf_blocks[0].att
    att.forward = lambda x: x
    assert "overridden on the instance" in accelerate(model).skipped[0].reason
    assert not is_swapped(att) and is_swapped(model.trf_blocks[1].att)


def test_bfloat16_is_at_least_as_near_to_the_truth():
    model, idx = build(), tokens()
    model.bfloat16()
    truth, naive = copy.deepcopy(model).float()(idx), model(idx)
    assert len(accelerate(model).swapped) == HOT
    assert_within_bound(model(idx), naive, truth)


def test_accelerating_twice_is_accelerating_once():
    model = build()
    first = accelerate(model)
    classes = [type(module) for module in model.modules()]
    assert accelerate(model) == first
    assert [type(module) for module in model.modules()] == classes


def test_a_full_cache_is_refused_with_what_to_do():
    model = build("cache_inside")
    model(tokens(), use_cache=True)
    assert "reset_cache" in accelerate(model).skipped[0].reason


def test_float64_gradients_pass_gradcheck():
    att = build().double().trf_blocks[0].att
    assert accelerate(att).swapped
    x = torch.randn(1, 4, CFG["emb_dim"], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(att, (x,))


def test_the_plain_reference_model_trains_with_equal_losses():
    cfg = CFG | {"drop_rate": 0.0, "qkv_bias": False}
    torch.manual_seed(0)
    plain = reference.GPTModel(cfg)
    fast = copy.deepcopy(plain)
    assert len(accelerate(fast).swapped) == HOT
    losses = []
    for model in (plain, fast):
        optimizer, idx = torch.optim.AdamW(model.parameters(), lr=1e-2), tokens(4, 20)
        losses.append([])
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = reference.GPTModel(CFG | {"drop_rate": 0.0, "qkv_bias": False})
    assert "meta device" in next(row for row in accelerate(model).skipped if row.kind == "layer norm").reason


def test_fastgpts_own_model_is_said_to_be_fast_already():
    model = fastgpt.GPTModel(CFG | {"drop_rate": 0.0, "qkv_bias": False})
    report = accelerate(model)
    assert not report.swapped and all("runs on the ops already" in row.reason for row in report.skipped)


def test_the_report_prints_as_a_table_with_blocks_put_together():
    text = str(accelerate(build("exact_gelu")))
    assert text.splitlines()[0] == "fastgpt runs 7 of 9 modules: 2 of 2 attention, 0 of 2 GELU, 5 of 5 layer norm."
    assert "trf_blocks.0-1.att" in text and "trf_blocks.0-1.ff.1" in text
    assert "ops.causal_attention" in text and "exact (erf)" in text
    assert max(map(len, text.splitlines())) <= 100
    assert accelerate(build("exact_gelu")).counts() == {"attention": (2, 2), "GELU": (0, 2), "layer norm": (5, 5)}


def test_a_model_without_hot_paths_says_what_is_looked_for():
    report = accelerate(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3)))
    assert report.rows == () and "W_query" in str(report)


def test_something_else_than_a_module_is_a_type_error():
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match="takes a model"):
            function({"emb_dim": 3})


@pytest.mark.parametrize("name", ["drop_shortcut", "packed_sdpa"])
def test_autocast_computes_in_its_own_dtype(name):
    model, idx = build(name), tokens()
    truth = model(idx)
    with torch.autocast("cpu", torch.bfloat16):
        naive = model(idx)
        accelerate(model)
        got = model(idx)
    assert_within_bound(got, naive, truth)


def test_leaf_modules_that_cannot_be_gelu_are_not_run():
    class Counter(nn.Module):
        calls = []

        def forward(self, x):
            self.calls.append(x)
            return x

    assert accelerate(nn.Sequential(Counter(), nn.Tanh())).rows == () and Counter.calls == []


def test_a_class_that_pickles_its_own_way_is_refused():
    class Attention(MultiHeadAttention):
        def __reduce__(self):
            return super().__reduce__()

    assert "own way of being pickled" in accelerate(Attention(24, 24, 0.0, 3, True)).skipped[0].reason


def test_the_librarys_generation_takes_accelerated_models():
    model, idx = build("lora"), tokens(2, 5)
    want = fastgpt.generate(model, idx, 8, CFG["context_length"])
    accelerate(model)
    assert torch.equal(fastgpt.generate(model, idx, 8, CFG["context_length"]), want)
