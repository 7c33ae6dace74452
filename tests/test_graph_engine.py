"""The GPU decoder, whole steps of a network, in the emulator: the plain loop's tokens, logits, drawn tokens."""

from __future__ import annotations

import gc

import generation_cases
import pytest
import torch
from cuda_emulation import as_cuda_backend, emulate

from benchmarks.gpu import decode
from benchmarks.gpu.bench import Bench
from fastgpt.config import GPT_CONFIG_124M
from fastgpt.generation import graph_engine
from fastgpt.generation.cache import Cache
from fastgpt.generation.draws import noise
from fastgpt.generation.engine import decode_one_token
from fastgpt.generation.generator import Generator
from fastgpt.generation.graph_engine import GraphDecoder
from fastgpt.generation.graph_weights import StepWeights
from fastgpt.generation.network import read_network
from fastgpt.generation.sampling import Sampling
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast

GREEDY = Sampling()


@pytest.fixture(scope="module", autouse=True)
def emulated():
    emulated = emulate()
    with as_cuda_backend(emulated):
        yield emulated


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch, one_thread):
    # Fewer blocks than there are outputs, so that the grids stride.
    monkeypatch.setattr(graph_engine, "_ENOUGH_BLOCKS", 7)


def small_model(cls=GPTModel, **changes):
    # head_dim 8: whole pieces of 16 bytes.
    return generation_cases.small_model(cls, **{"n_heads": 3, **changes})


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(67, (length,), generator=generator) for length in lengths]


def tokens_of(model, prompts, count, engine="graph", **options):
    return [row.tolist() for row in Generator(model, engine=engine).generate(prompts, count, **options)]


@pytest.mark.parametrize("cls", [GPTModel, GPTModelFast])
@pytest.mark.parametrize("lengths", [(5,), (1, 30, 7)], ids=str)
def test_the_tokens_are_those_of_the_plain_loop(cls, lengths):
    model = small_model(cls, context_length=64, qkv_bias=True)
    assert tokens_of(model, prompts_of(*lengths), 12) == tokens_of(model, prompts_of(*lengths), 12, None)


def test_more_rows_than_one_block_takes_get_their_tokens():
    model, prompts = small_model(context_length=40), prompts_of(*range(1, 20))
    assert tokens_of(model, prompts, 3) == tokens_of(model, prompts, 3, None)


@pytest.mark.parametrize("overflow", ["exact", "slide", "stop"])
def test_rows_that_outgrow_the_context_go_on_as_in_the_plain_loop(overflow):
    model, prompts = small_model(), prompts_of(3, 9)
    assert tokens_of(model, prompts, 14, overflow=overflow) == tokens_of(model, prompts, 14, None, overflow=overflow)


def test_a_row_that_ends_is_cut_and_does_not_disturb_the_others():
    model, prompts = small_model(context_length=40), prompts_of(4, 20, 11)
    # A token that one row takes soon, and the others later or never.
    eos_id = tokens_of(model, prompts, 6, None)[1][22]
    assert tokens_of(model, prompts, 12, eos_id=eos_id) == tokens_of(model, prompts, 12, None, eos_id=eos_id)


def test_changed_weights_are_seen_and_a_decoder_is_used_again():
    model, prompts = small_model(context_length=40), prompts_of(4)
    generator = Generator(model, engine="graph")
    generator.generate(prompts, 4)
    gc.collect()
    kept = generator._decoders._free[0]
    with torch.no_grad():
        model.out_head.weight.copy_(model.out_head.weight.flip(0))
    assert generator.generate(prompts, 4)[0].tolist() == tokens_of(model, prompts, 4, None)[0]
    gc.collect()
    assert generator._decoders._free == [kept]


def decoder_for(model, batch, room=16):
    torch.manual_seed(batch)
    decoder = GraphDecoder(StepWeights(read_network(model)), batch, room, keep_logits=True)
    # As if the cache were full of other texts.
    decoder.cache.buffer.normal_()
    return decoder


@pytest.mark.parametrize("batch", [1, 9, 17, 33])
def test_bfloat16_logits_are_within_the_bound_for_every_shape_of_tile(emulated, batch):
    model = small_model(emb_dim=72, n_heads=3, vocab_size=67, context_length=16).to(torch.bfloat16)
    emulated.order(batch)
    tokens, sizes = torch.arange(batch) % 67, torch.arange(batch) % 15 + 1
    decoder = decoder_for(model, batch)
    before = decoder.cache.buffer.clone()
    call = decoder._call(graph_engine.GREEDY)
    decoder._start(tokens, sizes, 0)
    call.step(0)

    def logits_of(dtype):
        cache = Cache(2, batch, 3, 24, 16, like=torch.empty(0, dtype=dtype))
        cache.reserve(16)
        cache.buffer.copy_(before)
        return decode_one_token(read_network(model.to(dtype)), tokens, sizes, False, cache)

    with torch.inference_mode():
        naive = logits_of(torch.bfloat16).double()
        truth = logits_of(torch.float64)
    error, allowed = (decoder.logits.double() - truth).norm(), (naive - truth).norm()
    assert error <= 2 * allowed, (error, allowed)
    assert decoder.found[:, 0].tolist() == decoder.logits.argmax(dim=1).tolist()


