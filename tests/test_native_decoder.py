"""The native decoder: the numbers and the tokens of the plain loop, refusals instead of crashes."""

from __future__ import annotations

import copy
import os
import threading

import pytest
import torch
from generation_cases import SMALL, random_model, small_model
from torch import nn

import fastgpt
from fastgpt import reference
from fastgpt.finetuning.lora import replace_linear_with_lora
from fastgpt.generation import Generator
from fastgpt.generation.engine import CachedEngine
from fastgpt.generation.native_engine import NativeDecoder, NativeEngine, make_engine
from fastgpt.generation.native_weights import NativeWeights, NotNative
from fastgpt.generation.network import read_network
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast
from fastgpt.ops import extension
from fastgpt.testing import assert_within_bound

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))

ISAS = extension.load("cpu").available_isas() if extension.why_not("cpu") is None else []
# (n_heads, head_dim, context, vocab, hidden layers' biases): tiles, vectors and threads all with and without a tail.
SHAPES = [
    (1, 1, 3, 5),
    (3, 5, 9, 41),
    (2, 8, 20, 64),
    (5, 4, 7, 33),
    (4, 16, 80, 130),
    (2, 64, 70, 257),
    (1, 128, 5, 100),
]


def model_of(n_heads, head_dim, context, vocab, seed=0, cls=GPTModel, qkv_bias=True):
    cfg = SMALL | {
        "n_heads": n_heads,
        "emb_dim": n_heads * head_dim,
        "context_length": context,
        "vocab_size": vocab,
        "qkv_bias": qkv_bias,
    }
    return random_model(cls, cfg, seed)


def decoder_of(model, batch=1, limit=None):
    weights = NativeWeights(read_network(model))
    return NativeDecoder(weights, batch, limit or weights.network.context_length)


def tokens_of(model, *shape, seed=0):
    return torch.randint(model.tok_emb.weight.shape[0], shape, generator=torch.Generator().manual_seed(seed))


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
    return request.param


# Numbers.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_within_the_bound(shape, isa, threads):
    model = model_of(*shape)
    ids = tokens_of(model, 1, shape[2])
    with torch.no_grad():
        naive, truth = model(ids)[0], copy.deepcopy(model).double()(ids)[0]
    decoder, positions = decoder_of(model), torch.arange(shape[2])
    one_by_one = torch.cat(
        [decoder.step(ids[0, i : i + 1], torch.zeros(1).long(), positions[i : i + 1])[0] for i in positions]
    )
    assert_within_bound(one_by_one, naive, truth)
    at_once, best = decoder_of(model).step(ids[0], torch.zeros_like(positions), positions, best=True)
    # No sum depends on what else is in the step.
    assert torch.equal(at_once, one_by_one)
    assert torch.equal(best, at_once.argmax(dim=1))


def test_no_sum_depends_on_the_number_of_threads(monkeypatch):
    model = model_of(3, 24, 40, 333)
    ids, positions, results = tokens_of(model, 40), torch.arange(40), []
    for count in (1, 2, 3, 5):
        monkeypatch.setattr(NativeDecoder, "threads", lambda self, count=count: count)
        results.append(decoder_of(model).step(ids, torch.zeros_like(ids), positions)[0])
    assert all(torch.equal(result, results[0]) for result in results)


def test_entries_of_many_rows_do_not_touch_each_other():
    model = model_of(2, 16, 30, 90)
    lengths = [1, 30, 7, 16, 2]
    ids = tokens_of(model, 5, 30)
    together = decoder_of(model, batch=5)
    for position in range(30):
        rows = torch.tensor([row for row, length in enumerate(lengths) if position < length])
        got, _ = together.step(ids[rows, position], rows, torch.full_like(rows, position))
        for logits, row in zip(got, rows.tolist(), strict=True):
            if position == lengths[row] - 1:
                alone = decoder_of(model)
                want, _ = alone.step(
                    ids[row, : position + 1], torch.zeros(position + 1).long(), torch.arange(position + 1)
                )
                assert torch.equal(logits, want[-1])


def test_wanted_gives_the_logits_of_these_entries_only():
    model = model_of(2, 8, 12, 40)
    ids, rows, positions = tokens_of(model, 12), torch.zeros(12).long(), torch.arange(12)
    everything, _ = decoder_of(model).step(ids, rows, positions)
    wanted = torch.tensor([0, 5, 11])
    some, best = decoder_of(model).step(ids, rows, positions, wanted, best=True)
    assert torch.equal(some, everything[wanted]) and torch.equal(best, some.argmax(dim=1))
    assert decoder_of(model).step(ids, rows, positions, torch.zeros(0).long())[0].shape == (0, 40)


