"""LoRA: the formula, replacement, gradients, merging, and adapters on disk."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastgpt
from fastgpt import reference
from fastgpt.config import pretrained_config
from fastgpt.finetuning import (
    LinearWithLoRA,
    LoRALayer,
    load_adapter,
    merge_lora,
    replace_linear_with_lora,
    save_adapter,
)
from fastgpt.finetuning.lora import LinearWithLoRAMerged, lora_layers, merged_tensors
from fastgpt.model import GPTModel
from fastgpt.weights import CheckpointError
from fastgpt.weights.files import model_tensors

CFG = {
    "vocab_size": 61,
    "context_length": 12,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}
LINEARS_OF_A_BLOCK = 6


def make_model(seed: int = 1, **changes: object) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(CFG | changes).eval()


def adapted(rank: int = 4, alpha: float = 8, seed: int = 1, **options: str) -> GPTModel:
    """A frozen model with LoRA layers that do something."""
    model = make_model(seed)
    model.requires_grad_(False)
    replace_linear_with_lora(model, rank, alpha, **options)
    torch.manual_seed(99)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora.B.normal_(std=0.1)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("scaling", "scale"), [("alpha/rank", 2.0), ("alpha", 6.0)])
def test_the_layer_computes_scale_times_x_a_b(scaling, scale):
    layer = LoRALayer(5, 7, rank=3, alpha=6, scaling=scaling)
    nn.init.normal_(layer.B)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(layer(x), scale * torch.einsum("bti,ir,ro->bto", x, layer.A, layer.B))


def test_the_default_scaling_is_that_of_the_books_repository():
    assert LoRALayer(5, 7, 4, 8).scale == 2.0


def test_a_is_kaiming_uniform_and_b_is_zero():
    torch.manual_seed(3)
    layer = LoRALayer(5, 7, rank=3, alpha=1)
    torch.manual_seed(3)
    wanted = torch.empty(5, 3)
    nn.init.kaiming_uniform_(wanted, a=math.sqrt(5))
    assert torch.equal(layer.A, wanted)
    assert torch.equal(layer.B, torch.zeros(3, 7))


def test_a_fresh_lora_changes_no_logit(tokens):
    model = make_model()
    before = model(tokens)
    replace_linear_with_lora(model, rank=4, alpha=8)
    assert torch.equal(model(tokens), before)


def test_every_linear_layer_is_replaced_and_the_head_too():
    model = make_model()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    replace_linear_with_lora(model, rank=4, alpha=8)
    layers = dict(lora_layers(model))
    assert set(layers) == set(linears) and "out_head" in layers
    assert len(layers) == CFG["n_layers"] * LINEARS_OF_A_BLOCK + 1
    assert all(layers[name].linear is linears[name] for name in linears)


def test_lora_logits_equal_those_of_the_plain_pytorch_model(tokens):
    model = adapted()
    plain = reference.GPTModel(CFG).eval()
    replace_linear_with_lora(plain, 4, 8)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens), plain(tokens), atol=2e-6, rtol=1e-5)


def test_only_lora_parameters_get_gradients_when_the_model_was_frozen(tokens):
    model = adapted()
    model(tokens).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".lora." in name}


def test_gradients_of_a_and_b_are_right_in_float64():
    layer = LinearWithLoRA(nn.Linear(4, 3).double(), rank=2, alpha=3)
    nn.init.normal_(layer.lora.B)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    a, b = layer.lora.A.detach().requires_grad_(), layer.lora.B.detach().requires_grad_()

    def run(x, a, b):
        return torch.func.functional_call(layer, {"lora.A": a, "lora.B": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, a, b))


def test_gpt2_with_two_classes_has_the_known_number_of_parameters():
    with torch.device("meta"):
        model = GPTModel(pretrained_config("gpt2-small (124M)"))
        model.out_head = nn.Linear(768, 2)
        assert sum(p.numel() for p in model.parameters()) == 124_441_346
        model.requires_grad_(False)
        replace_linear_with_lora(model, rank=16, alpha=16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_666_528


def test_the_lora_layer_takes_device_and_dtype_of_the_linear_layer():
    layer = LinearWithLoRA(nn.Linear(4, 3, dtype=torch.bfloat16), rank=2, alpha=3)
    assert layer.lora.A.dtype is torch.bfloat16
    assert layer(torch.randn(2, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_replacing_twice_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="LoRA layers already"):
        replace_linear_with_lora(model, 4, 8)


@pytest.mark.parametrize(
    ("values", "word"),
    [((0, 8), "rank"), ((2.5, 8), "rank"), ((4, math.nan), "alpha"), ((4, "8"), "alpha"), ((4, True), "alpha")],
)
def test_impossible_settings_are_named(values, word):
    with pytest.raises(ValueError, match=word):
        replace_linear_with_lora(make_model(), *values)


def test_an_unknown_scaling_is_named():
    with pytest.raises(ValueError, match="alpha/rank"):
        replace_linear_with_lora(make_model(), 4, 8, scaling="sqrt")


@pytest.mark.parametrize("scaling", ["alpha/rank", "alpha"])
def test_merging_keeps_the_logits(tokens, scaling):
    model = adapted(scaling=scaling).double()
    before = model(tokens)
    assert merge_lora(model) == CFG["n_layers"] * LINEARS_OF_A_BLOCK + 1
    torch.testing.assert_close(model(tokens), before, atol=1e-12, rtol=0)


def test_merging_gives_the_plain_modules_back_with_the_same_parameter_objects():
    model = make_model()
    names, weight = list(model.state_dict()), model.trf_blocks[0].att.W_query.weight
    replace_linear_with_lora(model, 4, 8)
    merge_lora(model)
    assert list(model.state_dict()) == names
    assert type(model.trf_blocks[0].att.W_query) is nn.Linear
    assert model.trf_blocks[0].att.W_query.weight is weight


def test_merging_bfloat16_rounds_once():
    layer = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    replace_linear_with_lora(layer, 2, 2)
    nn.init.normal_(layer[0].lora.B)
    wanted = (layer[0].linear.weight.double() + (layer[0].lora.A.double() @ layer[0].lora.B.double()).T).bfloat16()
    merge_lora(layer)
    assert torch.equal(layer[0].weight, wanted)


def test_merging_a_model_without_lora_does_nothing():
    assert merge_lora(make_model()) == 0


def test_merged_tensors_are_those_that_merging_leaves():
    model = adapted()
    tensors = merged_tensors(model)
    merge_lora(model)
    wanted = model_tensors(model)
    assert set(tensors) == set(wanted)
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_the_merged_form_computes_the_same():
    torch.manual_seed(0)
    plain = LinearWithLoRA(nn.Linear(6, 5), 2, 3, scaling="alpha")
    nn.init.normal_(plain.lora.B)
    merged = LinearWithLoRAMerged(nn.Linear(6, 5), 2, 3)
    merged.load_state_dict(plain.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(merged(x), plain(x))


def test_generation_with_lora_equals_generation_after_merging(tokens):
    model = adapted()
    with_lora = fastgpt.generate(model, tokens, 8, 12)
    merge_lora(model)
    assert torch.equal(fastgpt.generate(model, tokens, 8, 12), with_lora)


def test_a_model_with_lora_can_be_copied(tokens):
    model = adapted()
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))


def test_an_adapter_comes_back_to_the_bit(tmp_path, tokens):
    model = adapted(rank=3, alpha=5, scaling="alpha")
    save_adapter(tmp_path / "a.safetensors", model, info={"note": "x"})
    fresh = make_model()
    assert load_adapter(tmp_path / "a.safetensors", fresh) == {"note": "x"}
    assert torch.equal(fresh(tokens), model(tokens))
    assert fresh.out_head.lora.scaling == "alpha" and fresh.out_head.lora.alpha == 5


def test_an_adapter_holds_the_thin_matrices_alone(tmp_path):
    save_adapter(tmp_path / "a.safetensors", adapted())
    assert all(name.endswith((".lora.A", ".lora.B")) for name in load_file(tmp_path / "a.safetensors"))


def test_an_adapter_goes_into_lora_layers_that_are_there(tmp_path, tokens):
    model = adapted()
    save_adapter(tmp_path / "a.safetensors", model)
    other = make_model()
    replace_linear_with_lora(other, 4, 8)
    load_adapter(tmp_path / "a.safetensors", other)
    assert torch.equal(other(tokens), model(tokens))


def test_an_adapter_can_bring_a_head_along(tmp_path, tokens):
    def classifier(seed: int) -> GPTModel:
        model = make_model()
        torch.manual_seed(seed)
        model.out_head = nn.Linear(16, 2)
        return model

    model = classifier(seed=7)
    replace_linear_with_lora(model, 4, 8)
    nn.init.normal_(model.out_head.lora.B)
    also = ["out_head.linear.weight", "out_head.linear.bias"]
    save_adapter(tmp_path / "a.safetensors", model, also=also)
    other = classifier(seed=8)
    load_adapter(tmp_path / "a.safetensors", other)
    assert torch.equal(other(tokens), model(tokens))


def refused(path, model, match) -> None:
    """Loading fails with this text and changes nothing."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_adapter(path, model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_of_other_weights_is_refused_unless_asked(tmp_path):
    save_adapter(tmp_path / "a.safetensors", adapted())
    refused(tmp_path / "a.safetensors", make_model(seed=2), "trained on other weights")
    load_adapter(tmp_path / "a.safetensors", make_model(seed=2), check_base=False)