def test_the_result_does_not_depend_on_the_order_of_threads(emulated):
    model = small_model(emb_dim=72, n_heads=3, context_length=200).to(torch.bfloat16)
    found = []
    for seed in (1, 2):
        emulated.order(seed)
        decoder = decoder_for(model, 2, 200)
        decoder.run(torch.tensor([1, 2]), torch.tensor([150, 3]), 0, 1, GREEDY, 0)
        found.append(decoder.logits.clone())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [None, 1, 5, 67])
def test_drawn_tokens_are_the_likeliest_under_philox_noise(top_k):
    decoder, seed, drawn = decoder_for(small_model(context_length=16), 3), 2**40 + 3, 6
    tokens = decoder.run(torch.tensor([1, 2, 3]), torch.tensor([4, 9, 2]), drawn, 1, Sampling(1.3, top_k), seed)
    logits = decoder.logits
    token, row = torch.arange(67)[None].expand(3, -1), torch.arange(3)[:, None].expand(-1, 67)
    perturbed = logits / 1.3 + noise(token, row, drawn, seed)
    if top_k is not None:
        perturbed = perturbed.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    assert tokens[:, 0].tolist() == perturbed.argmax(dim=1).tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.9}], ids=str)
def test_a_seed_draws_the_tokens_of_the_plain_loop(options):
    model, prompts = small_model(context_length=64), prompts_of(3, 5)
    options = {"temperature": 2.0, **options}
    first, other = (tokens_of(model, prompts, 10, seed=s, **options) for s in (1, 2))
    assert first == tokens_of(model, prompts, 10, None, seed=1, **options) != other


def test_equal_logits_give_the_first_token():
    model = small_model(context_length=16)
    with torch.no_grad():
        model.out_head.weight.zero_()
    tokens = decoder_for(model, 2).run(torch.tensor([1, 2]), torch.tensor([4, 9]), 0, 2, GREEDY, 0)
    assert (tokens == 0).all()


def test_weights_that_the_kernels_cannot_read_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8"):
        tokens_of(small_model(n_heads=6).to(torch.bfloat16), prompts_of(3), 2)
    with pytest.raises(ValueError, match="not torch.float64"):
        tokens_of(small_model().double(), prompts_of(3), 2)
    with pytest.raises(ValueError, match="engine='none' is not known"):
        Generator(small_model(), engine="none")


def test_what_the_bindings_are_given_is_checked(emulated):
    decoder = decoder_for(small_model(context_length=16), 1)
    weights, layers = decoder.weights, [(*a, 0, 0) for a in decoder.weights.layers]
    rest = (*weights.ends, *(b.data_ptr() for b in decoder._buffers))
    make = emulated.module.DecoderCall
    with pytest.raises(ValueError, match="null pointer"):
        make(layers, weights.eps, rest, decoder.sizes, 0, 0, False)
    with pytest.raises(ValueError, match="max_len must be at most"):
        make([], weights.eps[-1:], rest, (*decoder.sizes[:8], 17, *decoder.sizes[9:]), 0, 0, False)
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        make([], weights.eps[-1:], (rest[0] + 2, *rest[1:]), decoder.sizes, 0, 0, False)


def test_a_layer_of_gpt2s_width_gives_the_tokens_of_the_plain_loop():
    cfg = {**GPT_CONFIG_124M, "n_layers": 1, "vocab_size": 128, "context_length": 64, "drop_rate": 0.0}
    torch.manual_seed(0)
    model = GPTModel(cfg).eval()
    assert tokens_of(model, [torch.tensor([1, 2, 3])], 3) == tokens_of(model, [torch.tensor([1, 2, 3])], 3, None)


def test_the_gates_that_a_gpu_will_meet_pass(tmp_path):
    with Bench(tmp_path / "rows.jsonl", "decode", 60.0, dry_run=True) as bench:
        assert {"fastgpt graph", decode.PERSISTENT} <= decode.gate_tokens(bench)
        decode.gate_logits(bench)
        decode.gate_logits(bench, persistent=True)
    assert not bench.failures
