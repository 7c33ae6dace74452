"""Hugging Face's GPT-2 in and out, judged by a plain GPT-2 on its tensors, and by transformers where it is there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgpt import reference
from fastgpt.config import BASE_CONFIG, check_config, model_configs, pretrained_config
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast
from fastgpt.weights import huggingface
from fastgpt.weights.checkpoint_files import load_weights_file, read_weights
from fastgpt.weights.errors import WeightsError
from fastgpt.weights.huggingface import (
    assign_check,
    config_from_huggingface,
    huggingface_config,
    load_huggingface,
    model_config,
    save_huggingface,
)
from fastgpt.weights.layouts import infer_config, to_book, to_huggingface

CFG = {
    "vocab_size": 61,
    "context_length": 9,
    "emb_dim": 12,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}
# Float32 on both sides, other orders of summation.
LOGITS = 2e-5


def gpt2_shapes(cfg: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of GPT2Model's parameters, from its specification."""
    d = cfg["emb_dim"]
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (cfg["vocab_size"], d)}
    shapes["wpe.weight"] = (cfg["context_length"], d)
    for i in range(cfg["n_layers"]):
        h = f"h.{i}."
        shapes |= {f"{h}ln_1.weight": (d,), f"{h}ln_1.bias": (d,)}
        shapes |= {f"{h}attn.c_attn.weight": (d, 3 * d), f"{h}attn.c_attn.bias": (3 * d,)}
        shapes |= {f"{h}attn.c_proj.weight": (d, d), f"{h}attn.c_proj.bias": (d,)}
        shapes |= {f"{h}ln_2.weight": (d,), f"{h}ln_2.bias": (d,)}
        shapes |= {f"{h}mlp.c_fc.weight": (d, 4 * d), f"{h}mlp.c_fc.bias": (4 * d,)}
        shapes |= {f"{h}mlp.c_proj.weight": (4 * d, d), f"{h}mlp.c_proj.bias": (d,)}
    return shapes | {"ln_f.weight": (d,), "ln_f.bias": (d,)}


def gpt2_tensors(cfg: dict[str, Any], *, prefix: str = "transformer.", tied: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tensors = {prefix + n: torch.randn(s, generator=generator) * 0.3 for n, s in gpt2_shapes(cfg).items()}
    if not tied:
        tensors["lm_head.weight"] = torch.randn(cfg["vocab_size"], cfg["emb_dim"], generator=generator)
    return tensors


def plain_gpt2(tensors: dict[str, Tensor], idx: Tensor, n_heads: int) -> Tensor:
    """GPT-2's forward on Hugging Face's own tensors, matrices (in, out), in float64: the judge."""
    t = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    def conv1d(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    batch, length = idx.shape
    x = t["wte.weight"][idx] + t["wpe.weight"][:length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(sum(name.endswith("ln_1.weight") for name in t)):
        qkv = conv1d(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(x.shape[-1], dim=-1)
        q, k, v = (part.view(batch, length, n_heads, -1).transpose(1, 2) for part in qkv)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
        x = x + conv1d((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape), f"h.{i}.attn.c_proj")
        hidden = nn.functional.gelu(conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + conv1d(hidden, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ t.get("lm_head.weight", t["wte.weight"]).T


def write_folder(folder: Path, tensors: dict[str, Tensor], cfg: dict[str, Any], *, tied: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface_config(cfg, tied=tied)), "utf-8")
    return folder


def random_model(cfg: dict[str, Any], kind: type[nn.Module] = GPTModel) -> nn.Module:
    torch.manual_seed(3)
    model = kind(cfg).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def tokens(cfg: dict[str, Any] = CFG) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, cfg["vocab_size"], (3, cfg["context_length"]), generator=generator)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_folder_gives_the_logits_of_a_plain_gpt2(tmp_path, prefix, tied):
    tensors = gpt2_tensors(CFG, prefix=prefix, tied=tied)
    model = load_huggingface(write_folder(tmp_path / "gpt2", tensors, CFG, tied=tied))
    got = model(tokens()).double()
    assert (got - plain_gpt2(tensors, tokens(), CFG["n_heads"])).abs().max() <= LOGITS


@pytest.mark.parametrize("kind", [GPTModel, GPTModelFast, reference.GPTModel])
def test_a_folder_loads_into_each_of_the_models(tmp_path, kind):
    tensors = gpt2_tensors(CFG)
    model = kind(CFG).eval()
    before = dict(model.named_parameters())
    load_weights_file(write_folder(tmp_path / "gpt2", tensors, CFG), model)
    assert (model(tokens()).double() - plain_gpt2(tensors, tokens(), CFG["n_heads"])).abs().max() <= LOGITS
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_the_mask_buffers_of_old_checkpoints_are_ignored(tmp_path):
    tensors = gpt2_tensors(CFG, prefix="")
    length = CFG["context_length"]
    for i in range(CFG["n_layers"]):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, length, length, dtype=torch.uint8).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    folder = write_folder(tmp_path / "gpt2", tensors, CFG)
    want = plain_gpt2(gpt2_tensors(CFG, prefix=""), tokens(), CFG["n_heads"])
    assert (load_huggingface(folder)(tokens()).double() - want).abs().max() <= LOGITS


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files_and_shards_give_equal_tensors(tmp_path, name, sharded):
    tensors = gpt2_tensors(CFG, tied=False)
    write = torch.save if name.endswith(".bin") else save_file
    places = {key: f"{i % 3}-{name}" if sharded else name for i, key in enumerate(tensors)}
    for place in set(places.values()):
        write({key: tensor for key, tensor in tensors.items() if places[key] == place}, tmp_path / place)
    if sharded:
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}), "utf-8")
    got = to_huggingface(read_weights(tmp_path), tied=False)
    assert all(torch.equal(got[key], tensor) for key, tensor in tensors.items())
    assert set(got) == set(tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_in_and_out_again_gives_equal_files(tmp_path, tied):
    tensors = gpt2_tensors(CFG, tied=tied)
    model = load_huggingface(write_folder(tmp_path / "in", tensors, CFG, tied=tied))
    save_huggingface(model, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert set(got) == set(tensors)
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["tie_word_embeddings"] is tied
    assert config_from_huggingface(json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))) == CFG


