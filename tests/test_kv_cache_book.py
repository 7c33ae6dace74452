"""The book's KV-cache API: KVCache, the cached model and attention, and the generating functions."""

from __future__ import annotations

import copy

import pytest
import torch
from generation_cases import SMALL, small_model

from fastgpt import model as plain
from fastgpt import reference
from fastgpt.book.generate import trim_input_tensor
from fastgpt.book.kv_cache.generate import (
    generate_text_simple,
    generate_text_simple_cached,
    generate_text_simple_stream,
)
from fastgpt.book.kv_cache.gpt2 import GPTModel, MultiHeadAttention
from fastgpt.book.kv_cache.utils import KVCache

CONTEXT = SMALL["context_length"]
IDS = torch.tensor([[4, 8, 15, 16, 23, 42, 1, 2], [3, 1, 4, 1, 5, 9, 2, 6]])


def cached_model(**changes):
    return small_model(GPTModel, **changes)


def chunks(model, cache, sizes, ids=IDS):
    """Logits of `ids`, read in chunks of these sizes."""
    return torch.cat([model(part, cache=cache) for part in ids.split(sizes, dim=1)], dim=1)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_cache_holds_one_entry_per_layer_and_forgets_them():
    cache = KVCache(n_layers=2)
    cache.update(1, "entry")
    assert cache.get_all() == [None, "entry"] and cache.get(1) == "entry"
    cache.reset()
    assert cache.get_all() == [None, None]


def test_the_same_seed_gives_the_plain_models_weights_and_checkpoint():
    torch.manual_seed(5)
    cached = GPTModel(SMALL)
    torch.manual_seed(5)
    expected = plain.GPTModel(SMALL).state_dict()
    assert list(cached.state_dict()) == list(expected)
    for key, value in cached.state_dict().items():
        assert torch.equal(value, expected[key])
    assert cached.cfg == SMALL


@pytest.mark.parametrize("sizes", [[8], [4, 4], [1] * 8, [3, 1, 2, 2], [7, 1]], ids=str)
def test_chunks_give_the_logits_of_the_whole(sizes):
    model = cached_model()
    cache = KVCache(n_layers=2)
    close(chunks(model, cache, sizes), model(IDS))
    assert model.current_pos == model.ptr_current_pos == 8
    for keys, values in cache.get_all():
        assert keys.shape == values.shape == (2, SMALL["n_heads"], 8, SMALL["emb_dim"] // SMALL["n_heads"])


def test_without_a_cache_the_position_starts_at_zero():
    model = cached_model()
    want = model(IDS)
    model(IDS[:, :3], cache=KVCache(n_layers=2))
    close(model(IDS), want)


def test_use_cache_alone_keeps_the_cache_in_the_model():
    model = cached_model()
    for _ in range(2):
        model.reset_kv_cache()
        assert model.current_pos == 0
        got = torch.cat([model(part, use_cache=True) for part in IDS.split(3, dim=1)], dim=1)
        close(got, model(IDS))


def test_two_caches_of_one_model_do_not_disturb_each_other():
    model = cached_model()
    first, second = KVCache(n_layers=2), KVCache(n_layers=2)
    model(IDS[:, :5], cache=first)
    model(IDS[:, :2], cache=second)
    close(model(IDS[:, 5:], cache=first), model(IDS)[:, 5:])
    close(model(IDS[:, 2:], cache=second), model(IDS)[:, 2:])


def test_an_overlong_sequence_is_a_value_error_and_leaves_the_cache_as_it_was():
    model = cached_model(context_length=8)
    cache = KVCache(n_layers=2)
    model(IDS[:, :7], cache=cache)
    before = [(keys.clone(), values.clone()) for keys, values in cache.get_all()]
    with pytest.raises(ValueError, match=r"Sequence length 9 exceeds .*8 tokens"):
        model(IDS[:, :2], cache=cache)
    assert model.current_pos == 7
    for entry, old in zip(cache.get_all(), before, strict=True):
        assert torch.equal(entry[0], old[0]) and torch.equal(entry[1], old[1])
    close(model(IDS[:, 7:], cache=cache), model(IDS)[:, 7:])


def test_an_overlong_prompt_is_a_value_error_without_a_cache_too():
    with pytest.raises(ValueError, match=r"Sequence length 9 exceeds .*8 tokens"):
        cached_model(context_length=8)(torch.ones(2, 9, dtype=torch.int64))


def test_a_failing_layer_leaves_the_cache_as_it_was():
    model = cached_model()
    cache = KVCache(n_layers=2)
    model(IDS[:, :3], cache=cache)
    handle = model.final_norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS[:, 3:], cache=cache)
    handle.remove()
    close(model(IDS[:, 3:], cache=cache), model(IDS)[:, 3:])


