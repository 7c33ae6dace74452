"""Sampling: the book's order of steps, top_k, top_p, and the distribution that comes out."""

from __future__ import annotations

import pytest
import torch

from fastgpt.generation.sampling import Sampling


def chosen(sampling, logits, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return sampling.choose(logits)


def frequencies(sampling, logits, draws=20000):
    tokens = chosen(sampling, logits.expand(draws, -1), 0)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


def test_temperature_zero_takes_the_first_of_the_largest():
    assert Sampling().choose(torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])).tolist() == [1, 0]


def test_drawn_frequencies_are_the_softmax_at_that_temperature():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    got = frequencies(Sampling(temperature=1.7), logits)
    torch.testing.assert_close(got, torch.softmax(logits[0] / 1.7, 0), rtol=0, atol=0.012)


def test_top_k_draws_only_from_the_k_likeliest():
    got = frequencies(Sampling(temperature=1.0, top_k=2), torch.tensor([[1.0, 0.0, -1.0, 2.0]]))
    want = torch.tensor([0.2689, 0, 0, 0.7311])
    torch.testing.assert_close(got, want, rtol=0, atol=0.012)


def test_top_k_keeps_ties_with_the_last_of_them():
    got = frequencies(Sampling(temperature=1.0, top_k=2), torch.tensor([[3.0, 1.0, 1.0, 0.0]]))
    assert (got > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [3]), (0.5, [3]), (0.51, [0, 3]), (0.8, [0, 3]), (0.81, [0, 2, 3]), (1.0, [0, 1, 2, 3]), (1e-9, [3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits = torch.tensor([[0.3, 0.05, 0.15, 0.5]]).log()
    got = frequencies(Sampling(temperature=1.0, top_p=top_p), logits)
    assert got.nonzero().flatten().tolist() == kept


def test_top_p_keeps_ties_with_the_last_of_them():
    got = frequencies(Sampling(temperature=1.0, top_p=0.5), torch.zeros(1, 4))
    assert (got > 0).all()


def test_top_p_counts_after_top_k_and_temperature():
    # With top_k=2 the two are 0.62 and 0.38; without it 0.5 and 0.3, and top_p=0.6 would keep both.
    logits = torch.tensor([[0.3, 0.05, 0.15, 0.5]]).log()
    got = frequencies(Sampling(temperature=1.0, top_k=2, top_p=0.6), logits)
    assert got.nonzero().flatten().tolist() == [3]


def test_top_p_of_one_changes_no_draw():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    draws = [chosen(Sampling(1.0, top_p=top_p), logits, 3) for top_p in (None, 1.0)]
    assert torch.equal(*draws)


def test_each_row_has_its_own_nucleus():
    logits = torch.tensor([[10.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).repeat(500, 1)
    tokens = chosen(Sampling(1.0, top_p=0.9), logits, 3).view(500, 2)
    assert set(tokens[:, 0].tolist()) == {0} and set(tokens[:, 1].tolist()) == {0, 1, 2}


def test_a_step_draws_one_multinomial_over_the_whole_batch():
    logits = torch.randn(3, 40)
    torch.manual_seed(4)
    want = torch.multinomial(torch.softmax(logits / 0.8 - (logits / 0.8).max(-1, True).values, -1), 1).squeeze(1)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    assert torch.equal(Sampling(0.8).choose(logits), want)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_drawn_from(dtype):
    logits = torch.tensor([[9.0, 0.0, 0.0, 8.0]], dtype=dtype)
    got = frequencies(Sampling(1.0, top_k=3, top_p=0.9), logits, 2000)
    assert got.nonzero().flatten().tolist() == [0, 3]


def test_extreme_logits_give_no_nan():
    tokens = Sampling(1e-3).choose(torch.tensor([[1e4, -1e4, 0.0], [-1e30, -1e30, -3e30]]))
    assert tokens[0] == 0 and tokens[1] in (0, 1)


def test_top_k_beyond_the_vocabulary_is_refused_even_when_greedy():
    with pytest.raises(ValueError, match="only 3 tokens"):
        Sampling(top_k=4).choose(torch.zeros(1, 3))