@pytest.mark.parametrize("kind", [GPTModel, GPTModelFast, reference.GPTModel])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_written_model_is_a_plain_gpt2(tmp_path, kind, qkv_bias):
    model = random_model(CFG | {"qkv_bias": qkv_bias}, kind)
    save_huggingface(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert (model(tokens()).double() - plain_gpt2(written, tokens(), CFG["n_heads"])).abs().max() <= LOGITS


def test_biases_that_the_model_lacks_are_written_as_zeros_and_dropped_again(tmp_path):
    cfg = CFG | {"qkv_bias": False}
    model = random_model(cfg)
    save_huggingface(model, tmp_path)
    assert not load_file(tmp_path / "model.safetensors")["transformer.h.0.attn.c_attn.bias"].any()
    again = GPTModel(cfg).eval()
    load_weights_file(tmp_path, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_biases_that_are_not_zero_are_never_dropped(tmp_path):
    model = GPTModel(CFG | {"qkv_bias": False})
    with pytest.raises(WeightsError, match="W_query.bias is not part of the model"):
        load_weights_file(write_folder(tmp_path / "gpt2", gpt2_tensors(CFG), CFG), model)


def test_a_tied_model_refuses_two_different_tensors(tmp_path):
    model = GPTModel(CFG)
    model.out_head.weight = model.tok_emb.weight
    before = model.tok_emb.weight.clone()
    with pytest.raises(WeightsError, match="one tensor in the model"):
        load_weights_file(write_folder(tmp_path / "gpt2", gpt2_tensors(CFG, tied=False), CFG), model)
    assert torch.equal(model.tok_emb.weight, before)


def test_a_wrapped_model_is_written_and_read_like_a_bare_one(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

    model = random_model(CFG)
    save_huggingface(Wrapped(torch.compile(model)), tmp_path)  # type: ignore[arg-type]
    again = GPTModel(CFG)
    load_weights_file(tmp_path, Wrapped(again))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_bfloat16_stays_bfloat16(tmp_path):
    model = random_model(CFG).to(torch.bfloat16)
    save_huggingface(model, tmp_path)
    again = load_huggingface(tmp_path)
    assert again.tok_emb.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_drop_rates_travel_in_the_config(tmp_path):
    rates = {"drop_rate_emb": 0.1, "drop_rate_attn": 0.2, "drop_rate_shortcut": 0.3}
    cfg = {key: value for key, value in CFG.items() if key != "drop_rate"} | rates
    save_huggingface(GPTModel(cfg), tmp_path)
    assert model_config(load_huggingface(tmp_path)) == cfg


def test_a_classifier_is_not_written(tmp_path):
    model = GPTModel(CFG)
    model.out_head = nn.Linear(CFG["emb_dim"], 2)
    with pytest.raises(WeightsError, match="no place for out_head.bias"):
        save_huggingface(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 7),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("n_head", 5),
        ("n_layer", "2"),
        ("n_embd", -12),
    ],
)
def test_a_config_that_the_book_does_not_compute_is_refused(key, value):
    with pytest.raises(WeightsError):
        config_from_huggingface(huggingface_config(CFG) | {key: value})


@pytest.mark.parametrize("key", ["n_layer", "n_positions", "vocab_size", "n_embd"])
def test_a_config_with_absurd_sizes_is_refused_before_a_model_is_built(tmp_path, key):
    folder = write_folder(tmp_path / "gpt2", gpt2_tensors(CFG), CFG)
    config = huggingface_config(CFG) | {key: 12 * 10**12}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(WeightsError, match="its configuration has"):
        load_huggingface(folder)


@pytest.mark.parametrize("name", model_configs)
def test_the_four_released_sizes_translate_by_shape(name):
    cfg = pretrained_config(name)
    with torch.device("meta"):
        tensors = {f"transformer.{n}": torch.empty(shape) for n, shape in gpt2_shapes(cfg).items()}
        model = GPTModel(cfg)
    book = to_book(tensors)
    assert {n: t.shape for n, t in book.items()} == {n: t.shape for n, t in model.named_parameters()}
    assert infer_config(tensors) == check_config(cfg, ()) | {"drop_rate": 0.0}
    back = to_huggingface(book, tied=True)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in tensors.items()}


