"""The screened head: the tokens and the largest logits of the full head, to the bit."""

from __future__ import annotations

import pytest
import torch
from generation_cases import SMALL, random_model

from fastgpt.generation import Generator, fast_head
from fastgpt.generation.fast_head import HeadCopy
from fastgpt.generation.native_engine import NativeDecoder
from fastgpt.generation.native_weights import NativeWeights
from fastgpt.generation.network import read_network
from fastgpt.model import GPTModel
from fastgpt.ops import extension

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))

ISAS = extension.load("cpu").available_isas() if extension.why_not("cpu") is None else []
COUNT = 5


@pytest.fixture(params=ISAS)
def isa(request):
    module = extension.load("cpu")
    before = module.isa()
    module.select_isa(request.param)
    yield request.param
    module.select_isa(before)


@pytest.fixture(params=[1, 2, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(NativeDecoder, "threads", lambda self: request.param)


def model_of(width=24, vocab=1003, seed=0):
    n_heads = 4 if width % 4 == 0 else 1
    return random_model(GPTModel, SMALL | {"emb_dim": width, "n_heads": n_heads, "vocab_size": vocab}, seed)


class Pair:
    """A decoder with the full head, and one with the screened head."""

    def __init__(self, model):
        self.model = model
        self.full, self.screened = (NativeDecoder(NativeWeights(read_network(model)), 1, 12) for _ in range(2))
        self.copy = HeadCopy()
        self.kept = self.copy.attach(self.screened.weights.decoder, model.out_head.weight.detach())
        vocab = model.tok_emb.weight.shape[0]
        self.entries = (torch.randint(vocab, (COUNT,), generator=torch.Generator().manual_seed(1)),
                        torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT))  # fmt: skip

    def counts(self):
        return self.screened.weights.decoder.screen_counts()

    def check(self, top_k=1, screened=True):
        """The best token, and the logits that are among the largest."""
        logits, best = self.full.step(*self.entries, best=True)
        _, got_best = self.screened.step(*self.entries, logits=False, best=True)
        assert torch.equal(got_best, best)
        got, got_best = self.screened.step(*self.entries, best=True, top_k=top_k)
        assert torch.equal(got_best, best)
        if logits.isnan().any():
            return  # There is no k-th largest.
        kth = logits.topk(top_k).values[:, -1:]
        for row in (logits, got):
            row.masked_fill_(row < kth, -torch.inf)
        torch.testing.assert_close(got, logits, rtol=0, atol=0)
        assert (self.counts()[0] > 0) == screened, self.counts()


# Numbers.


@pytest.mark.parametrize("width", [1, 7, 24, 63, 64, 65, 130])
def test_best_and_largest_logits_are_those_of_the_full_head(isa, threads, width):
    Pair(model_of(width)).check(top_k=7)


@pytest.mark.parametrize("seed", range(40))
def test_random_heads_of_all_scales(seed):
    draw = torch.Generator().manual_seed(seed)
    model = model_of(24, 400, seed)
    with torch.no_grad():
        weight = model.out_head.weight
        weight *= 10.0 ** (6 * torch.rand((400, 1), generator=draw) - 3 if seed % 2 else 3.0)
        # Inputs that stand out, as trained models have them.
        model.final_norm.scale[torch.randint(24, (3,), generator=draw)] *= 50.0
        # Many rows that are nearly the same.
        weight[100:200] = weight[100] + 1e-3 * torch.randn((100, 24), generator=draw) * weight[100].abs()
    pair = Pair(model)
    logits, best = pair.full.step(*pair.entries, best=True)
    assert torch.equal(pair.screened.step(*pair.entries, logits=False, best=True)[1], best)


def test_equal_rows_give_the_first_of_them(threads):
    model = model_of()
    with torch.no_grad():
        model.out_head.weight[500:] = model.out_head.weight[:503].clone()
    Pair(model).check(top_k=3)


def test_rows_that_are_not_finite_are_never_left_out(threads):
    for value in (torch.nan, torch.inf, -torch.inf):
        model = model_of()
        with torch.no_grad():
            model.out_head.weight[700, 3] = value
        Pair(model).check(top_k=3)


def test_rows_of_zeros_and_of_tiny_and_huge_numbers(threads):
    model = model_of()
    with torch.no_grad():
        model.out_head.weight[::3] = 0.0
        model.out_head.weight[1::9] *= 1e-36
        model.out_head.weight[11] *= 1e30
    Pair(model).check(top_k=20)


def test_inputs_that_are_not_finite_or_zero_take_the_full_head():
    for scale in (torch.nan, torch.inf, 0.0):
        model = model_of()
        with torch.no_grad():
            model.final_norm.scale.fill_(scale)
            model.final_norm.shift.zero_()
        pair = Pair(model)
        best = pair.full.step(*pair.entries, logits=False, best=True)[1]
        assert torch.equal(pair.screened.step(*pair.entries, logits=False, best=True)[1], best)
        assert pair.counts()[0] == 0


def test_a_head_that_leaves_too_much_is_multiplied_in_full():
    model = model_of()
    with torch.no_grad():
        model.out_head.weight[:] = model.out_head.weight[0]
    Pair(model).check(screened=False)


# Changed weights.


def test_an_edit_behind_the_back_of_the_copy_is_found():
    pair = Pair(model_of())
    pair.check()
    pair.model.out_head.weight.data.mul_(-1.0)
    pair.check()
    assert pair.counts()[3] == 1


def test_the_copy_follows_a_training_step(monkeypatch):
    monkeypatch.setattr(fast_head, "_SMALLEST", 0)
    monkeypatch.setattr(fast_head, "_WORTH_TOKENS", 0)
    model = model_of()
    quick, plain = Generator(model), Generator(model, shortcuts=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        assert torch.equal(quick.generate([[1, 2, 3]], 9)[0], plain.generate([[1, 2, 3]], 9)[0])
        model(torch.tensor([[4, 5, 6]])).logsumexp(-1).sum().backward()
        optimizer.step()


def test_drawn_tokens_are_those_of_the_full_head(monkeypatch):
    monkeypatch.setattr(fast_head, "_SMALLEST", 0)
    monkeypatch.setattr(fast_head, "_WORTH_TOKENS", 0)
    model = model_of()
    options = {"temperature": 1.4, "top_k": 5, "seed": 7}
    for prompts in ([[1, 2, 3]], [[1, 2, 3], [9], [4, 4, 4, 4]]):
        for got, want in zip(
            Generator(model).generate(prompts, 8, **options),
            Generator(model, shortcuts=False).generate(prompts, 8, **options),
            strict=True,
        ):
            assert torch.equal(got, want)


# Refusals.


def test_a_copy_without_a_head_and_too_many_wanted_are_refused():
    decoder = extension.load("cpu").Decoder(1, 24, 4, 6, 96, 67, 12, 67)
    with pytest.raises(ValueError, match="head must be set"):
        decoder.set_screen(64, 64)
    pair = Pair(model_of())
    with pytest.raises(ValueError, match="top_k"):
        pair.screened.step(*pair.entries, top_k=fast_head.MOST_TOP + 1)
