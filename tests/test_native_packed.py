"""Packed weights of the native decoder: what is stored, the sums over it, and that they follow the model."""

from __future__ import annotations

import copy

import pytest
import torch
from generation_cases import small_model
from test_native_decoder import isa, model_of, threads, tokens_of  # noqa: F401
from torch import Tensor, nn

import fastgpt
from fastgpt import reference
from fastgpt.generation import Generator
from fastgpt.generation.native_engine import NativeDecoder, NativeEngine
from fastgpt.generation.native_weights import FORMATS, NativeWeights, Packs, _pack
from fastgpt.generation.network import read_network
from fastgpt.ops import extension

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))

PRECISIONS = [torch.bfloat16, "int8", "int4"]
SHAPES = [(1, 1, 3, 5), (3, 5, 9, 41), (2, 16, 20, 64), (5, 4, 7, 33), (4, 16, 70, 130), (3, 32, 40, 257)]


def unpack(packed, n_out: int, n_in: int) -> Tensor:
    """The matrix behind the tiles, as kernels/cpu/decoder_tiles.h describes them."""
    tiles, groups = -(-n_out // 16), -(-n_in // 32)
    if packed.format == FORMATS[torch.bfloat16]:
        lines = packed.data.view(torch.bfloat16).view(tiles, groups, 16, 16, 2).float()
    elif packed.format == FORMATS["int8"]:
        lines = packed.data.view(torch.int8).view(tiles, groups, 8, 16, 4).float()
    else:
        both = packed.data.view(tiles, groups, 4, 16, 4)
        lines = torch.stack((both & 15, both >> 4), dim=3).float() - 8  # (tile, group, line, half, row, 4)
        lines = lines.transpose(3, 4).transpose(2, 3).reshape(tiles, groups, 16, 32).transpose(1, 2)
    if packed.format != FORMATS["int4"]:
        lines = lines.permute(0, 3, 1, 2, 4).reshape(tiles, 16, groups, 32)
    if packed.scales is not None and len(packed.scales):
        scales = (packed.scales.view(tiles, groups, 16).int() << 16).view(torch.float32)
        lines = lines * scales.transpose(1, 2)[..., None]
    return lines.reshape(tiles * 16, groups * 32)[:n_out, :n_in]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (50, 100), (64, 24)], ids=str)