def test_gradients_flow_through_cached_chunks():
    model, whole = cached_model().double(), cached_model().double()
    chunks(model, KVCache(n_layers=2), [3, 5]).square().sum().backward()
    whole(IDS).square().sum().backward()
    for (name, got), want in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=name)


def test_a_window_keeps_the_last_keys():
    model = cached_model(kv_window_size=3)
    cache = KVCache(n_layers=2)
    for position in range(8):
        model(IDS[:, position : position + 1], cache=cache)
        assert cache.get(0)[0].shape[2] == min(position + 1, 3)
    assert model.current_pos == 8


def test_a_window_hides_older_tokens():
    torch.manual_seed(0)
    att = MultiHeadAttention(6, 6, 20, 0.0, 2, window_size=3)
    x = torch.randn(2, 9, 6)
    got = torch.cat([att(part, use_cache=True) for part in x.split(1, dim=1)], dim=1)
    want = torch.cat([att(x[:, max(0, i - 2) : i + 1])[:, -1:] for i in range(9)], dim=1)
    close(got, want)


@pytest.mark.parametrize("sizes", [[9], [4, 5], [1] * 9], ids=str)
def test_attention_with_a_cache_gives_the_output_of_the_whole(sizes):
    torch.manual_seed(0)
    att = MultiHeadAttention(5, 6, 20, 0.0, 2, qkv_bias=True)
    x = torch.randn(2, 9, 5)
    for _ in range(2):
        close(torch.cat([att(part, use_cache=True) for part in x.split(sizes, dim=1)], dim=1), att(x))
        att.reset_cache()
        assert att.cache_k is None and att.cache_v is None
    assert "cache_k" not in att.state_dict()


def test_attention_refuses_more_tokens_than_its_length():
    with pytest.raises(ValueError, match="Sequence length 5 exceeds .*4 tokens"):
        MultiHeadAttention(4, 4, 9, 0.0, 2, max_seq_len=4)(torch.ones(1, 5, 4))


def test_a_cached_model_can_be_copied_and_pickled_with_its_cache(tmp_path):
    model = cached_model()
    with torch.no_grad():
        model(IDS[:, :5], use_cache=True)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        close(twin(IDS[:, 5:], use_cache=True), model(IDS)[:, 5:])


@pytest.mark.parametrize("function", [generate_text_simple, generate_text_simple_cached])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("new", [0, 1, 4, 20])
def test_generation_gives_the_tokens_of_the_plain_loop_with_and_without_the_cache(function, use_cache, new):
    model = cached_model().train()
    got = function(model, IDS, new, use_cache=use_cache)
    assert not model.training
    assert torch.equal(got, reference.generate_text_simple(model, IDS, new, CONTEXT))


def test_generation_crops_to_a_context_size():
    model = cached_model()
    want = reference.generate_text_simple(model, IDS, 9, 5)
    assert torch.equal(generate_text_simple(model, IDS, 9, context_size=5), want)


def test_generation_with_a_window_uses_the_models_own_cache():
    model = cached_model(kv_window_size=3)
    want, cache = IDS, KVCache(n_layers=2)
    logits = model(IDS, cache=cache)
    for _ in range(4):
        token = logits[:, -1].argmax(-1, keepdim=True)
        want, logits = torch.cat([want, token], dim=1), model(token, cache=cache)
    assert torch.equal(generate_text_simple(model, IDS, 4), want)