def test_going_back_and_on_gives_what_a_fresh_cache_gives():
    model = model_of(2, 8, 12, 40)
    decoder, zero = decoder_of(model), torch.zeros(12).long()
    decoder.step(tokens_of(model, 12, seed=1), zero, torch.arange(12))
    ids = tokens_of(model, 12, seed=2)
    got, _ = decoder.step(ids[:6], zero[:6], torch.arange(6))
    want, _ = decoder_of(model).step(ids[:6], zero[:6], torch.arange(6))
    assert torch.equal(got, want)


def test_what_lies_behind_a_row_is_never_read():
    model = model_of(2, 8, 12, 40)
    decoder = decoder_of(model)
    decoder.cache.reserve(12)
    decoder.cache.buffer.fill_(float("nan"))
    ids = tokens_of(model, 5)
    got, _ = decoder.step(ids, torch.zeros_like(ids), torch.arange(5))
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("fill", ["ties", "nan", "inf"])
def test_the_best_is_that_of_torch_argmax(fill, isa, threads):
    model = model_of(1, 4, 3, 700, seed=1)
    with torch.no_grad():
        if fill == "ties":
            model.out_head.weight[100:] = model.out_head.weight[:100].repeat(6, 1)
        elif fill == "nan":
            model.out_head.weight[[333, 600]] = float("nan")
        else:
            model.out_head.weight.fill_(-float("inf"))
    decoder = decoder_of(model)
    for token in range(0, 700, 50):
        logits, best = decoder.step(torch.tensor([token]), torch.tensor([0]), torch.tensor([0]), best=True)
        assert torch.equal(best, logits.argmax(dim=1))


# Tokens.


@pytest.mark.parametrize("cls", [GPTModel, reference.GPTModel, GPTModelFast])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generated_tokens_are_those_of_the_plain_loop(cls, shape):
    model, context = model_of(*shape, cls=cls), shape[2]
    for seed, batch in ((0, 1), (1, 3)):
        idx = tokens_of(model, batch, min(2, context), seed=seed)
        for n_new in (context, context + 5):
            want = reference.generate_text_simple(model, idx, n_new, context)
            assert torch.equal(Generator(model).generate(idx, n_new), want)
            assert torch.equal(torch.cat([idx, *Generator(model).stream(idx, n_new)], dim=1), want)


def test_the_native_engine_is_the_one_that_runs():
    model = small_model()
    engine = make_engine(read_network(model), 12, "exact", 5)
    assert isinstance(engine, NativeEngine)
    with fastgpt.use_backend("reference"):
        assert type(make_engine(read_network(model), 12, "exact", 5)) is CachedEngine


@pytest.mark.parametrize("change", ["lora", "relu", "float64", "bfloat16", "strided", "no_linear"])
def test_a_network_that_it_cannot_run_is_left_to_the_other_engine(change):
    model = small_model()
    with torch.no_grad():
        if change == "lora":
            replace_linear_with_lora(model, 2, 4)
        elif change == "relu":
            model.trf_blocks[0].ff.layers[1] = nn.ReLU()
        elif change in ("float64", "bfloat16"):
            model.to(getattr(torch, change))
        elif change == "strided":
            layer = model.trf_blocks[1].att.out_proj
            layer.weight = nn.Parameter(layer.weight.t().contiguous().t())
        else:
            model.out_head = nn.Sequential(model.out_head)
    with pytest.raises(NotNative):
        NativeWeights(read_network(model))
    idx = torch.tensor([[1, 2, 3]])
    if change != "bfloat16":  # where near ties are common
        want = reference.generate_text_simple(model, idx, 15, 12)
        assert torch.equal(Generator(model).generate(idx, 15), want)


def test_weights_that_change_in_place_are_seen_at_the_next_token():
    model, changed = small_model(seed=1), small_model(seed=2)
    stream = Generator(model).stream([[1, 2, 3]], 8)
    before = [next(stream) for _ in range(3)]
    model.load_state_dict(changed.state_dict())
    assert [int(t) for t in stream] != [int(t) for t in list(Generator(small_model(seed=1)).stream([[1, 2, 3]], 8))[3:]]
    assert len(before) == 3
    assert torch.equal(
        Generator(model).generate(torch.tensor([[4, 5]]), 9),
        reference.generate_text_simple(changed, torch.tensor([[4, 5]]), 9, 12),
    )


def test_a_head_that_gives_more_tokens_than_can_be_read_is_left_to_the_caller():
    model = small_model()
    model.out_head = nn.Linear(24, 300, bias=True)
    nn.init.constant_(model.out_head.bias[:5], 100.0)
    got = Generator(model).generate([[1, 2]], 4)[0]
    assert torch.equal(got, reference.generate_text_simple(model, torch.tensor([[1, 2]]), 4, 12)[0])


def test_rows_that_end_leave_the_batch():
    model = small_model(seed=4)
    idx = tokens_of(model, 6, 4)
    free = Generator(model).generate(idx, 8)
    eos_id = int(free[2, 6])
    got = Generator(model).generate(list(idx), 8, eos_id=eos_id)
    for row, whole in zip(got, free.tolist(), strict=True):
        new = whole[4:]
        assert row[4:].tolist() == (new[: new.index(eos_id)] if eos_id in new else new)


