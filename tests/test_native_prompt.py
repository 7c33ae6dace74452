"""Prompts in the native decoder: tiles of attention, and a last layer for the wanted entries alone."""

from __future__ import annotations

import copy

import pytest
import torch
from test_native_decoder import SHAPES, decoder_of, isa, model_of, threads, tokens_of  # noqa: F401
from test_native_packed import PRECISIONS

from fastgpt.generation.native_engine import NativeDecoder
from fastgpt.generation.native_weights import NativeWeights, Packs
from fastgpt.generation.network import read_network
from fastgpt.ops import extension
from fastgpt.testing import assert_within_bound

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_behind_a_prompt_are_within_the_bound(shape, isa, threads):  # noqa: F811
    # Four models together: how far off the worst logit of one is, is chance.
    results = []
    for seed in range(4):
        model = model_of(*shape, seed=seed)
        ids, positions = tokens_of(model, 1, shape[2], seed=seed), torch.arange(shape[2])
        with torch.no_grad():
            naive, truth = model(ids)[0], copy.deepcopy(model).double()(ids)[0]
        got, best = decoder_of(model).step(ids[0], torch.zeros_like(positions), positions, best=True, prompt=True)
        assert torch.equal(best, got.argmax(dim=1))
        results.append((got, naive, truth))
    assert_within_bound(*(torch.cat(parts) for parts in zip(*results, strict=True)))


@pytest.mark.parametrize("precision", [None, *PRECISIONS], ids=str)
def test_a_prompt_cut_into_pieces_gives_the_same_bits(precision, isa, monkeypatch):  # noqa: F811
    model = model_of(3, 24, 150, 333)
    weights = NativeWeights(read_network(model), None if precision is None else Packs(precision))
    ids, zero, positions = tokens_of(model, 150), torch.zeros(150).long(), torch.arange(150)
    results = []
    for count, piece in ((1, 150), (2, 150), (3, 1), (2, 47), (1, 64)):
        monkeypatch.setattr(NativeDecoder, "threads", lambda self, count=count: count)
        decoder = NativeDecoder(weights, 1, 150)
        for begin in range(0, 150, piece):
            part = slice(begin, begin + piece)
            behind = torch.tensor([len(ids[part]) - 1]) if begin + piece >= 150 else torch.zeros(0).long()
            logits, _ = decoder.step(ids[part], zero[part], positions[part], behind, prompt=True)
        results.append((logits, decoder.cache.buffer.clone()))
    assert all(torch.equal(logits, results[0][0]) for logits, _ in results)
    assert all(torch.equal(cache, results[0][1]) for _, cache in results)


def test_prompts_of_many_rows_do_not_touch_each_other():
    model = model_of(2, 16, 60, 90)
    lengths = [1, 60, 7, 49, 2]
    ids = tokens_of(model, 5, 60)
    tokens = torch.cat([ids[row, :length] for row, length in enumerate(lengths)])
    rows = torch.cat([torch.full((length,), row) for row, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    together, _ = decoder_of(model, batch=5).step(
        tokens, rows, positions, torch.tensor(lengths).cumsum(0) - 1, prompt=True
    )
    for row, length in enumerate(lengths):
        alone, _ = decoder_of(model).step(
            ids[row, :length], torch.zeros(length).long(), torch.arange(length), torch.tensor([length - 1]), prompt=True
        )
        assert torch.equal(together[row], alone[0])


def test_wanted_in_a_prompt_gives_the_logits_of_these_entries_only():
    model = model_of(2, 8, 12, 40)
    ids, rows, positions = tokens_of(model, 12), torch.zeros(12).long(), torch.arange(12)
    everything, _ = decoder_of(model).step(ids, rows, positions, prompt=True)
    wanted = torch.tensor([0, 5, 11])
    some, best = decoder_of(model).step(ids, rows, positions, wanted, best=True, prompt=True)
    assert torch.equal(some, everything[wanted]) and torch.equal(best, some.argmax(dim=1))
    assert decoder_of(model).step(ids, rows, positions, torch.zeros(0).long(), prompt=True)[0].shape == (0, 40)
