"""model: the fused model against the plain one in values, gradients and training, and the book's names and files."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import ops, reference
from fastgpt.model import GPTModel, MultiHeadAttention, TransformerBlock
from fastgpt.model_fast import GPTModelFast, convert_state_dict
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

SMALL = {
    "vocab_size": 96,
    "context_length": 10,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}

# The sizes of the book's own tests and notebooks; head_dim 1, 6, 8, 64 and 128.
SIZES = [
    SMALL,
    SMALL | {"emb_dim": 12, "n_heads": 2, "context_length": 8, "vocab_size": 257, "qkv_bias": False},
    SMALL | {"emb_dim": 12, "n_heads": 2, "context_length": 12},
    SMALL | {"context_length": 16, "vocab_size": 32, "n_layers": 1},
    SMALL | {"context_length": 120, "n_layers": 1},
    SMALL | {"emb_dim": 128, "n_heads": 2, "context_length": 12, "qkv_bias": False},
    SMALL | {"emb_dim": 256, "n_heads": 2, "n_layers": 1},
    SMALL | {"emb_dim": 5, "n_heads": 5, "n_layers": 3},
]
SIZE_NAMES = [f"emb{cfg['emb_dim']}_heads{cfg['n_heads']}_context{cfg['context_length']}" for cfg in SIZES]
each_size = pytest.mark.parametrize("cfg", SIZES, ids=SIZE_NAMES)


@pytest.fixture
def model_backend(op_backend):
    """Every op of the model on one backend, the device where it runs included."""
    for name in ("attention", "gelu", "layer_norm"):
        # fastgpt.ops.gelu is the function; its room of the same name is reached by import alone.
        op_backend(name, importlib.import_module(f"fastgpt.ops.{name}").EXAMPLE_CASES[0])
    with ops.use_backend(op_backend.name):
        yield op_backend.name


def twins(cfg, seed=123):
    """The fused and the plain model from one seed, as a reader would build either."""
    torch.manual_seed(seed)
    fused = GPTModel(cfg)
    torch.manual_seed(seed)
    return fused, reference.GPTModel(cfg)


def tokens(cfg, batch=3, n_tokens=None, seed=7):
    torch.manual_seed(seed)
    return torch.randint(0, cfg["vocab_size"], (batch, n_tokens or cfg["context_length"]))


def loss_of(model, idx, targets):
    return F.cross_entropy(model(idx).flatten(0, 1).float(), targets.flatten())


def gradients(model, idx, targets):
    model.zero_grad(set_to_none=True)
    logits = model(idx)
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    F.cross_entropy(wide.flatten(0, 1), targets.flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def losses(model, cfg, steps=20):
    """Training as in chapter 5, on one small batch a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    torch.manual_seed(1)
    batches = torch.randint(0, cfg["vocab_size"], (steps, 4, cfg["context_length"] + 1))
    values = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def equal_state(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


# Values.


@each_size
def test_one_seed_gives_the_plain_models_weights(cfg):
    fused, plain = twins(cfg)
    assert equal_state(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize("n_tokens", [1, 7, None])
@each_size
def test_logits_are_within_the_bound(model_backend, cfg, n_tokens):
    fused, plain = twins(cfg)
    idx = tokens(cfg, n_tokens=n_tokens)
    assert_within_bound(fused(idx), plain(idx), plain.double()(idx))


@each_size
def test_gradients_are_within_the_bound(model_backend, cfg):
    fused, plain = twins(cfg)
    idx, targets = tokens(cfg), tokens(cfg, seed=8)
    got, naive = gradients(fused, idx, targets), gradients(plain, idx, targets)
    truth = gradients(copy.deepcopy(plain).double(), idx, targets)
    assert list(got) == list(truth)
    for name in truth:
        assert_within_bound(got[name], naive[name], truth[name], factor=GRADIENT_FACTOR)


def test_float64_logits_and_gradients_are_the_plain_models():
    fused, plain = (model.double() for model in twins(SMALL))
    idx, targets = tokens(SMALL), tokens(SMALL, seed=8)
    torch.testing.assert_close(fused(idx), plain(idx), rtol=1e-12, atol=1e-12)
    got, want = gradients(fused, idx, targets), gradients(plain, idx, targets)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_bfloat16_is_as_close_to_float32_as_the_plain_model_in_bfloat16(model_backend):
    fused, plain = (model.bfloat16() for model in twins(SMALL | {"context_length": 64}))
    idx = tokens(SMALL, n_tokens=64)
    assert_within_bound(fused(idx), plain(idx), copy.deepcopy(plain).float()(idx))


def test_bfloat16_gradients_are_as_close_to_float32_as_the_plain_models(model_backend):
    fused, plain = (model.bfloat16() for model in twins(SMALL))
    idx, targets = tokens(SMALL), tokens(SMALL, seed=8)
    got, naive = gradients(fused, idx, targets), gradients(plain, idx, targets)
    truth = gradients(copy.deepcopy(plain).float(), idx, targets)
    for name in truth:
        assert_within_bound(got[name], naive[name], truth[name], factor=GRADIENT_FACTOR)


def test_autocast_is_as_close_to_float32_as_the_plain_model_under_autocast():
    fused, plain = twins(SMALL)
    idx = tokens(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        got, naive = fused(idx), plain(idx)
    assert_within_bound(got, naive, plain.double()(idx))


def test_a_block_passes_gradcheck_in_float64():
    torch.manual_seed(3)
    block = TransformerBlock(SMALL | {"emb_dim": 6, "n_heads": 2}).double()
    assert torch.autograd.gradcheck(block, torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True))


def test_attention_with_another_output_width_is_the_plain_one():
    torch.manual_seed(0)
    fused = MultiHeadAttention(20, 48, 9, 0.0, num_heads=3, qkv_bias=True)
    plain = reference.MultiHeadAttention(20, 48, 9, 0.0, num_heads=3, qkv_bias=True)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 9, 20)
    assert_within_bound(fused(x), plain(x), plain.double()(x.double()))


# Training.


def test_20_training_losses_are_the_plain_models(model_backend):
    cfg = SMALL | {"context_length": 16}
    fused, plain = twins(cfg)
    torch.testing.assert_close(losses(fused, cfg), losses(plain, cfg), rtol=1e-5, atol=0)


def test_20_training_losses_with_dropout_are_the_plain_models_in_the_reference_mode():
    cfg = SMALL | {"drop_rate": 0.2}
    fused, plain = twins(cfg)
    with ops.use_backend("reference"):
        got = losses(fused, cfg)
    torch.testing.assert_close(got, losses(plain, cfg), rtol=1e-5, atol=0)


def test_the_seed_decides_what_dropout_drops():
    fused, _ = twins(SMALL | {"drop_rate": 0.5})
    idx = tokens(SMALL)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(fused(idx))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_eval_turns_all_dropout_off():
    fused, plain = twins(SMALL | {"drop_rate": 0.5})
    idx = tokens(SMALL)
    fused.eval(), plain.eval()
    torch.testing.assert_close(fused(idx), plain(idx), rtol=0, atol=5e-6)


@pytest.mark.parametrize("site", ["emb", "attn", "shortcut"])
def test_each_drop_rate_of_exercise_4_3_reaches_its_own_site(site):
    rates = {"drop_rate_emb": 0.0, "drop_rate_attn": 0.0, "drop_rate_shortcut": 0.0}
    fused, _ = twins(SMALL | rates | {f"drop_rate_{site}": 0.25})
    block = fused.trf_blocks[0]
    sites = {"emb": fused.drop_emb, "attn": block.att.dropout, "shortcut": block.drop_shortcut}
    assert {name: module.p for name, module in sites.items()} == dict.fromkeys(sites, 0.0) | {site: 0.25}
    idx = tokens(SMALL)
    assert not torch.equal(fused(idx), fused(idx))


def test_the_attention_dropout_module_can_be_switched_off_or_replaced_alone():
    torch.manual_seed(0)
    att, off = (MultiHeadAttention(32, 32, 10, 0.5, num_heads=4) for _ in range(2))
    off.load_state_dict(att.state_dict())
    x = torch.randn(2, 10, 32)
    off.dropout.eval()
    want = copy.deepcopy(att).eval()(x)
    assert torch.equal(off(x), want) and not torch.equal(att(x), want)
    att.dropout = torch.nn.Identity()
    assert torch.equal(att(x), want)


def test_drop_resid_is_another_name_of_drop_shortcut():
    block = TransformerBlock(SMALL)
    assert block.drop_resid is block.drop_shortcut
    assert "drop_resid" not in dict(block.named_children())


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    fused, _ = twins(SMALL)
    idx, targets = tokens(SMALL), tokens(SMALL, seed=8)
    want = gradients(fused, idx, targets)
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    for module in (fused.trf_blocks[-1].norm2, fused.trf_blocks[-1].att.W_value, fused.final_norm):
        module.requires_grad_(True)
    got = gradients(fused, idx, targets)
    for name, parameter in fused.named_parameters():
        assert (got[name] is not None) == parameter.requires_grad
        if parameter.requires_grad:
            assert torch.equal(got[name], want[name]), name


def test_gradient_checkpointing_repeats_the_same_dropout():
    fused, _ = twins(SMALL | {"drop_rate": 0.3})
    x = torch.randn(2, 10, 32)
    grads = []
    for run in (lambda block, x: block(x), lambda block, x: checkpoint(block, x, use_reentrant=False)):
        fused.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        out = x
        for block in fused.trf_blocks:
            out = run(block, out)
        out.square().sum().backward()
        grads.append([parameter.grad for parameter in fused.trf_blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_torch_compile_takes_the_model_as_one_graph_with_the_same_gradients():
    fused, _ = twins(SMALL | {"n_layers": 1})
    idx, targets = tokens(SMALL), tokens(SMALL, seed=8)
    want = gradients(fused, idx, targets)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    loss_of(compiled, idx, targets)
    fused.zero_grad(set_to_none=True)
    loss_of(compiled, idx, targets).backward()
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-5, atol=1e-7)


def test_data_parallel_keeps_names_and_gradients(tmp_path):
    fused, _ = twins(SMALL)
    idx, targets = tokens(SMALL), tokens(SMALL, seed=8)
    want = gradients(fused, idx, targets)
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(fused)
        fused.zero_grad(set_to_none=True)
        loss_of(wrapped, idx, targets).backward()
        got = {name: parameter.grad for name, parameter in wrapped.module.named_parameters()}
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# Names and files.


def test_the_state_dict_has_the_books_keys_in_the_books_order():
    cfg = SMALL | {"n_layers": 1}
    block = [
        *("att.mask", "att.W_query.weight", "att.W_query.bias", "att.W_key.weight", "att.W_key.bias"),
        *("att.W_value.weight", "att.W_value.bias", "att.out_proj.weight", "att.out_proj.bias"),
        *("ff.layers.0.weight", "ff.layers.0.bias", "ff.layers.2.weight", "ff.layers.2.bias"),
        *("norm1.scale", "norm1.shift", "norm2.scale", "norm2.shift"),
    ]
    assert list(GPTModel(cfg).state_dict()) == [
        "tok_emb.weight",
        "pos_emb.weight",
        *(f"trf_blocks.0.{name}" for name in block),
        *("final_norm.scale", "final_norm.shift", "out_head.weight"),
    ]


def test_the_mask_is_the_books_but_not_stored():
    att = GPTModel(SMALL).trf_blocks[0].att
    assert torch.equal(att.mask, torch.triu(torch.ones(10, 10), diagonal=1))
    assert att.mask.dtype == torch.float32 and not list(att.buffers())


@pytest.mark.parametrize("with_masks", [True, False])
def test_a_checkpoint_loads_strictly_with_and_without_masks(with_masks):
    fused, plain = twins(SMALL, seed=1)[0], twins(SMALL, seed=2)[1]
    state = {key: value for key, value in plain.state_dict().items() if with_masks or not key.endswith("mask")}
    result = fused.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert equal_state(fused.state_dict(), plain.state_dict())


def test_the_plain_model_loads_the_fused_checkpoint_strictly():
    fused, plain = twins(SMALL, seed=1)[0], twins(SMALL, seed=2)[1]
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert equal_state(fused.state_dict(), plain.state_dict())


def test_other_unexpected_keys_are_still_refused():
    fused, _ = twins(SMALL)
    state = fused.state_dict() | {"trf_blocks.0.att.maskk": torch.ones(1)}
    with pytest.raises(RuntimeError, match="maskk"):
        fused.load_state_dict(state)


def test_a_checkpoint_of_another_context_length_is_refused():
    with pytest.raises(RuntimeError, match=r"size mismatch for pos_emb.weight"):
        GPTModel(SMALL).load_state_dict(GPTModel(SMALL | {"context_length": 12}).state_dict())


def test_a_mask_that_is_not_causal_is_refused_on_load_and_on_assignment():
    fused, _ = twins(SMALL)
    state = fused.state_dict() | {"trf_blocks.1.att.mask": torch.zeros(10, 10)}
    with pytest.raises(RuntimeError, match=r"trf_blocks.1.att.mask: this is not the causal mask"):
        fused.load_state_dict(state)
    with pytest.raises(ValueError, match="use fastgpt.reference for any other mask"):
        fused.trf_blocks[1].att.mask = torch.zeros(10, 10)
    fused.trf_blocks[1].att.mask = torch.triu(torch.ones(10, 10), diagonal=1)


def test_loading_with_assign_takes_the_very_tensors():
    fused, plain = twins(SMALL, seed=1)[0], twins(SMALL, seed=2)[1]
    state = plain.state_dict()
    fused.load_state_dict(state, assign=True)
    assert all(parameter.data_ptr() == state[name].data_ptr() for name, parameter in fused.named_parameters())
    idx = tokens(SMALL)
    torch.testing.assert_close(fused(idx), plain(idx), rtol=0, atol=5e-6)


def test_a_model_made_on_meta_can_be_filled():
    with torch.device("meta"):
        hollow = GPTModel(SMALL)
    fused, _ = twins(SMALL)
    hollow.load_state_dict(fused.state_dict(), assign=True)
    assert torch.equal(hollow(tokens(SMALL)), fused(tokens(SMALL)))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_gives_the_same_logits_and_is_independent(copied):
    fused, _ = twins(SMALL)
    idx = tokens(SMALL)
    twin = copied(fused)
    assert torch.equal(twin(idx), fused(idx)) and str(twin) == str(fused)
    with torch.no_grad():
        twin.out_head.weight.zero_()
    assert fused(idx).abs().sum() > 0


def test_to_moves_parameters_and_mask_together():
    fused = twins(SMALL)[0].to(torch.bfloat16)
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {torch.bfloat16}
    assert fused(tokens(SMALL)).dtype == torch.bfloat16
    assert {tensor.device.type for tensor in fused.to("meta").state_dict().values()} == {"meta"}


def test_print_and_children_are_the_plain_models():
    fused, plain = twins(SMALL)
    assert str(fused) == str(plain)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    assert isinstance(fused.trf_blocks[-1].ff.layers[0], torch.nn.Linear)


def test_forward_hooks_fire_on_every_module_that_holds_parameters():
    fused, _ = twins(SMALL)
    fired = set()
    for name, module in fused.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    fused(tokens(SMALL))
    assert {name for name, module in fused.named_modules() if list(module.parameters())} <= fired


def test_a_linear_layer_can_be_replaced_by_a_wrapper():
    class Wrapped(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x) * 2

    fused, plain = twins(SMALL)
    for model in (fused, plain):
        att = model.trf_blocks[0].att
        att.W_query, att.W_value = Wrapped(att.W_query), Wrapped(att.W_value)
        model.out_head = torch.nn.Linear(32, 2)
    fused.load_state_dict(plain.state_dict())
    idx = tokens(SMALL)
    torch.testing.assert_close(fused(idx), plain(idx), rtol=0, atol=5e-6)


# The fast layout.


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_fast_layout_gives_the_same_logits_from_converted_weights(model_backend, qkv_bias):
    cfg = SMALL | {"qkv_bias": qkv_bias}
    fused, plain = twins(cfg)
    fast = GPTModelFast(cfg)
    fast.load_state_dict(convert_state_dict(fused.state_dict(), "fast"), strict=True)
    idx = tokens(cfg)
    assert_within_bound(fast(idx), plain(idx), plain.double()(idx))


def test_20_training_losses_in_the_fast_layout_are_the_plain_models():
    fused, plain = twins(SMALL)
    fast = GPTModelFast(SMALL)
    fast.load_state_dict(convert_state_dict(fused.state_dict(), "fast"))
    torch.testing.assert_close(losses(fast, SMALL), losses(plain, SMALL), rtol=1e-5, atol=0)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_conversion_there_and_back_is_the_plain_checkpoint(qkv_bias):
    _, plain = twins(SMALL | {"qkv_bias": qkv_bias})
    state = plain.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    assert equal_state(convert_state_dict(convert_state_dict(state, "fast"), "book"), before)
    assert equal_state(state, before)


def test_the_fast_checkpoint_has_the_fast_models_keys_in_its_order():
    fast = GPTModelFast(SMALL)
    assert list(convert_state_dict(GPTModel(SMALL).state_dict(), "fast")) == list(fast.state_dict())
    block = "trf_blocks.1"
    assert {f"{block}.att.qkv.weight", f"{block}.att.proj.bias", f"{block}.norm2.weight"} <= set(fast.state_dict())


def test_converting_what_is_already_converted_changes_nothing():
    book, fast = GPTModel(SMALL).state_dict(), GPTModelFast(SMALL).state_dict()
    assert equal_state(convert_state_dict(book, "book"), book)
    assert equal_state(convert_state_dict(fast, "fast"), fast)


def test_a_prefix_and_a_single_attention_convert_too():
    att = GPTModel(SMALL).trf_blocks[0].att
    assert list(convert_state_dict(att.state_dict(), "fast")) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    wrapped = {f"module.{key}": value for key, value in GPTModel(SMALL).state_dict().items()}
    assert list(convert_state_dict(convert_state_dict(wrapped, "fast"), "book")) == list(wrapped)


def test_an_incomplete_projection_is_refused_by_name():
    state = GPTModel(SMALL).state_dict()
    del state["trf_blocks.0.att.W_key.weight"]
    with pytest.raises(ValueError, match=r"has trf_blocks.0.att.W_query.weight but not trf_blocks.0.att.W_key.weight"):
        convert_state_dict(state, "fast")


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="to 'book' or to 'fast'; got 'quick'"):
        convert_state_dict({}, "quick")


# Errors.


@pytest.mark.parametrize("make", [GPTModel, GPTModelFast])
@pytest.mark.parametrize(
    ("idx", "error", "text"),
    [
        (torch.zeros(1, 11, dtype=torch.int64), IndexError, r"has 11 tokens, but context_length is 10.*\[:, -10:\]"),
        (torch.tensor([[1, 2], [3, 96]]), IndexError, r"Token id 96 at row 1, position 1 is outside .* 0 to 95"),
        (torch.tensor([[1, -100]]), IndexError, "Token id -100 at row 0, position 1.*-100 marks ignored places"),
        (torch.tensor([1, 2]), ValueError, r"shape \(batch, n_tokens\); got \(2,\).*unsqueeze"),
    ],
)
def test_a_bad_input_is_refused_with_what_is_wanted(make, idx, error, text):
    with pytest.raises(error, match=text):
        make(SMALL)(idx)


def test_attention_beyond_its_context_length_is_refused():
    with pytest.raises(IndexError, match="has 5 tokens, but context_length is 4"):
        MultiHeadAttention(6, 6, 4, 0.0, num_heads=2)(torch.ones(1, 5, 6))


@pytest.mark.parametrize("make", [MultiHeadAttention, reference.MultiHeadAttention])
def test_heads_that_do_not_divide_the_width_are_refused(make):
    with pytest.raises(ValueError, match="d_out must be divisible by num_heads.*d_out=7, num_heads=2"):
        make(7, 7, 4, 0.0, num_heads=2)
