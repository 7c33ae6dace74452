"""The decoder that stays on the chip, in the emulator: all blocks of its grid in turns, against the plain loop."""

from __future__ import annotations

import ctypes
import gc
import itertools

import generation_cases
import pytest
import torch
from cuda_emulation import HOST, as_cuda_backend, compiled, emulate

from fastgpt.config import GPT_CONFIG_124M
from fastgpt.generation import graph_engine
from fastgpt.generation.cache import Cache
from fastgpt.generation.engine import decode_one_token
from fastgpt.generation.generator import Generator
from fastgpt.generation.graph_engine import GraphDecoder
from fastgpt.generation.graph_weights import StepWeights
from fastgpt.generation.network import read_network
from fastgpt.generation.persistent_engine import PersistentDecoder
from fastgpt.generation.sampling import Sampling
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast

GREEDY = Sampling()
NONE, NO_BARRIER, MISSING_BLOCK = range(3)


@pytest.fixture(scope="module", autouse=True)
def emulated():
    emulated = emulate()
    with as_cuda_backend(emulated):
        yield emulated


@pytest.fixture(autouse=True)
def one_thread_each(one_thread):
    pass


@pytest.fixture(scope="module")
def grid():
    library = ctypes.CDLL(str(compiled([HOST / "grid.cu"])))
    library.run_ring.restype = ctypes.c_char_p
    library.reached.restype = ctypes.c_bool
    return library


def run_ring(grid, blocks, rounds, fault=NONE, begin=0, resident=None):
    numbers, counter = torch.zeros(2, blocks), ctypes.c_uint32(begin)
    address = ctypes.c_void_p(numbers.data_ptr())
    error = grid.run_ring(address, ctypes.byref(counter), blocks, resident or blocks, rounds, fault)
    return error.decode() if error else None


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_the_barrier_lets_blocks_see_each_other(grid, blocks):
    assert run_ring(grid, blocks, 9) is None
    assert run_ring(grid, blocks, 9, begin=2**32 - 2 * blocks) is None


def test_the_emulator_finds_a_missing_barrier_and_a_missing_block(grid):
    assert "without a barrier of the grid" in run_ring(grid, 3, 4, NO_BARRIER)
    assert "wait for each other for ever" in run_ring(grid, 3, 4, MISSING_BLOCK)
    assert "not all resident" in run_ring(grid, 3, 4, resident=2)


def test_the_count_may_pass_its_largest_number(grid):
    assert not grid.reached(2**32 - 1, 2)
    assert grid.reached(2, 2)
    assert grid.reached(3, 2**32 - 1)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("blocks", [1, 7, 132])
def test_every_part_of_every_row_is_read_once_and_warps_read_alike(grid, blocks, size):
    layers, tokens, rows, columns = 2, 2, (72, 24, 130, 24, 67), (24, 72, 24, 3100, 24)
    c_rows, c_columns = (ctypes.c_int * 5)(*rows), (ctypes.c_int * 5)(*columns)
    out = (ctypes.c_int * 200_000)()
    found = []
    for block in range(blocks):
        counts = []
        for warp in range(16):
            count = grid.walk(out, warp, layers, tokens, c_rows, c_columns, size, block, blocks)
            items = [tuple(out[i * 5 : i * 5 + 5]) for i in range(count)]
            assert items == sorted(items, key=lambda item: (item[0], item[2] == 4, *item[1:]))
            counts.append(count)
            found += items
        assert max(counts) - min(counts) <= 1
    parts = [grid.parts_of(n, size) for n in columns]
    walks = [(layer, m) for layer in range(layers) for m in range(4)] + [(layers, 4)]
    want = [
        (token, layer, m, row, part)
        for token, (layer, m) in itertools.product(range(tokens), walks)
        for row in range(rows[m])
        for part in range(parts[m])
    ]
    assert sorted(found) == sorted(want)


@pytest.mark.parametrize("size", [4, 8])
def test_the_input_is_permuted_within_pieces_of_a_warp(grid, size):
    places = [grid.place(column, size) for column in range(3 * 32 * size)]
    assert sorted(places) == list(range(3 * 32 * size))
    assert all(places[i + j] == places[i] + j for i in range(0, len(places), 4) for j in range(4))


def small_model(cls=GPTModel, **changes):
    # head_dim 8: whole pieces of 16 bytes.
    return generation_cases.small_model(cls, **{"n_heads": 3, **changes})


def prompt_of(length):
    return [torch.randint(67, (length,), generator=torch.Generator().manual_seed(length))]


def tokens_of(model, prompts, count, engine="persistent", **options):
    return [row.tolist() for row in Generator(model, engine=engine).generate(prompts, count, **options)]


@pytest.mark.parametrize("cls", [GPTModel, GPTModelFast])
@pytest.mark.parametrize("length", [1, 30])
def test_the_tokens_are_those_of_the_plain_loop(cls, length):
    model = small_model(cls, context_length=64, qkv_bias=True)
    assert tokens_of(model, prompt_of(length), 12) == tokens_of(model, prompt_of(length), 12, None)


@pytest.mark.parametrize("overflow", ["exact", "slide", "stop"])
def test_a_row_that_outgrows_the_context_goes_on_as_in_the_plain_loop(overflow):
    model, prompt = small_model(), prompt_of(5)
    assert tokens_of(model, prompt, 12, overflow=overflow) == tokens_of(model, prompt, 12, None, overflow=overflow)


def test_a_row_stops_at_its_end(emulated):
    model, prompt = small_model(context_length=40), prompt_of(4)
    eos_id = tokens_of(model, prompt, 6, None)[0][7]
    assert tokens_of(model, prompt, 30, eos_id=eos_id) == tokens_of(model, prompt, 30, None, eos_id=eos_id)
    decoder = decoder_for(model)
    decoder.run(torch.tensor([1]), torch.tensor([4]), 0, 1, GREEDY, 0)
    first = int(decoder.found[0, 0])
    decoder.run(torch.tensor([1]), torch.tensor([4]), 0, 9, GREEDY, 0, first)
    assert decoder.state[0].tolist() == [first, 5, 1, 1]


