"""Chapters 3 and 4 by the book's names: its printed numbers, and every attention variant against MultiHeadAttention."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastgpt import reference
from fastgpt.book import ch03

NAMES = {
    "ch03": [
        *("SelfAttention_v1", "SelfAttention_v2", "CausalAttention", "MultiHeadAttentionWrapper"),
        *("MultiHeadAttention", "PyTorchMultiHeadAttention", "Ch03_MHA_Wrapper", "Ch03_MHA"),
        *("MultiHeadAttentionCombinedQKV", "MHAEinsum", "MHAPyTorchScaledDotProduct"),
        *("MHAPyTorchSDPAWithoutFlash", "MHAPyTorchClass", "MHAPyTorchFlexAttention"),
    ],
    "ch04": [
        *("LayerNorm", "GELU", "FeedForward", "TransformerBlock", "GPTModel", "GPTModelFast"),
        *("TransformerBlockFast", "FeedForwardFast", "DummyGPTModel", "DummyTransformerBlock", "DummyLayerNorm"),
        *("ExampleDeepNeuralNetwork", "generate_text_simple", "MultiHeadAttention", "GPT_CONFIG_124M"),
    ],
}

# "Your journey starts with one step", the six embeddings of chapter 3.
JOURNEY = torch.tensor(
    [
        [0.43, 0.15, 0.89],
        [0.55, 0.87, 0.66],
        [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33],
        [0.77, 0.25, 0.10],
        [0.05, 0.80, 0.55],
    ]
)
BATCH = torch.stack((JOURNEY, JOURNEY))
# The book prints four digits.
PRINTED = {"rtol": 0, "atol": 5.1e-5}


@pytest.fixture(scope="module")
def ch04():
    return importlib.import_module("fastgpt.book.ch04")


@pytest.mark.parametrize(("chapter", "name"), [(chapter, name) for chapter in NAMES for name in NAMES[chapter]])
def test_the_chapter_has_the_name(chapter, name):
    module = importlib.import_module(f"fastgpt.book.{chapter}")
    assert name in module.__all__ and hasattr(module, name)


# The numbers that chapter 3 prints.


def test_self_attention_v1_gives_the_books_numbers():
    torch.manual_seed(123)
    want = [[0.2996, 0.8053], [0.3061, 0.8210], [0.3058, 0.8203], [0.2948, 0.7939], [0.2927, 0.7891], [0.2990, 0.8040]]
    torch.testing.assert_close(ch03.SelfAttention_v1(3, 2)(JOURNEY), torch.tensor(want), **PRINTED)


def test_self_attention_v2_gives_the_books_numbers():
    torch.manual_seed(789)
    want = [
        [-0.0739, 0.0713],
        [-0.0748, 0.0703],
        [-0.0749, 0.0702],
        [-0.0760, 0.0685],
        [-0.0763, 0.0679],
        [-0.0754, 0.0693],
    ]
    torch.testing.assert_close(ch03.SelfAttention_v2(3, 2)(JOURNEY), torch.tensor(want), **PRINTED)


def test_the_wrapper_and_its_first_causal_head_give_the_books_numbers():
    want = torch.tensor(
        [
            [-0.4519, 0.2216, 0.4772, 0.1063],
            [-0.5874, 0.0058, 0.5891, 0.3257],
            [-0.6300, -0.0632, 0.6202, 0.3860],
            [-0.5675, -0.0843, 0.5478, 0.3589],
            [-0.5526, -0.0981, 0.5321, 0.3428],
            [-0.5299, -0.1081, 0.5077, 0.3493],
        ]
    )
    torch.manual_seed(123)
    wrapper = ch03.MultiHeadAttentionWrapper(3, 2, 6, 0.0, num_heads=2)
    torch.testing.assert_close(wrapper(BATCH)[1], want, **PRINTED)
    torch.manual_seed(123)
    torch.testing.assert_close(ch03.CausalAttention(3, 2, 6, 0.0)(BATCH)[0], want[:, :2], **PRINTED)


def test_multi_head_attention_gives_the_books_numbers():
    torch.manual_seed(123)
    want = [[0.3190, 0.4858], [0.2943, 0.3897], [0.2856, 0.3593], [0.2693, 0.3873], [0.2639, 0.3928], [0.2575, 0.4028]]
    got = ch03.MultiHeadAttention(3, 2, 6, 0.0, num_heads=2)(BATCH)
    torch.testing.assert_close(got[0], torch.tensor(want), **PRINTED)


# The variants.

N_HEADS, CONTEXT = 3, 9


def judge(d_in, d_out, qkv_bias):
    torch.manual_seed(11)
    return reference.MultiHeadAttention(d_in, d_out, CONTEXT, 0.0, N_HEADS, qkv_bias)


def like_the_model(cls, source, d_in, d_out, qkv_bias):
    twin = cls(d_in, d_out, CONTEXT, 0.0, N_HEADS, qkv_bias)
    twin.load_state_dict(source.state_dict())
    return twin


def wrapper_of_heads(cls, source, d_in, d_out, qkv_bias):
    twin = cls(d_in, d_out // N_HEADS, CONTEXT, 0.0, N_HEADS, qkv_bias)
    state = {f"out_proj.{leaf}": value for leaf, value in source.out_proj.state_dict().items()}
    for name in ("W_query", "W_key", "W_value"):
        for leaf, value in getattr(source, name).state_dict().items():
            for head, rows in enumerate(value.chunk(N_HEADS)):
                state[f"heads.{head}.{name}.{leaf}"] = rows
    state |= {f"heads.{head}.mask": source.mask for head in range(N_HEADS)}
    twin.load_state_dict(state)
    return twin


def joined(source, leaf):
    return torch.cat([getattr(getattr(source, name), leaf) for name in ("W_query", "W_key", "W_value")])


@torch.no_grad()
def copy_joint_projection(source, weight, bias, proj, qkv_bias):
    weight.copy_(joined(source, "weight"))
    if qkv_bias:
        bias.copy_(joined(source, "bias"))
    proj.load_state_dict(source.out_proj.state_dict())


def joint(cls, source, d_in, d_out, qkv_bias):
    length = {} if cls is ch03.PyTorchMultiHeadAttention else {"context_length": CONTEXT}
    twin = cls(d_in, d_out, N_HEADS, dropout=0.0, qkv_bias=qkv_bias, **length)
    copy_joint_projection(source, twin.qkv.weight, twin.qkv.bias, twin.proj, qkv_bias)
    return twin


@torch.no_grad()
def einsum(cls, source, d_in, d_out, qkv_bias):
    twin = cls(d_in, d_out, CONTEXT, 0.0, N_HEADS, qkv_bias)
    for letter, name in (("q", "W_query"), ("k", "W_key"), ("v", "W_value")):
        getattr(twin, name).copy_(getattr(source, name).weight.T)
        if qkv_bias:
            getattr(twin, f"bias_{letter}").copy_(getattr(source, name).bias)
    twin.out_proj.load_state_dict(source.out_proj.state_dict())
    return twin


@torch.no_grad()
def torch_class(cls, source, d_in, d_out, qkv_bias, need_weights=True):
    twin = cls(d_in, d_out, N_HEADS, CONTEXT, 0.0, qkv_bias, need_weights)
    own = twin.multihead_attn
    copy_joint_projection(source, own.in_proj_weight, own.in_proj_bias, twin.proj, qkv_bias)
    own.out_proj.weight.copy_(torch.eye(d_out))
    return twin


def torch_class_without_weights(*args):
    return torch_class(*args, need_weights=False)


MAKERS = {
    "MultiHeadAttention": like_the_model,
    "Ch03_MHA": like_the_model,
    "Ch03_MHA_Wrapper": wrapper_of_heads,
    "MultiHeadAttentionCombinedQKV": joint,
    "MHAEinsum": einsum,
    "PyTorchMultiHeadAttention": joint,
    "MHAPyTorchScaledDotProduct": joint,
    "MHAPyTorchSDPAWithoutFlash": joint,
    "MHAPyTorchFlexAttention": joint,
    "MHAPyTorchClass": torch_class,
}
ROWS = [(*row, d_in) for row in MAKERS.items() for d_in in (24, 40) if (row[0], d_in) != ("MHAPyTorchClass", 40)]
ROWS.append(("MHAPyTorchClass", torch_class_without_weights, 24))


@pytest.mark.parametrize("n_tokens", [1, 6, CONTEXT])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize(("name", "make", "d_in"), ROWS)
# Eager flex_attention warns that it is only fast under torch.compile.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_variant_is_multi_head_attention(name, make, d_in, qkv_bias, n_tokens):
    source = judge(d_in, 24, qkv_bias)
    twin = make(getattr(ch03, name), source, d_in, 24, qkv_bias)
    x = torch.randn(2, n_tokens, d_in)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), source(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "name", ["CausalAttention", "MultiHeadAttentionCombinedQKV", "MHAEinsum", "MHAPyTorchSDPAWithoutFlash"]
)
def test_an_input_beyond_the_context_length_is_refused(name):
    arguments = {"d_in": 6, "d_out": 6, "context_length": 4, "dropout": 0.0}
    if name != "CausalAttention":
        arguments["num_heads"] = 2
    with pytest.raises(IndexError, match="has 5 tokens, but context_length is 4"):
        getattr(ch03, name)(**arguments)(torch.ones(1, 5, 6))


@pytest.mark.parametrize(
    "name", ["MultiHeadAttentionWrapper", "Ch03_MHA_Wrapper", "MHAEinsum", "MultiHeadAttentionCombinedQKV"]
)
def test_dropout_of_everything_leaves_the_output_bias(name):
    attention = getattr(ch03, name)(d_in=6, d_out=6, context_length=4, dropout=1.0, num_heads=2)
    out = attention(torch.randn(2, 4, 6))
    last = getattr(attention, "out_proj", getattr(attention, "proj", None))
    want = torch.zeros_like(out) if last is None else last.bias.expand_as(out)
    assert torch.equal(out, want)


def test_flex_attention_refuses_dropout_in_training():
    attention = ch03.MHAPyTorchFlexAttention(6, 6, 2, 4, dropout=0.1)
    with pytest.raises(ValueError, match=r"cannot drop attention weights; got dropout=0.1 in training"):
        attention(torch.ones(1, 4, 6))


def test_pytorchs_class_refuses_another_input_width_by_name():
    with pytest.raises(ValueError, match="needs d_in equal to d_out; got d_in=8, d_out=6"):
        ch03.MHAPyTorchClass(8, 6, 2, 4)


# Chapter 4.


def test_the_untrained_124m_model_continues_with_the_books_tokens(ch04):
    torch.manual_seed(123)
    model = ch04.GPTModel(ch04.GPT_CONFIG_124M).eval()
    prompt = [15496, 11, 314, 716]
    out = ch04.generate_text_simple(model, torch.tensor([prompt]), max_new_tokens=10, context_size=1024)
    new = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
    assert out.tolist() == [prompt + new]


@pytest.mark.parametrize(
    ("use_shortcut", "want"),
    [
        (False, [0.00020173587, 0.00012011160, 0.00071520417, 0.00139887387, 0.00504964637]),
        (True, [0.22169792, 0.20694105, 0.32896995, 0.26657322, 1.32585418]),
    ],
)
def test_shortcuts_keep_the_gradients_of_the_book(ch04, use_shortcut, want):
    torch.manual_seed(123)
    network = ch04.ExampleDeepNeuralNetwork([3, 3, 3, 3, 3, 1], use_shortcut)
    torch.nn.functional.mse_loss(network(torch.tensor([[1.0, 0.0, -1.0]])), torch.zeros(1, 1)).backward()
    got = [parameter.grad.abs().mean() for name, parameter in network.named_parameters() if name.endswith("weight")]
    torch.testing.assert_close(torch.stack(got), torch.tensor(want), rtol=1e-5, atol=0)


def test_the_dummy_model_is_embeddings_and_head_alone(ch04):
    cfg = ch04.GPT_CONFIG_124M | {"vocab_size": 50, "emb_dim": 12, "n_heads": 2, "context_length": 8}
    model = ch04.DummyGPTModel(cfg).eval()
    idx = torch.randint(0, 50, (2, 5))
    x = model.tok_emb.weight[idx] + model.pos_emb.weight[:5]
    torch.testing.assert_close(model(idx), x @ model.out_head.weight.T)


def test_greedy_generation_crops_to_the_context_and_leaves_the_mode(ch04):
    cfg = ch04.GPT_CONFIG_124M | {"vocab_size": 50, "emb_dim": 12, "n_heads": 2, "context_length": 8, "n_layers": 1}
    torch.manual_seed(123)
    model = ch04.GPTModel(cfg | {"drop_rate": 0.0})
    torch.manual_seed(123)
    plain = reference.GPTModel(cfg | {"drop_rate": 0.0})
    idx = torch.randint(0, 50, (3, 5))
    want = reference.generate_text_simple(plain, idx, 12, 8)
    assert torch.equal(ch04.generate_text_simple(model, idx, 12, 8), want) and model.training


# The judge's own loop, which everything faster is held against.


def logits_model(rows):
    """A model that returns one prepared row of logits for each length of the input."""
    return lambda idx: rows[:, idx.shape[1] - 1].unsqueeze(1).expand(-1, idx.shape[1], -1)


def test_the_reference_loop_breaks_before_the_end_token():
    rows = torch.nn.functional.one_hot(torch.tensor([[3, 4, 0, 5]]), 6).float()
    assert reference.generate(logits_model(rows), torch.tensor([[1]]), 4, 8, eos_id=0).tolist() == [[1, 3, 4]]


def test_the_reference_loop_fills_ended_rows_with_the_end_token_until_all_have_ended():
    rows = torch.nn.functional.one_hot(torch.tensor([[3, 0, 4, 4, 1], [3, 3, 3, 0, 1]]), 6).float()
    out = reference.generate(logits_model(rows), torch.tensor([[1], [2]]), 5, 8, eos_id=0)
    assert out.tolist() == [[1, 3, 0, 0], [2, 3, 3, 3]]


def test_top_k_keeps_ties_with_the_last_kept_logit():
    rows = torch.tensor([[[5.0, 4.0, 4.0, 1.0]]])
    torch.manual_seed(0)
    draws = {
        reference.generate(logits_model(rows), torch.tensor([[0]]), 1, 8, temperature=5.0, top_k=2)[0, 1].item()
        for _ in range(200)
    }
    assert draws == {0, 1, 2}


def test_no_new_tokens_gives_the_prompt():
    idx = torch.tensor([[1, 2]])
    assert torch.equal(reference.generate(logits_model(torch.ones(1, 9, 4)), idx, 0, 8), idx)
