"""Guesses from the text so far: the tokens stay the model's own, and fewer steps give them."""

from __future__ import annotations

import pytest
import torch
from generation_cases import random_case, small_model

from fastgpt.generation import Generator
from fastgpt.generation.native_engine import NativeDecoder
from fastgpt.generation.prompt_lookup import PromptLookup
from fastgpt.ops import extension

needs_cpu = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))


def lookup_of(ids, length=4):
    lookup = PromptLookup()
    lookup.extend(ids)
    lookup._length = length
    return lookup


# Finding guesses.


def test_a_guess_is_what_followed_the_last_tokens_before():
    assert lookup_of([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]).guess(4) == [4, 5, 6, 7]


def test_three_tokens_count_more_than_two_newer_ones():
    assert lookup_of([1, 2, 3, 4, 9, 2, 3, 8, 1, 2, 3], length=1).guess(4) == [4]


def test_a_circle_is_guessed_beyond_the_end_of_the_text():
    assert lookup_of([7, 8, 7, 8, 7], length=6).guess(6) == [8, 7, 8, 7, 8, 7]


def test_new_text_gives_no_guess():
    assert lookup_of([1, 2, 3, 4, 5]).guess(4) == []
    assert lookup_of([]).guess(4) == []


def test_guesses_that_fail_lead_to_longer_and_longer_rests():
    lookup, rests = lookup_of([1, 2, 1, 2]), []
    for _ in range(3):
        while not lookup.resting:
            lookup.learn(guessed=4, accepted=0, seconds=1.2, seconds_a_token=1.0)
        rests.append(lookup._rest)
        lookup.extend([1] * lookup._rest)
        assert not lookup.resting
    assert rests == sorted(set(rests))


def test_guesses_grow_while_they_are_right():
    lookup = lookup_of([1, 2, 1, 2, 1])
    lookup.learn(guessed=4, accepted=4, seconds=1.5, seconds_a_token=1.0)
    assert len(lookup.guess(63)) == 8


# The model's own tokens.


def repeating_model():
    """Token t is followed by t + 1 within 0 .. 7, whatever stood before."""
    model = small_model(context_length=64)
    with torch.no_grad():
        model.tok_emb.weight.mul_(8.0)
        rows = torch.randn_like(model.out_head.weight) * 0.01
        rows[(torch.arange(8) + 1) % 8] = model.tok_emb.weight[:8]
        model.out_head.weight.copy_(rows)
        for block in model.trf_blocks:
            block.att.out_proj.weight.mul_(0.01)
            block.ff.layers[2].weight.mul_(0.01)
    return model


@needs_cpu
def test_repetitive_text_takes_fewer_steps(monkeypatch):
    model = repeating_model()
    prompt = torch.arange(8)[None].repeat(1, 2)
    want = Generator(model, shortcuts=False).generate(prompt, 40)
    assert len(set(want[0, 16:].tolist())) == 8
    steps = []
    step = NativeDecoder.step
    monkeypatch.setattr(NativeDecoder, "step", lambda self, *a, **k: steps.append(1) or step(self, *a, **k))
    generate = NativeDecoder.generate
    monkeypatch.setattr(NativeDecoder, "generate", lambda self, *a: steps.extend([1] * a[3]) or generate(self, *a))
    # The timer of a tiny model says nothing about what a guess costs.
    learn = PromptLookup.learn
    monkeypatch.setattr(PromptLookup, "learn", lambda self, g, a, s, t: learn(self, g, a, s, None))
    assert torch.equal(Generator(model).generate(prompt, 40), want)
    assert len(steps) <= 20


@needs_cpu
@pytest.mark.parametrize("eos_id", [None, 5])
@pytest.mark.parametrize("overflow", ["exact", "stop", "slide"])
def test_tokens_are_those_without_guesses(eos_id, overflow):
    model = repeating_model()
    for begin in range(1, 20, 3):
        prompt = [(torch.arange(begin) % 8).tolist()]
        options = {"eos_id": eos_id, "overflow": overflow}
        got, want = (Generator(model, shortcuts=on).generate(prompt, 70, **options)[0] for on in (True, False))
        assert torch.equal(got, want)


@needs_cpu
def test_a_stream_gives_the_same_tokens():
    model = repeating_model()
    prompt = torch.arange(8)[None].repeat(1, 2)
    streams = [torch.cat(list(Generator(model, shortcuts=on).stream(prompt, 30)), dim=1) for on in (True, False)]
    assert torch.equal(*streams)


@needs_cpu
@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_random_models_and_prompts(seed):
    case = random_case(seed)
    prompt = case.prompts[:1].repeat(1, 2)[:, : case.context_length]
    results = [Generator(case.model, shortcuts=on).generate(prompt, 25) for on in (True, False)]
    assert torch.equal(*results)
