"""accelerate: which feed-forwards, blocks and models are joined, and that joined ones do what the reader wrote."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from handwritten import ACCEPTED, CFG, GPT, Block, assert_close, build, gradients, tokens
from torch import nn

from fastgpt import accelerate, ops, reference, restore
from fastgpt.acceleration.joined import FusedBlock, FusedFeedForward, FusedModel
from fastgpt.training import calc_loss_batch


def joined(model, kind):
    return [part for part in model.modules() if isinstance(part, kind)]


def swap_class(model, cls, path=""):
    """The model with another class on one of its modules, before it is accelerated."""
    model.get_submodule(path).__class__ = cls
    return model


@pytest.mark.parametrize("name", ACCEPTED)
def test_blocks_and_models_in_every_handwriting_are_joined(name):
    model = build(name)
    report = accelerate(model)
    assert len(joined(model, FusedBlock)) == len(joined(model, FusedFeedForward)) == CFG["n_layers"]
    assert isinstance(model, FusedModel)
    assert "2 feed-forwards, 2 blocks, 1 model" in str(report)


def test_the_books_own_model_is_joined_whole():
    model = reference.GPTModel(CFG | {"drop_rate": 0.1, "qkv_bias": False})
    accelerate(model)
    assert isinstance(model, FusedModel) and len(joined(model, FusedFeedForward)) == CFG["n_layers"]
    restore(model)
    assert type(model) is reference.GPTModel and type(model.trf_blocks[0].ff) is reference.FeedForward


class PostNorm(Block):
    def forward(self, x):
        x = self.norm1(x + self.drop_shortcut(self.att(x)))
        return self.norm2(x + self.drop_shortcut(self.ff(x)))


class DropsByFunction(Block):
    def forward(self, x):
        x = x + F.dropout(self.att(self.norm1(x)), 0.1, self.training)
        return x + F.dropout(self.ff(self.norm2(x)), 0.1, self.training)


class Halves(Block):
    def forward(self, x):
        return 0.5 * super().forward(x) + 0.5 * super().forward(x.flip(0)).flip(0)


class AddsInPlace(Block):
    def forward(self, x):
        x += self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class ScalesInTraining(Block):
    def forward(self, x):
        return super().forward(x) * (2.0 if self.training else 1.0)


class Counts(Block):
    seen = 0

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


@pytest.mark.parametrize("cls", [PostNorm, DropsByFunction, Halves, AddsInPlace, ScalesInTraining, Counts])
def test_a_block_that_does_something_else_is_not_joined_and_neither_is_its_model(cls):
    model = swap_class(build(), cls, "trf_blocks.1")
    accelerate(model)
    assert type(model.trf_blocks[1]) is cls and isinstance(model.trf_blocks[0], FusedBlock)
    assert type(model) is GPT
    idx = tokens()
    got = model(idx)
    assert_close(got, restore(model)(idx))


class ScalesEmbeddings(GPT):
    def forward(self, in_idx):
        x = 2.0 * self.tok_emb(in_idx) + self.pos_emb(torch.arange(in_idx.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(self.drop_emb(x))))


class SkipsABlock(GPT):
    def forward(self, in_idx):
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(torch.arange(in_idx.shape[1])))
        return self.out_head(self.final_norm(self.trf_blocks[1](x)))


class LastLogits(GPT):
    def forward(self, in_idx):
        return super().forward(in_idx)[:, -1]


@pytest.mark.parametrize("cls", [ScalesEmbeddings, SkipsABlock, LastLogits])
def test_a_model_that_does_something_else_is_not_joined_though_its_blocks_are(cls):
    model = swap_class(build(), cls)
    accelerate(model)
    assert type(model) is cls and len(joined(model, FusedBlock)) == CFG["n_layers"]


def test_a_joined_model_with_dropout_repeats_with_the_seed():
    model, idx = build(drop_rate=0.2).train(), tokens()
    accelerate(model)
    (first, grads), (second, same) = gradients(model, idx, 1), gradients(model, idx, 1)
    assert torch.equal(first, second) and all(torch.equal(grads[key], same[key]) for key in grads)
    assert not torch.equal(gradients(model, idx, 2)[0], first)


def test_dropouts_of_a_joined_model_are_right_on_average():
    model, idx = build(drop_rate=0.0, n_layers=1), tokens(1, 5)
    accelerate(model)
    block, x = model.trf_blocks[0], model.tok_emb(idx).detach()
    att = block.att(block.norm1(x))
    block.ff = nn.Linear(CFG["emb_dim"], CFG["emb_dim"])
    nn.init.zeros_(block.ff.weight), nn.init.zeros_(block.ff.bias)
    block.train().drop_shortcut.p = 0.5
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([block(x) for _ in range(300)]) - x
    assert_close(draws.mean(0), att, 0.3)
    dropped = draws.abs() < 1e-6
    assert 0.47 < dropped.float().mean() < 0.53
    assert_close(draws[~dropped], (2 * att.expand_as(draws))[~dropped])


@pytest.mark.parametrize("path", ["", "trf_blocks", "trf_blocks.0", "trf_blocks.0.ff", "trf_blocks.1.drop_shortcut"])
def test_a_hook_inside_a_joined_model_runs_and_may_change_what_it_sees(path):
    def trace(model):
        seen = []

        def note(module, args, out):
            seen.append(path)
            return 1.5 * out

        model.get_submodule(path).register_forward_hook(note)
        return model(tokens()), seen

    plain = reference.GPTModel(CFG | {"drop_rate": 0.0, "qkv_bias": False})
    fast = copy.deepcopy(plain)
    accelerate(fast)
    (want, calls), (got, fast_calls) = trace(plain), trace(fast)
    assert fast_calls == calls and calls
    assert_close(got, want)


@pytest.mark.parametrize("path", ["drop_emb", "trf_blocks.0.norm2", "trf_blocks.0.drop_shortcut", "final_norm"])
def test_a_part_that_was_replaced_is_used(path):
    class Twice(nn.Module):
        def forward(self, x):
            return 2.0 * x

    model, idx = build(), tokens()
    accelerate(model)
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, Twice())
    got = model(idx)
    assert_close(got, restore(model)(idx))


def test_too_long_an_input_and_an_unknown_token_are_index_errors_still():
    model = build()
    accelerate(model)
    with pytest.raises(IndexError):
        model(tokens(1, CFG["context_length"] + 1))
    with pytest.raises(IndexError):
        model(torch.tensor([[0, CFG["vocab_size"]]]))


def test_the_loss_of_an_accelerated_model_makes_no_logits(monkeypatch):
    model, idx = build(drop_rate=0.0), tokens()
    want = calc_loss_batch(idx[:, :-1], idx[:, 1:], model, "cpu")
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    accelerate(model)
    model.zero_grad()
    calls, own = [], ops.linear_cross_entropy
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda *args: calls.append(1) or own(*args))
    got = calc_loss_batch(idx[:, :-1], idx[:, 1:], model, "cpu")
    got.backward()
    assert calls == [1] and got.item() == pytest.approx(want.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, grads[name], 1e-4)


def test_the_loss_honours_hooks_on_the_head_and_on_the_model():
    for path in ("out_head", ""):
        model, idx = build(), tokens()
        accelerate(model)
        model.get_submodule(path).register_forward_hook(lambda module, args, out: 3.0 * out)
        want = F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
        assert calc_loss_batch(idx, idx, model, "cpu").item() == pytest.approx(want.item(), rel=1e-5)