# Refusals.


def test_damaged_arguments_raise_and_do_not_crash():
    decoder = decoder_of(small_model(), batch=2)
    one, zero = torch.tensor([1]), torch.tensor([0])
    for tokens, rows, positions, text in (
        (torch.tensor([67]), zero, zero, "token 67 is outside the vocabulary of 67"),
        (torch.tensor([-1]), zero, zero, "token -1"),
        (one, torch.tensor([2]), zero, "row 2 is outside the batch of 2"),
        (one, torch.tensor([-1]), zero, "row -1"),
        (one, zero, torch.tensor([12]), "position 12"),
        (one, zero, torch.tensor([-1]), "position -1"),
        (one, zero, torch.tensor([2**62]), "position"),
    ):
        with pytest.raises(ValueError, match=text):
            decoder.step(tokens, rows, positions)
    for wanted in ([1], [-1], [2**62]):
        with pytest.raises(ValueError, match="wanted"):
            decoder.step(one, zero, zero, torch.tensor(wanted))
    with pytest.raises(ValueError, match="n_wanted"):
        decoder.step(one, zero, zero, torch.tensor([0, 0]))
    decoder.cache.reserve(12)
    with pytest.raises(ValueError, match="steps do not fit"):
        decoder.generate(one, zero, zero, 13)
    zeros = torch.zeros(3, 1, dtype=torch.int64)
    for steps in (-1, 2**62):
        with pytest.raises(ValueError):
            decoder.weights.decoder.generate(
                decoder.cache.buffer.data_ptr(), 0, 2, 12, zeros.data_ptr(), 1, steps, -1, 0, 1, 0.0, 0, 1.0, 0, 0
            )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda d: d.step(0, 0, 1, 8, 64, 1, 0, 0, 0, 0, 1), "must be called for all weights"),
        (lambda d: d.set_norm(3, 64, 64, 1e-5), "there are 3 norms"),
        (lambda d: d.set_norm(-1, 64, 64, 1e-5), "there are 3 norms"),
        (lambda d: d.set_norm(0, 0, 64, 1e-5), "null pointer"),
        (lambda d: d.set_norm(0, 66, 64, 1e-5), "misaligned"),
        (lambda d: d.set_matrix(7, 0, 64, 0, 0), "there are 7 matrices"),
        (lambda d: d.set_matrix(0, 9, 64, 0, 0), "unknown weight format 9"),
        (lambda d: d.set_matrix(0, 0, 0, 0, 0), "null pointer"),
        (lambda d: d.set_embeddings(64, 0), "null pointer"),
    ],
)
def test_a_decoder_without_its_weights_refuses(call, text):
    with pytest.raises(ValueError, match=text):
        call(extension.load("cpu").Decoder(1, 8, 2, 4, 32, 10, 6, 10))


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 8, 2, 4, 32, 10, 6, 10),
        (1, 8, 2, 257, 32, 10, 6, 10),
        (1, 2**40, 2, 4, 32, 10, 6, 10),
        (1, -8, 2, 4, 32, 10, 6, 10),
        (5000, 8, 2, 4, 32, 10, 6, 10),
        (4096, 8, 2**31, 256, 32, 10, 2**31, 10),
    ],
)
def test_sizes_that_no_model_has_are_refused(sizes):
    with pytest.raises(ValueError):
        extension.load("cpu").Decoder(*sizes)


def test_a_cache_of_impossible_size_is_refused():
    decoder = decoder_of(small_model())
    entries = torch.zeros(3, 1, dtype=torch.int64)
    for cache, dtype, batch, capacity in (
        (0, 0, 1, 4), (64, 0, 2**62, 4), (64, 0, 1, 2**62), (64, 0, -1, 4), (66, 0, 1, 4), (65, 1, 1, 4), (64, 3, 1, 4),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            decoder.weights.decoder.step(cache, dtype, batch, capacity, entries.data_ptr(), 1, 0, 0, 0, 0, 1)


# Threads and processes.


def test_one_generator_serves_several_threads():
    model = small_model()
    generator, idx = Generator(model), tokens_of(model, 2, 3)
    want, results = generator.generate(idx, 30), []
    workers = [threading.Thread(target=lambda: results.append(generator.generate(idx, 30))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and all(torch.equal(result, want) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_decodes_on_one_thread(monkeypatch):
    monkeypatch.setattr(NativeDecoder, "threads", lambda self: 2)
    model = model_of(2, 16, 10, 50)
    decoder, ids, positions = decoder_of(model), tokens_of(model, 5), torch.arange(5)
    zero = torch.zeros_like(ids)
    want, _ = decoder.step(ids, zero, positions)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        got, _ = decoder.step(ids, zero, positions)
        os.write(writer, b"1" if torch.equal(got, want) else b"0")
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    os.waitpid(child, 0)