class TestBookBonus:
    def gpt_hf(self) -> nn.Module:
        """Stands for transformers' GPT2Model: only its state_dict is used."""

        class Named(nn.Module):
            def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
                return gpt2_tensors(CFG, prefix="")

        return Named()

    def test_load_weights_gives_the_logits_of_a_plain_gpt2(self):
        gpt = reference.GPTModel(CFG).eval()
        huggingface.load_weights(gpt, self.gpt_hf())
        want = plain_gpt2(gpt2_tensors(CFG), tokens(), CFG["n_heads"])
        assert (gpt(tokens()).double() - want).abs().max() <= LOGITS

    def test_the_head_is_a_copy_of_its_own(self):
        gpt = GPTModel(CFG)
        old = gpt.out_head.weight
        huggingface.load_weights_into_gpt(gpt, gpt2_tensors(CFG, prefix=""))
        assert gpt.out_head.weight is not old
        assert torch.equal(gpt.out_head.weight, gpt.tok_emb.weight)
        assert gpt.out_head.weight.data_ptr() != gpt.tok_emb.weight.data_ptr()

    def test_a_model_without_biases_is_told_what_it_needs(self):
        with pytest.raises(ValueError, match="qkv_bias=True"):
            huggingface.load_weights(GPTModel(CFG | {"qkv_bias": False}), self.gpt_hf())

    def test_another_size_changes_nothing(self):
        gpt = GPTModel(CFG | {"context_length": 8})
        before = list(gpt.parameters())
        with pytest.raises(ValueError, match="pos_emb.weight: Shape mismatch"):
            huggingface.load_weights(gpt, self.gpt_hf())
        assert all(a is b for a, b in zip(before, gpt.parameters(), strict=True))

    def test_assign_check_copies(self):
        right = torch.arange(6.0).view(2, 3)
        parameter = assign_check(torch.zeros(2, 3), right)
        right.zero_()
        assert parameter.requires_grad and torch.equal(parameter.detach(), torch.arange(6.0).view(2, 3))
        with pytest.raises(ValueError, match="Shape mismatch"):
            assign_check(torch.zeros(3, 2), right)


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("transformers", reason="transformers, the judge of these tests, is not installed")


class TestTransformers:
    """Against the library itself."""

    def hf_model(self, library: Any, cfg: dict[str, Any], *, tied: bool) -> Any:
        torch.manual_seed(5)
        model = library.GPT2LMHeadModel(library.GPT2Config(**huggingface_config(cfg, tied=tied, eot_token=0))).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("shard", ["1GB", "6KB"])
    def test_what_it_saves_has_equal_logits_here_and_equal_tensors_there(self, library, tmp_path, tied, shard):
        theirs = self.hf_model(library, CFG, tied=tied)
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
        ours = load_huggingface(tmp_path / "theirs")
        with torch.no_grad():
            assert (ours(tokens()) - theirs(tokens()).logits).abs().max() <= LOGITS
        save_huggingface(ours, tmp_path / "ours")
        again, report = library.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(report.values()), report
        assert again.config.tie_word_embeddings is tied
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())

    @pytest.mark.parametrize("kind", [GPTModel, GPTModelFast])
    @pytest.mark.parametrize("qkv_bias", [True, False])
    def test_it_loads_what_we_write_with_equal_logits(self, library, tmp_path, kind, qkv_bias):
        ours = random_model(CFG | {"qkv_bias": qkv_bias}, kind)
        save_huggingface(ours, tmp_path)
        theirs = library.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert (ours(tokens()) - theirs(tokens()).logits).abs().max() <= LOGITS

    def test_it_loads_bfloat16_as_bfloat16(self, library, tmp_path):
        save_huggingface(random_model(CFG).to(torch.bfloat16), tmp_path)
        assert library.GPT2LMHeadModel.from_pretrained(tmp_path, torch_dtype="auto").dtype == torch.bfloat16

    def test_the_book_bonus_takes_its_model(self, library):
        theirs = self.hf_model(library, CFG, tied=True)
        gpt = GPTModel(CFG).eval()
        huggingface.load_weights(gpt, theirs.transformer)
        with torch.no_grad():
            assert (gpt(tokens()) - theirs(tokens()).logits).abs().max() <= LOGITS

    @pytest.mark.parametrize("name", model_configs)
    def test_the_four_released_sizes_have_its_names_and_shapes(self, library, name):
        cfg = BASE_CONFIG | model_configs[name]
        with torch.device("meta"):
            theirs = library.GPT2LMHeadModel(library.GPT2Config(**huggingface_config(cfg)))
            ours = to_huggingface(dict(GPTModel(cfg).named_parameters()), tied=False)
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.state_dict().items()}