def test_several_rows_go_to_the_decoder_with_a_graph():
    model, prompts = small_model(context_length=40), prompt_of(3) + prompt_of(9)
    assert tokens_of(model, prompts, 5) == tokens_of(model, prompts, 5, None)


def test_changed_weights_are_seen_and_a_decoder_is_used_again(emulated):
    model, prompt = small_model(context_length=40), prompt_of(4)
    generator = Generator(model, engine="persistent")
    generator.generate(prompt, 4)
    gc.collect()
    kept = generator._decoders._free[0]
    with torch.no_grad():
        model.out_head.weight.copy_(model.out_head.weight.flip(0))
    before = emulated.launches()
    assert generator.generate(prompt, 4)[0].tolist() == tokens_of(model, prompt, 4, None)[0]
    assert emulated.launches() == before + 1
    gc.collect()
    assert generator._decoders._free == [kept]


def decoder_for(model, room=16, make=PersistentDecoder, **options):
    torch.manual_seed(1)
    weights = StepWeights(read_network(model))
    decoder = make(weights, room, **options) if make is PersistentDecoder else make(weights, 1, room, **options)
    # As if the cache were full of another text.
    decoder.cache.buffer.normal_()
    return decoder


@pytest.mark.parametrize(("shared", "stages"), [(99, 2), (163, 4), (227, 6)])
def test_bfloat16_logits_are_within_the_bound_at_every_depth_of_the_ring(emulated, monkeypatch, shared, stages):
    monkeypatch.setattr(graph_engine, "_chip", lambda device: (7, shared * 1024))
    model = small_model(emb_dim=72, n_heads=3, context_length=200).to(torch.bfloat16)
    emulated.order(stages)
    decoder = decoder_for(model, 200, keep_logits=True)
    assert decoder.plan == (3, stages)
    before = decoder.cache.buffer.clone()
    tokens, sizes = torch.tensor([5]), torch.tensor([150])
    decoder.run(tokens, sizes, 0, 1, GREEDY, 0)

    def logits_of(dtype):
        cache = Cache(2, 1, 3, 24, 200, like=torch.empty(0, dtype=dtype))
        cache.reserve(200)
        cache.buffer.copy_(before)
        return decode_one_token(read_network(model.to(dtype)), tokens, sizes, False, cache)

    with torch.inference_mode():
        naive, truth = logits_of(torch.bfloat16).double(), logits_of(torch.float64)
    error, allowed = (decoder.logits.double() - truth).norm(), (naive - truth).norm()
    assert error <= 2 * allowed, (error, allowed)
    assert int(decoder.found[0, 0]) == int(decoder.logits.argmax())


def test_the_result_does_not_depend_on_the_order_of_threads_and_blocks(emulated):
    model = small_model(emb_dim=72, n_heads=3, context_length=200).to(torch.bfloat16)
    found = []
    for seed in (1, 2):
        emulated.order(seed)
        decoder = decoder_for(model, 200, keep_logits=True)
        decoder.run(torch.tensor([1]), torch.tensor([190]), 0, 2, GREEDY, 0)
        found.append(decoder.logits.clone())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [None, 1, 5])
def test_drawn_tokens_are_those_of_the_decoder_with_a_graph(top_k):
    model, sampling = small_model(context_length=32), Sampling(1.3, top_k)
    arguments = torch.tensor([2]), torch.tensor([9]), 6, 5, sampling, 2**40 + 3
    got, want = (decoder_for(model, 32, make).run(*arguments) for make in (PersistentDecoder, GraphDecoder))
    assert got.tolist() == want.tolist()


def test_networks_that_do_not_fit_are_refused_with_the_reason(monkeypatch):
    wide = {**GPT_CONFIG_124M, "n_layers": 1, "vocab_size": 67, "context_length": 8, "emb_dim": 2056, "n_heads": 257}
    with pytest.raises(ValueError, match="emb_dim must be at most 2048"):
        tokens_of(GPTModel(wide).eval(), prompt_of(3), 2)
    monkeypatch.setattr(graph_engine, "_chip", lambda device: (7, 48 * 1024))
    with pytest.raises(ValueError, match="does not fit into 49152 bytes"):
        tokens_of(small_model(), prompt_of(3), 2)
    with pytest.raises(ValueError, match="not torch.float64"):
        tokens_of(small_model().double(), prompt_of(3), 2)


def test_what_the_bindings_are_given_is_checked():
    decoder = decoder_for(small_model(context_length=16))
    call, table = decoder.calls[graph_engine.GREEDY], decoder._table
    with pytest.raises(ValueError, match="steps must be from 1"):
        call.persistent_steps(decoder.plan, table.data_ptr(), 129, -1, 0)
    with pytest.raises(ValueError, match="not that of persistent_plan"):
        call.persistent_steps((9999, 2), table.data_ptr(), 1, -1, 0)
    with pytest.raises(ValueError, match="the table is too small"):
        call.persistent_upload(table.data_ptr(), 8, 0)


def test_layers_of_gpt2s_width_give_the_tokens_of_the_plain_loop():
    cfg = {**GPT_CONFIG_124M, "n_layers": 1, "vocab_size": 128, "context_length": 64, "drop_rate": 0.0}
    torch.manual_seed(0)
    model = GPTModel(cfg).eval()
    assert tokens_of(model, [torch.tensor([1, 2, 3])], 3) == tokens_of(model, [torch.tensor([1, 2, 3])], 3, None)
