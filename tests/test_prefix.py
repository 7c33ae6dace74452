"""The cache of the last prompt: the tokens of a Generator that keeps nothing, and nothing old after a change."""

from __future__ import annotations

import copy

import pytest
import torch
from generation_cases import SMALL, random_model
from test_native_decoder import tokens_of

from fastgpt.generation import Generator
from fastgpt.generation.native_engine import NativeDecoder
from fastgpt.model import GPTModel
from fastgpt.ops import extension

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))
CFG = SMALL | {"context_length": 90, "emb_dim": 32, "n_heads": 2, "vocab_size": 70}


@pytest.fixture
def entries(monkeypatch):
    """How many entries each step of a prompt reads."""
    counts, step = [], NativeDecoder.step

    def counted(self, tokens, *args, **kwargs):
        counts.append(len(tokens))
        return step(self, tokens, *args, **kwargs)

    monkeypatch.setattr(NativeDecoder, "step", counted)
    return counts


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "int8", "int4"], ids=str)
def test_a_conversation_gets_the_tokens_of_a_fresh_generator(dtype):
    for seed in range(4):
        model = random_model(GPTModel, CFG, seed)
        kept, ids = Generator(model, dtype), tokens_of(model, 1, 20, seed=seed)
        for turn in range(4):
            options = {"temperature": 0.8, "top_k": 9, "seed": 3} if turn == 2 else {}
            want = Generator(model, dtype, shortcuts=False).generate(ids, 6, **options)
            got = kept.generate(ids, 6, **options)
            assert torch.equal(got, want)
            # Another end than the one that was generated, and once a shorter text.
            ids = torch.cat([got[:, :-3] if turn else got[:, :18], tokens_of(model, 1, 5, seed=turn)], dim=1)


def test_only_what_is_new_is_read(entries):
    model = random_model(GPTModel, CFG, 0)
    generator, ids = Generator(model, "int8"), tokens_of(model, 1, 40)
    first = generator.generate(ids, 5)
    entries.clear()
    generator.generate(torch.cat([first, tokens_of(model, 1, 3)], dim=1), 1)
    # The last token of the first answer was chosen but never read.
    assert entries == [4]
    for prompt in (first.flip(1), torch.cat([first, first]), first[:, :8]):
        entries.clear()
        generator.generate(prompt, 1)
        assert entries == [prompt.numel()]


def test_a_stream_that_is_left_keeps_what_it_read(entries):
    model = random_model(GPTModel, CFG, 0)
    generator, ids = Generator(model, "int8"), tokens_of(model, 1, 40)
    stream = generator.stream(ids, 20)
    new = torch.cat([next(stream) for _ in range(4)], dim=1)
    # While it runs, nobody else has its cache.
    entries.clear()
    want = generator.generate(ids, 9)
    assert entries[0] == 40
    stream.close()
    entries.clear()
    assert torch.equal(generator.generate(torch.cat([ids, new], dim=1), 5), want)
    assert entries[0] == 1


@pytest.mark.parametrize("dtype", [None, "int8"], ids=str)
@pytest.mark.parametrize("change", ["in place", "replaced", "data", "while it runs"])
def test_changed_weights_are_read_anew(dtype, change):
    model = random_model(GPTModel, CFG, 1)
    generator, ids = Generator(model, dtype), tokens_of(model, 1, 40)
    stream = generator.stream(ids, 9)
    next(stream)
    if change != "while it runs":
        list(stream)
    weight = model.trf_blocks[0].att.W_value.weight
    with torch.no_grad():
        if change == "replaced":
            model.trf_blocks[0].att.W_value.weight = torch.nn.Parameter(-weight)
        elif change == "data":
            weight.data.neg_()
            generator.refresh()
        else:
            weight.neg_()
    list(stream)
    fresh = Generator(copy.deepcopy(model), dtype, shortcuts=False)
    assert torch.equal(generator.generate(ids, 9), fresh.generate(ids, 9))


def test_forget_gives_the_cache_back(entries):
    model = random_model(GPTModel, CFG, 0)
    generator, ids = Generator(model, "int8"), tokens_of(model, 1, 40)
    generator.generate(ids, 2)
    generator.forget()
    entries.clear()
    generator.generate(ids, 1)
    assert entries == [40]


def test_past_the_context_nothing_old_is_used():
    model = random_model(GPTModel, CFG, 0)
    for overflow in ("exact", "slide", "stop"):
        generator, ids = Generator(model), tokens_of(model, 1, 85)
        for n_new in (12, 3, 12):
            want = Generator(model, shortcuts=False).generate(ids, n_new, overflow=overflow)
            assert torch.equal(generator.generate(ids, n_new, overflow=overflow), want)
