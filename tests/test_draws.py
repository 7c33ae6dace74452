"""Tokens drawn from a seed: kernels against plain PyTorch, the distribution, and the same tokens on every engine."""

from __future__ import annotations

import pytest
import torch
from generation_cases import small_model
from test_native_decoder import isa, threads  # noqa: F401

import fastgpt
from fastgpt.generation import Generator, fast_head
from fastgpt.generation.draws import draw, draw_reference
from fastgpt.ops import extension

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))

NAN, INF = float("nan"), float("inf")


def logits_of(batch, n, seed=0, scale=4.0):
    return scale * torch.randn(batch, n, generator=torch.Generator().manual_seed(seed))


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(67, (length,), generator=generator) for length in lengths]


def rows_of(generator, prompts, count=12, **options):
    return [row.tolist() for row in generator.generate(prompts, count, **{"temperature": 2.0, "seed": 5, **options})]


# The kernel.


@pytest.mark.parametrize("n", [1, 5, 16, 67, 1003])
@pytest.mark.parametrize("top_k", [None, 1, 2, 50, 150, 1003])
def test_the_kernel_draws_the_tokens_of_the_reference(n, top_k, isa, threads):  # noqa: F811
    if top_k is not None and top_k > n:
        return
    for seed in range(8):
        logits = logits_of(1 + seed % 5, n, seed)
        args = (0.3 + 0.2 * seed, top_k, seed * 0x9E3779B97F4A7C15 - 1, 3 * seed)
        assert torch.equal(draw(logits, *args), draw_reference(logits, *args)), seed


@pytest.mark.parametrize("n", [1, 5, 16, 67, 1003])
@pytest.mark.parametrize("top_k", [None, 1, 3, 50, 700])
@pytest.mark.parametrize("top_p", [1e-60, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_leaves_what_the_reference_leaves(n, top_k, top_p, isa, threads):  # noqa: F811
    if top_k is not None and top_k > n:
        return
    for seed in range(6):
        # From nearly even to one token with nearly everything.
        logits = logits_of(1 + seed % 5, n, seed, 0.5 * 2**seed) - 50.0
        args = (0.3 + 0.2 * seed, top_k, seed * 0x9E3779B97F4A7C15 - 1, 3 * seed, top_p)
        assert torch.equal(draw(logits, *args), draw_reference(logits, *args)), seed


@pytest.mark.parametrize("top_p", [0.2, 0.49, 0.74, 0.76])
def test_the_nucleus_is_the_smallest_set_and_what_ties_with_its_last(top_p, threads):  # noqa: F811
    # Probabilities 1/2, 1/4 and twice 1/8.
    logits = torch.tensor([-3.0, -1.0, -3.0, -2.0]) * torch.tensor(2.0).log()
    drawn = {int(draw(logits[None], 1.0, None, 3, number, top_p)) for number in range(300)}
    assert drawn == {0.2: {1}, 0.49: {1}, 0.74: {1, 3}, 0.76: {0, 1, 2, 3}}[top_p]


def test_a_whole_vocabulary_is_drawn_as_by_the_reference(threads):  # noqa: F811
    for scale in (0.0, 0.01, 2.0):
        logits = logits_of(4, 50257, 1, scale)
        for top_p in (None, 0.3, 0.95):
            args = (1.0, None, 3, 7, top_p)
            assert torch.equal(draw(logits, *args), draw_reference(logits, *args)), (scale, top_p)


@pytest.mark.parametrize("top_p", [None, 0.6])
@pytest.mark.parametrize("top_k", [None, 1, 3, 40])
@pytest.mark.parametrize("odd", [[NAN], [NAN] * 5, [INF], [-INF] * 60, [-INF] * 67, [9.0] * 6, [0.0, -0.0]], ids=str)
def test_numbers_that_are_not_finite_and_ties(odd, top_k, top_p, isa, threads):  # noqa: F811
    for seed in range(6):
        logits = logits_of(3, 67, seed)
        places = torch.randperm(67, generator=torch.Generator().manual_seed(seed))[: len(odd)]
        logits[:, places] = torch.tensor(odd)
        args = (0.7, top_k, seed, 1, top_p)
        assert torch.equal(draw(logits, *args), draw_reference(logits, *args)), seed


def test_rising_and_falling_logits_keep_the_largest(threads):  # noqa: F811
    for logits in (torch.arange(3000.0)[None], torch.arange(3000.0).flip(0)[None]):
        got = torch.cat([draw(logits, 1e-4, 100, 0, drawn) for drawn in range(200)])
        assert got.unique().numel() > 60 and bool((logits[0, got] >= 2900).all())


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.85)])
def test_drawn_frequencies_are_the_softmax(top_k, top_p):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -3.0]])
    tokens = draw(logits.expand(40000, -1), 1 / 1.7, top_k, 11, 0, top_p)
    # Each leaves the three likeliest, whose probabilities are 0.48, 0.27 and 0.15.
    logits = logits if top_k is None and top_p is None else logits.masked_fill(logits < 0.0, -torch.inf)
    want = torch.softmax(logits[0] / 1.7, 0)
    torch.testing.assert_close(torch.bincount(tokens, minlength=5) / 40000, want, rtol=0, atol=0.01)