def test_what_is_packed_is_near_the_weights(precision, shape, isa):  # noqa: F811
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = -9.0
    got = unpack(_pack(weight, FORMATS[precision]), *shape)
    if precision is torch.bfloat16:
        assert torch.equal(got, weight.bfloat16().float())
        return
    filled = torch.zeros(shape[0], -(-shape[1] // 32) * 32)
    filled[:, : shape[1]] = weight
    largest = filled.view(shape[0], -1, 32).abs().amax(dim=2).repeat_interleave(32, dim=1)[:, : shape[1]]
    # Half a step of the group's scale, and the rounding of the scale itself (2^-8) at the largest weight. With 4 bits
    # the scale may be a fifth larger where that makes the squared error smaller, and cuts the other end off.
    bound = largest * (0.5 / 127 + 2**-8 if precision == "int8" else 1.3 / 8)
    assert bool(((got - weight).abs() <= bound).all())


def test_zeros_are_packed_as_zeros():
    for precision in PRECISIONS:
        assert not unpack(_pack(torch.zeros(20, 40), FORMATS[precision]), 20, 40).any()


class QuantisedInputs(nn.Module):
    """A linear layer on unpacked weights that rounds its inputs to 8 bits in groups of 32, as the decoder does, and its
    outputs to bfloat16 where they are keys and values.
    """

    def __init__(self, packed, layer: nn.Linear, is_cached: bool) -> None:
        super().__init__()
        self.is_cached = is_cached
        self.weight = unpack(packed, *layer.weight.shape).double()
        self.bias = None if layer.bias is None else layer.bias.detach().double()
        self.exact = packed.format == FORMATS[torch.bfloat16]

    def forward(self, x: Tensor) -> Tensor:
        if not self.exact:
            groups = nn.functional.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
            scale = groups.abs().amax(dim=-1, keepdim=True) / 127
            rounded = (groups * torch.where(scale > 0, 1 / scale, 0.0)).round().double() * scale.double()
            x = rounded.flatten(-2)[..., : x.shape[-1]]
        out = nn.functional.linear(x.double(), self.weight, self.bias)
        return out.bfloat16().double() if self.is_cached else out


def quantised(model: nn.Module, precision) -> nn.Module:
    """The model in float64 with the weights and inputs that the decoder multiplies."""
    packs, twin = Packs(precision), copy.deepcopy(model).double()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            twin.get_submodule(parent).__setattr__(
                last,
                QuantisedInputs(packs.matrix(layer.weight, name == "out_head"), layer, last in ("W_key", "W_value")),
            )
    return twin


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_those_of_the_packed_weights(precision, shape, isa, threads):  # noqa: F811
    model = model_of(*shape, cls=reference.GPTModel)
    ids, positions = tokens_of(model, 1, shape[2]), torch.arange(shape[2])
    decoder = NativeDecoder(NativeWeights(read_network(model), Packs(precision)), 1, shape[2])
    got, best = decoder.step(ids[0], torch.zeros_like(positions), positions, best=True)
    with torch.no_grad():
        want = quantised(model, precision)(ids)[0]
    # An input between two of the 255 steps may be rounded to the other one: that is 1 / 254 of its group's largest. So
    # may a key or a value, by 2^-8, which the softmax of these large weights makes larger.
    assert float((got - want).abs().max()) <= 0.02 * float(want.abs().max())
    assert torch.equal(best, got.argmax(dim=1))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_no_sum_depends_on_the_other_entries_or_the_threads(precision, isa, monkeypatch):  # noqa: F811
    # The last layer of 832 inputs: more than a block of weights holds.
    model = model_of(13, 16, 40, 100)
    ids, positions = tokens_of(model, 40), torch.arange(40)
    weights = NativeWeights(read_network(model), Packs(precision))
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(NativeDecoder, "threads", lambda self, count=count: count)
        for piece in (1, 2, 3, 7, 40):
            decoder = NativeDecoder(weights, 1, 40)
            parts = [slice(begin, begin + piece) for begin in range(0, 40, piece)]
            steps = [decoder.step(ids[p], torch.zeros_like(ids[p]), positions[p])[0] for p in parts]
            results.append(torch.cat(steps))
    assert all(torch.equal(result, results[0]) for result in results)


def test_more_entries_than_a_tile_takes_at_once():
    model = model_of(2, 16, 150, 100)
    ids, positions = tokens_of(model, 150), torch.arange(150)
    for precision in (None, *PRECISIONS):
        weights = NativeWeights(read_network(model), None if precision is None else Packs(precision))
        whole = NativeDecoder(weights, 1, 150).step(ids, torch.zeros_like(ids), positions)[0]
        decoder = NativeDecoder(weights, 1, 150)
        for begin in range(0, 150, 50):
            part = slice(begin, begin + 50)
            got = decoder.step(ids[part], torch.zeros(50).long(), positions[part])[0]
            assert torch.equal(got, whole[part])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_inputs_that_are_not_finite_come_out_as_nan(precision, bad):
    model = small_model()
    with torch.no_grad():
        model.tok_emb.weight[7, 3] = bad
    decoder = NativeDecoder(NativeWeights(read_network(model), Packs(precision)), 1, 12)
    got, _ = decoder.step(torch.tensor([7]), torch.tensor([0]), torch.tensor([0]))
    assert bool(got.isnan().all())


# Generator.


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_tokens_are_those_of_the_packed_weights(precision):
    for seed in range(10):
        model = small_model(reference.GPTModel, seed=seed)
        idx = tokens_of(model, 1, 4, seed=seed)
        want = reference.generate_text_simple(quantised(model, precision), idx, 8, 12)
        got = Generator(model, dtype=precision).generate(idx, 8)
        # What was rounded the other way may decide between two tokens that are as good as equal.
        place = 4 + next((i for i in range(8) if got[0, 4 + i] != want[0, 4 + i]), 8)
        if place < 12:
            with torch.no_grad():
                logits = quantised(model, precision)(want[:, :place])[0, -1]
            assert float(logits.max() - logits[got[0, place]]) < 0.02 * float(logits.abs().max())


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_each_row_of_a_ragged_list_gets_what_it_gets_alone(precision):
    for seed in range(6):
        model = small_model(seed=seed, n_heads=3)
        generator = Generator(model, dtype=precision)
        rows = [tokens_of(model, n, seed=n).tolist() for n in (1, 12, 5, 7, 12, 2)]
        for overflow in ("exact", "slide", "stop"):
            for options in ({}, {"eos_id": 5}):
                got = generator.generate(rows, 10, overflow=overflow, **options)
                for row, ids in zip(got, rows, strict=True):
                    assert torch.equal(row, generator.generate([ids], 10, overflow=overflow, **options)[0])


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_packed_copy_follows_the_weights(precision):
    model, other = small_model(seed=1), small_model(seed=2)
    generator, idx = Generator(model, dtype=precision), tokens_of(model, 2, 4)
    first = generator.generate(idx, 8)
    want = Generator(other, dtype=precision).generate(idx, 8)
    assert not torch.equal(first, want)
    model.load_state_dict(other.state_dict())
    assert torch.equal(generator.generate(idx, 8), want)
    with torch.no_grad():
        model.out_head.weight.data.neg_()
    generator.refresh()
    flipped = copy.deepcopy(other)
    with torch.no_grad():
        flipped.out_head.weight.neg_()
    assert torch.equal(generator.generate(idx, 8), Generator(flipped, dtype=precision).generate(idx, 8))


def test_a_replaced_weight_is_packed_and_the_old_one_forgotten():
    model = small_model()
    generator = Generator(model, dtype="int8")
    generator.generate([[1]], 2)
    before = len(generator._packs._entries)
    model.out_head.weight = nn.Parameter(-model.out_head.weight.detach())
    assert torch.equal(
        generator.generate([[1]], 5)[0], Generator(copy.deepcopy(model), dtype="int8").generate([[1]], 5)[0]
    )
    assert len(generator._packs._entries) == before


def test_a_bfloat16_model_can_be_packed():
    model = small_model().bfloat16()
    for precision in PRECISIONS:
        generator = Generator(model, dtype=precision)
        assert isinstance(generator._engine(generator._network(), "exact", 5), NativeEngine)
        want = Generator(copy.deepcopy(model).float(), dtype=precision).generate([[1, 2]], 8)[0]
        assert torch.equal(generator.generate([[1, 2]], 8)[0], want)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_cannot_be_packed_is_refused_with_the_reason(precision):
    model = small_model()
    model.trf_blocks[0].ff.layers[1] = nn.ReLU()
    with pytest.raises(ValueError, match=f"{precision}.*GELU.*dtype=None"):
        Generator(model, dtype=precision).generate([[1]], 2)
    with fastgpt.use_backend("reference"), pytest.raises(ValueError, match="reference is asked for"):
        Generator(small_model(), dtype=precision).generate([[1]], 2)


@pytest.mark.parametrize(
    "sizes", [(0, 4, 1), (4, 0, 1), (-1, 4, 1), (2**62, 4, 1), (4, 4, 0), (4, 4, 4), (2**33, 2**33, 2)]
)
def test_impossible_sizes_of_packed_weights_are_refused(sizes):
    with pytest.raises(ValueError):
        extension.load("cpu").decoder_packed_size(*sizes)
    with pytest.raises(ValueError):
        extension.load("cpu").decoder_pack(64, 64, 64, *sizes, 1)
