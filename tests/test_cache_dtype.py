"""Keys and values kept in 8 or 16 bits: what is kept, the sums over it, every way of generating, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from generation_cases import SMALL, random_model, small_model
from test_native_decoder import SHAPES, isa, model_of, threads, tokens_of  # noqa: F401
from torch import Tensor, nn

import fastgpt
from fastgpt import reference
from fastgpt.generation import Generator
from fastgpt.generation.native_engine import NativeDecoder, NativeEngine
from fastgpt.generation.native_weights import NativeWeights, Packs
from fastgpt.generation.network import read_network
from fastgpt.model import GPTModel
from fastgpt.ops import extension

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))

KINDS = [torch.float32, torch.bfloat16, "int8"]
PRECISIONS = [None, torch.bfloat16, "int8", "int4"]


def decoder_of(model, cache_dtype, precision=None, batch=1, limit=None):
    weights = NativeWeights(read_network(model), precision and Packs(precision))
    return NativeDecoder(weights, batch, limit or weights.network.context_length, cache_dtype)


def kept_in(decoder: NativeDecoder, count: int) -> tuple[Tensor, Tensor | None]:
    """The first `count` tokens of the cache as float32, and the scales of int8."""
    rows = decoder.cache.buffer[..., :count, :].contiguous()
    if rows.dtype != torch.int8:
        return rows.float(), None
    scales = rows[..., -4:].contiguous().view(torch.float32)
    return rows[..., :-4].float() * scales, scales


# What is kept.


@pytest.mark.parametrize("head_dim", [1, 3, 4, 8, 15, 16, 33, 64, 65, 128, 256])
def test_each_number_is_within_half_a_step_of_its_row(head_dim, isa):  # noqa: F811
    model = model_of(2, head_dim, 12, 40)
    ids, positions = tokens_of(model, 12), torch.arange(12)
    decoders = [decoder_of(model, kind) for kind in KINDS]
    for decoder in decoders:
        decoder.step(ids, torch.zeros_like(ids), positions)
    # Of the first layer, whose keys and values do not depend on what was kept before.
    (exact, _), (half, _), (got, scales) = (kept_in(decoder, 12) for decoder in decoders)
    exact, half, got, scales = exact[0], half[0], got[0], scales[0]
    assert torch.equal(half, exact.bfloat16().float())
    assert torch.equal(scales[..., 0], exact.abs().amax(-1) / 127)
    # Half a step, and the roundings of the product with 1 / scale.
    assert bool(((got - exact).abs() <= 0.5001 * scales).all())
    assert torch.equal(got.abs().amax(-1), 127 * scales[..., 0])


def test_a_row_of_zeros_is_kept_as_zeros():
    model = small_model()
    with torch.no_grad():
        for block in model.trf_blocks:
            block.att.W_key.weight.zero_()
            block.att.W_value.weight.zero_()
    ids, positions = tokens_of(model, 5), torch.arange(5)
    logits = []
    for kind in KINDS:
        decoder = decoder_of(model, kind)
        logits.append(decoder.step(ids, torch.zeros_like(ids), positions)[0])
        assert not kept_in(decoder, 5)[0].any()
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_comes_out_as_nan(bad):
    model = small_model()
    with torch.no_grad():
        model.tok_emb.weight[7, 3] = bad
    ids = torch.tensor([1, 7, 2])
    got, _ = decoder_of(model, "int8").step(ids, torch.zeros_like(ids), torch.arange(3))
    assert bool(got[0].isfinite().all()) and bool(got[1:].isnan().all())


def test_int8_takes_a_quarter_of_the_memory_and_a_scale():
    model = model_of(2, 64, 20, 40)
    n_bytes, n_layers = [], len(model.trf_blocks)
    for kind in KINDS:
        decoder = decoder_of(model, kind)
        decoder.cache.reserve(20)
        n_bytes.append(decoder.cache.buffer.nbytes // (n_layers * 2 * 20 * 2))
    assert n_bytes == [256, 128, 68]


# Sums.


class Kept(nn.Module):
    """A linear layer whose outputs, keys or values, are rounded as the cache keeps them, in float64."""

    def __init__(self, layer: nn.Linear, kind, n_heads: int) -> None:
        super().__init__()
        self.layer, self.kind, self.n_heads = layer, kind, n_heads

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        if self.kind is torch.bfloat16:
            return out.bfloat16().double()
        rows = out.unflatten(-1, (self.n_heads, -1))
        scale = rows.abs().amax(-1, keepdim=True) / 127
        return ((rows / scale).round() * scale).flatten(-2)


def rounded(model: nn.Module, kind, n_heads: int) -> nn.Module:
    """The model in float64 that keeps keys and values so."""
    twin = copy.deepcopy(model).double()
    for block in twin.trf_blocks:
        for name in ("W_key", "W_value"):
            setattr(block.att, name, Kept(getattr(block.att, name), kind, n_heads))
    return twin


@pytest.mark.parametrize("kind", ["int8", torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, 70, 50)], ids=str)
def test_logits_are_those_of_the_kept_keys_and_values(kind, shape, isa, threads):  # noqa: F811
    model = model_of(*shape, cls=reference.GPTModel)
    ids, positions = tokens_of(model, 1, shape[2]), torch.arange(shape[2])
    got, _ = decoder_of(model, kind).step(ids[0], torch.zeros_like(positions), positions)
    with torch.no_grad():
        want = rounded(model, kind, shape[0])(ids)[0]
    # A number between two steps may be rounded to the other one, which the softmax of these large weights enlarges.
    assert float((got - want).abs().max()) <= 0.01 * float(want.abs().max())


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_no_sum_depends_on_the_other_entries_or_the_threads(precision, isa, monkeypatch):  # noqa: F811
    model = model_of(3, 20, 80, 100)
    ids, positions, results = tokens_of(model, 80), torch.arange(80), []
    for count in (1, 2, 3):
        monkeypatch.setattr(NativeDecoder, "threads", lambda self, count=count: count)
        for piece in (1, 7, 80):
            decoder = decoder_of(model, "int8", precision)
            parts = [slice(begin, begin + piece) for begin in range(0, 80, piece)]
            steps = [decoder.step(ids[p], torch.zeros_like(ids[p]), positions[p])[0] for p in parts]
            results.append(torch.cat(steps))
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_lies_behind_a_row_is_never_read():
    model = small_model()
    decoder = decoder_of(model, "int8")
    decoder.cache.reserve(12)
    # All bits set: scales that are NaN.
    decoder.cache.buffer.fill_(-1)
    ids = tokens_of(model, 5)
    got, _ = decoder.step(ids, torch.zeros_like(ids), torch.arange(5))
    assert bool(got.isfinite().all())


# Generator.


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_default_keeps_what_it_kept(precision):
    model = small_model()
    engine = Generator(model, precision)._engine(read_network(model), "exact", 5)
    assert isinstance(engine, NativeEngine)
    want = torch.float32 if precision is None else torch.bfloat16
    assert engine._new_cache(1).buffer.dtype == want
    idx = tokens_of(model, 2, 4)
    same = Generator(model, precision, cache_dtype=want).generate(idx, 12)
    assert torch.equal(Generator(model, precision).generate(idx, 12), same)


def test_tokens_are_those_of_the_kept_keys_and_values():
    for seed in range(10):
        model = small_model(reference.GPTModel, seed=seed)
        twin, idx = rounded(model, "int8", 4), tokens_of(model, 1, 4, seed=seed)
        want = reference.generate_text_simple(twin, idx, 12, 12)
        got = Generator(model, cache_dtype="int8").generate(idx, 12)
        place = 4 + next((i for i in range(12) if got[0, 4 + i] != want[0, 4 + i]), 12)
        if place < 16:
            with torch.no_grad():
                logits = twin(want[:, :place][:, -12:])[0, -1]
            assert float(logits.max() - logits[got[0, place]]) < 0.01 * float(logits.abs().max())


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("overflow", ["exact", "slide", "stop"])
def test_each_row_of_a_ragged_list_gets_what_it_gets_alone(precision, overflow):
    for seed in range(4):
        model = small_model(seed=seed, n_heads=3)
        generator = Generator(model, precision, cache_dtype="int8")
        rows = [tokens_of(model, n, seed=n).tolist() for n in (1, 12, 5, 7, 2)]
        for options in ({}, {"eos_id": 5}, {"temperature": 1.5, "top_k": 9, "seed": 2}):
            got = generator.generate(rows, 10, overflow=overflow, **options)
            for number, (row, ids) in enumerate(zip(got, rows, strict=True)):
                if "seed" in options and number:
                    continue  # the noise is that of the row's place
                assert torch.equal(row, generator.generate([ids], 10, overflow=overflow, **options)[0])


@pytest.mark.parametrize("kind", ["int8", torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", [None, "int8"], ids=str)
def test_shortcuts_and_streams_give_the_same_tokens(kind, precision):
    cfg = SMALL | {"context_length": 90, "emb_dim": 32, "n_heads": 2, "vocab_size": 30}
    for seed in range(4):
        model = random_model(GPTModel, cfg, seed)
        kept = Generator(model, precision, cache_dtype=kind)
        plain = Generator(model, precision, cache_dtype=kind, shortcuts=False)
        ids = tokens_of(model, 1, 20, seed=seed).repeat(1, 2)
        for _ in range(3):
            want = plain.generate(ids, 9)
            assert torch.equal(kept.generate(ids, 9), want)
            assert torch.equal(torch.cat([ids, *plain.stream(ids, 9)], dim=1), want)
            ids = torch.cat([want[:, :-3], tokens_of(model, 1, 5, seed=seed)], dim=1)


def test_changed_weights_are_seen():
    model, other = small_model(seed=1), small_model(seed=2)
    generator, idx = Generator(model, cache_dtype="int8"), tokens_of(model, 1, 4)
    generator.generate(idx, 5)
    model.load_state_dict(other.state_dict())
    assert torch.equal(generator.generate(idx, 5), Generator(other, cache_dtype="int8").generate(idx, 5))


# Refusals.


@pytest.mark.parametrize("kind", [torch.float16, "int4", "float32", 8, []], ids=str)
def test_another_cache_dtype_is_refused(kind):
    with pytest.raises(ValueError, match='cache_dtype must be None.*torch.bfloat16 or "int8"; got'):
        Generator(small_model(), cache_dtype=kind)


@pytest.mark.parametrize("engine", ["graph", "persistent"])
def test_the_decoders_for_gpus_refuse_it(engine):
    with pytest.raises(ValueError, match=f"engine='{engine}' keeps keys and values in the dtype of the weights"):
        Generator(small_model(), engine=engine, cache_dtype="int8")


def test_where_the_native_decoder_cannot_run_it_is_refused_with_the_reason():
    model = small_model()
    model.trf_blocks[0].ff.layers[1] = nn.ReLU()
    for dtype in (None, torch.bfloat16, "int8"):
        with pytest.raises(ValueError, match="cache_dtype='int8'.*GELU.*cache_dtype=None"):
            Generator(model, dtype, cache_dtype="int8").generate([[1]], 2)
    with pytest.raises(ValueError, match="cache_dtype='int8'.*float64"):
        Generator(small_model(), torch.float64, cache_dtype="int8").generate([[1]], 2)
    with fastgpt.use_backend("reference"), pytest.raises(ValueError, match="reference is asked for"):
        Generator(small_model(), cache_dtype="int8").generate([[1]], 2)


def test_a_model_without_a_cache_refuses_it():
    with pytest.raises(ValueError, match="cache_dtype=int8.*another"):
        Generator(lambda ids: ids, cache_dtype="int8").generate([[1]], 2)


def test_a_bfloat16_model_converted_to_float32_can_have_it():
    model, idx = small_model().bfloat16(), torch.tensor([[1, 2]])
    got = Generator(model, torch.float32, cache_dtype="int8").generate(idx, 8)
    assert torch.equal(got, Generator(copy.deepcopy(model).float(), cache_dtype="int8").generate(idx, 8))


@pytest.mark.parametrize(("place", "code", "text"), [(64, 3, "unknown cache format 3"), (0, 2, "null"), (66, 0, "mis")])
def test_the_door_refuses_a_cache_that_is_none(place, code, text):
    decoder = decoder_of(small_model(), "int8")
    entries = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=text):
        decoder.weights.decoder.step(place, code, 1, 4, entries.data_ptr(), 1, 0, 0, 0, 0, 1)