def test_steps_are_drawn_independently():
    logits = torch.zeros(2, 4)
    tokens = torch.stack([draw(logits, 1.0, None, 1, drawn) for drawn in range(4000)])  # (drawn, row)
    pairs = torch.stack((tokens[1:, 0] * 4 + tokens[:-1, 0], tokens[1:, 0] * 4 + tokens[1:, 1]))
    counts = torch.stack([torch.bincount(pair, minlength=16) for pair in pairs]) / 3999
    torch.testing.assert_close(counts, torch.full((2, 16), 1 / 16), rtol=0, atol=0.017)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((1, 4, 1.0, 5, 1.0, 0, 0, 1), "top_k must be from 0 to 4"),
        ((1, 4, 1.0, -1, 1.0, 0, 0, 1), "top_k must be from 0 to 4"),
        ((1, 4, INF, 0, 1.0, 0, 0, 1), "inverse_temperature"),
        ((1, 4, -1.0, 0, 1.0, 0, 0, 1), "inverse_temperature"),
        ((1, 4, 1.0, 0, 0.0, 0, 0, 1), "top_p"),
        ((1, 4, 1.0, 0, 1.5, 0, 0, 1), "top_p"),
        ((1, 4, 1.0, 0, NAN, 0, 0, 1), "top_p"),
        ((1, 4, 1.0, 0, 1.0, 0, -1, 1), "drawn"),
        ((1, 4, 1.0, 0, 1.0, 0, 0, 0), "num_threads"),
        ((1, 0, 1.0, 0, 1.0, 0, 0, 1), "logits"),
        ((2**40, 2**40, 1.0, 0, 1.0, 0, 0, 1), "too large"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_draw(options, text):
    with pytest.raises(ValueError, match=text):
        extension.load("cpu").draw_tokens(64, 64, *options)


# Through the engines.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "int8", "int4"], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 9}, {"top_k": 1}, {"temperature": 1e-39}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9}],
    ids=str,
)
def test_many_tokens_a_call_are_those_of_one_token_a_call(dtype, options):
    generator = Generator(small_model(context_length=40), dtype)
    rows = rows_of(generator, prompts_of(4, 4), **options)
    steps = generator.stream(prompts_of(4, 4), 12, **{"temperature": 2.0, "seed": 5, **options})
    assert [row[4:] for row in rows] == torch.cat(list(steps), dim=1).tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.5}], ids=str)
def test_every_engine_draws_the_same_tokens(options):
    model, prompts = small_model(context_length=40), prompts_of(3, 7, 1)
    native = rows_of(Generator(model), prompts, **options)
    with fastgpt.use_backend("reference"):
        assert rows_of(Generator(model), prompts, **options) == native
    assert rows_of(Generator(lambda ids: model(ids)), prompts, **options) == native
    assert rows_of(Generator(model, torch.float64), prompts, **options) == native


def test_a_row_gets_the_same_tokens_whatever_the_others_are():
    generator = Generator(small_model(context_length=60))
    prompts = prompts_of(3, 7, 5)
    whole = rows_of(generator, prompts)
    assert rows_of(generator, prompts[:2]) == whole[:2]
    # A row that ends leaves the others as they are.
    eos_id = whole[0][6]
    for row, ended in zip(whole, rows_of(generator, prompts, eos_id=eos_id), strict=True):
        assert row[: len(ended)] == ended


def test_rows_of_one_prompt_are_drawn_differently():
    rows = rows_of(Generator(small_model(context_length=40)), prompts_of(4) * 5)
    assert len({tuple(row) for row in rows}) == 5


@pytest.mark.parametrize("overflow", ["exact", "slide", "stop"])
def test_past_the_context_the_draws_go_on(overflow):
    model, prompts = small_model(), prompts_of(3, 9)
    native = rows_of(Generator(model), prompts, 14, overflow=overflow)
    with fastgpt.use_backend("reference"):
        assert rows_of(Generator(model), prompts, 14, overflow=overflow) == native


def test_the_screened_head_draws_the_same_tokens(monkeypatch):
    monkeypatch.setattr(fast_head, "_SMALLEST", 0)
    model = small_model(context_length=60, vocab_size=900)
    for options in ({"top_k": 5}, {"top_k": 128}, {"top_k": 129}, {"top_k": 9, "top_p": 0.6}, {"top_p": 0.6}, {}):
        screened, plain = (Generator(model, shortcuts=shortcuts) for shortcuts in (True, False))
        assert rows_of(screened, prompts_of(3), 40, **options) == rows_of(plain, prompts_of(3), 40, **options)


def test_the_books_generate_takes_a_seed():
    model, idx = small_model(), prompts_of(4)[0][None]
    got = fastgpt.generate(model, idx, 6, 12, temperature=2.0, top_k=9, seed=5)
    assert got.tolist() == rows_of(Generator(model), idx, 6, top_k=9)


def test_other_seeds_draw_other_tokens():
    generator = Generator(small_model(context_length=60))
    seeds = (0, 1, -1, 2**40, 2**64 - 2)
    assert len({str(rows_of(generator, prompts_of(3), 30, seed=seed)) for seed in seeds}) == len(seeds)