class Foreign(torch.nn.Module):
    """Another architecture with the book's cache protocol: the next token is the number of tokens read so far."""

    def __init__(self):
        super().__init__()
        self.cfg = {"n_layers": 1, "context_length": 30}
        self.calls = []

    def reset_kv_cache(self):
        self.calls.clear()

    def forward(self, idx, cache=None):
        self.calls.append(idx.shape[1])
        seen = idx.shape[1] + (cache.get(0) or 0)
        cache.update(0, seen)
        return torch.nn.functional.one_hot(torch.full_like(idx, seen), 32).float()


def test_another_architecture_runs_by_its_own_cache_without_a_useless_last_call():
    model = Foreign()
    assert generate_text_simple(model, torch.tensor([[9, 9]]), 3).tolist() == [[9, 9, 2, 3, 4]]
    assert model.calls == [2, 1, 1]
    steps = list(generate_text_simple_stream(model, torch.tensor([[9, 9]]), 9, eos_token_id=4))
    assert [int(step) for step in steps] == [2, 3]


def test_a_stream_gives_the_same_tokens_one_by_one():
    model = cached_model().train()
    steps = list(generate_text_simple_stream(model, IDS, 4))
    assert not model.training and all(step.shape == (2, 1) for step in steps)
    want = reference.generate_text_simple(model, IDS, 4, CONTEXT)
    assert torch.equal(torch.cat([IDS, *steps], dim=1), want)


class Counting(torch.nn.Module):
    """The next token is the last one plus 1."""

    def forward(self, idx):
        return torch.nn.functional.one_hot(idx + 1, 32).float()


def test_a_stream_stops_only_when_all_rows_choose_the_eos_token_at_once():
    def steps(*rows):
        stream = generate_text_simple_stream(Counting(), torch.tensor(rows), 5, eos_token_id=3)
        return [step.flatten().tolist() for step in stream]

    assert steps([0]) == [[1], [2]]
    assert steps([0], [0]) == [[1, 1], [2, 2]]
    assert steps([0], [1]) == [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6]]


def test_a_large_budget_can_end_early_at_the_eos_token():
    model = cached_model()
    with torch.no_grad():
        model.out_head.weight.zero_()
    assert list(generate_text_simple_stream(model, IDS, 1000, eos_token_id=0)) == []


def test_a_stream_that_outgrows_the_context_is_a_value_error():
    with pytest.raises(ValueError, match=f"Sequence length {CONTEXT + 1} exceeds"):
        list(generate_text_simple_stream(cached_model(), IDS, 20))


def test_a_stream_warns_that_context_size_has_no_effect():
    with pytest.warns(UserWarning, match="context_size has no effect"):
        list(generate_text_simple_stream(cached_model(), IDS, 1, context_size=4))


def test_a_plain_model_of_the_book_generates_here_too():
    model = small_model()
    want = reference.generate_text_simple(model, IDS, 20, CONTEXT)
    assert torch.equal(generate_text_simple(model, IDS, 20), want)


def test_a_model_of_unknown_context_asks_for_context_size():
    with pytest.raises(ValueError, match="pass context_size"):
        generate_text_simple(torch.nn.Identity(), IDS, 2)


def test_trimming_leaves_room_for_the_new_tokens():
    assert trim_input_tensor(IDS, 6, 2).tolist() == IDS[:, -4:].tolist()
    assert torch.equal(trim_input_tensor(IDS, 50, 2), IDS)
    with pytest.raises(ValueError, match="smaller than context_len"):
        trim_input_tensor(IDS, 6, 6)


def test_random_weights_are_far_from_ties():
    # What the comparisons of tokens in this file and in test_generation.py stand on.
    with torch.no_grad():
        logits = small_model()(IDS)[:, -1].topk(2).values
    assert float((logits[:, 0] - logits[:, 1]).min()) > 1e-3