def test_an_adapter_of_another_size_is_refused(tmp_path):
    save_adapter(tmp_path / "a.safetensors", adapted())
    refused(tmp_path / "a.safetensors", make_model(n_layers=1), "adapts a linear layer 'trf_blocks.1")
    wider = make_model(emb_dim=32)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(tmp_path / "a.safetensors", wider, check_base=False)
    assert not list(lora_layers(wider))


def test_an_adapter_of_another_rank_alpha_or_scaling_is_refused(tmp_path):
    save_adapter(tmp_path / "a.safetensors", adapted())
    for rank, alpha, scaling in ((3, 8, "alpha/rank"), (4, 9, "alpha/rank"), (4, 8, "alpha")):
        model = make_model()
        replace_linear_with_lora(model, rank, alpha, scaling=scaling)
        refused(tmp_path / "a.safetensors", model, "rank 4, alpha 8, scaling alpha/rank")


def test_a_damaged_adapter_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapted())
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    refused(path, make_model(), "damaged")
    path.write_bytes(data[:-100])
    refused(path, make_model(), "damaged")


def test_any_other_safetensors_file_is_no_adapter(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", make_model(), "no LoRA adapter")


def test_a_description_with_nonsense_is_refused(tmp_path):
    from fastgpt.weights.files import write_tensors

    path = tmp_path / "a.safetensors"
    for layers in ({}, {"out_head": 3}, {"out_head": {"rank": -1, "alpha": 1, "scaling": "alpha", "base_crc32": 0}}):
        write_tensors(path, {"x": torch.zeros(1)}, {"lora": json.loads(json.dumps({"layers": layers, "also": []}))})
        refused(path, make_model(), "Nothing was loaded")


def test_saving_without_lora_or_with_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(tmp_path / "a.safetensors", make_model())
    with pytest.raises(ValueError, match="no tensor 'nothing'"):
        save_adapter(tmp_path / "a.safetensors", adapted(), also=["nothing"])
