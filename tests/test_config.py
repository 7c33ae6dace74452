"""config: the book's numbers, the checks and their texts, and the parameter counts."""

from __future__ import annotations

import pytest
import torch

from fastgpt.config import (
    BASE_CONFIG,
    DROP_RATES,
    GPT_CONFIG_124M,
    GPT_CONFIG_355M,
    GPT_CONFIG_774M,
    GPT_CONFIG_1558M,
    check_config,
    count_parameters,
    model_configs,
    pretrained_config,
)
from fastgpt.model import FeedForward, GPTModel, MultiHeadAttention

COUNTS = [
    (GPT_CONFIG_124M, 163_009_536),
    (GPT_CONFIG_355M, 406_212_608),
    (GPT_CONFIG_774M, 838_220_800),
    (GPT_CONFIG_1558M, 1_637_792_000),
]


def built_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_124m_configuration_is_the_books():
    assert GPT_CONFIG_124M == {
        "vocab_size": 50257,
        "context_length": 1024,
        "emb_dim": 768,
        "n_heads": 12,
        "n_layers": 12,
        "drop_rate": 0.1,
        "qkv_bias": False,
    }


@pytest.mark.parametrize(
    ("name", "emb_dim", "n_layers", "n_heads"),
    [
        ("gpt2-small (124M)", 768, 12, 12),
        ("gpt2-medium (355M)", 1024, 24, 16),
        ("gpt2-large (774M)", 1280, 36, 20),
        ("gpt2-xl (1558M)", 1600, 48, 25),
    ],
)
def test_a_pretrained_configuration_has_bias_and_no_dropout(name, emb_dim, n_layers, n_heads):
    sizes = {"emb_dim": emb_dim, "n_layers": n_layers, "n_heads": n_heads}
    common = {"vocab_size": 50257, "context_length": 1024, "drop_rate": 0.0, "qkv_bias": True}
    assert pretrained_config(name) == common | sizes == BASE_CONFIG | model_configs[name]


def test_a_pretrained_configuration_can_be_changed_without_changing_the_table():
    pretrained_config("gpt2-xl (1558M)")["context_length"] = 8
    assert pretrained_config("gpt2-xl (1558M)")["context_length"] == 1024


def test_an_unknown_size_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'gpt2-tiny'.*'gpt2-small \(124M\)'"):
        pretrained_config("gpt2-tiny")


@pytest.mark.parametrize(("cfg", "count"), COUNTS)
def test_the_counted_parameters_are_the_books(cfg, count):
    assert count_parameters(cfg) == count


@pytest.mark.parametrize(("cfg", "count"), COUNTS)
def test_the_built_model_has_the_counted_parameters(cfg, count):
    with torch.device("meta"):
        assert built_count(GPTModel(cfg)) == count


def test_the_count_with_biases_is_that_of_the_built_model():
    cfg = pretrained_config("gpt2-medium (355M)")
    with torch.device("meta"):
        assert built_count(GPTModel(cfg)) == count_parameters(cfg)


def test_tying_the_head_leaves_the_124_million():
    assert count_parameters(GPT_CONFIG_124M, tied=True) == 124_412_160


def test_feed_forward_and_attention_have_the_counts_of_exercise_4_1():
    with torch.device("meta"):
        assert built_count(FeedForward(GPT_CONFIG_124M)) == 4_722_432
        assert built_count(MultiHeadAttention(768, 768, 1024, 0.1, 12)) == 2_360_064


def test_one_drop_rate_serves_all_three_sites():
    checked = check_config(GPT_CONFIG_124M | {"drop_rate": 0.2})
    assert [checked[key] for key in DROP_RATES] == [0.2, 0.2, 0.2]


def test_a_drop_rate_of_its_own_goes_before_the_common_one():
    checked = check_config(GPT_CONFIG_124M | {"drop_rate_attn": 0.5})
    assert [checked[key] for key in DROP_RATES] == [0.1, 0.5, 0.1]


def test_three_drop_rates_need_no_common_one():
    cfg = GPT_CONFIG_124M | {"drop_rate_emb": 0.1, "drop_rate_attn": 0.2, "drop_rate_shortcut": 0.3}
    del cfg["drop_rate"]
    assert [check_config(cfg)[key] for key in DROP_RATES] == [0.1, 0.2, 0.3]


def test_unknown_keys_are_kept():
    assert check_config(GPT_CONFIG_124M | {"kv_window_size": 64})["kv_window_size"] == 64


def test_the_input_is_not_changed():
    cfg = dict(GPT_CONFIG_124M)
    check_config(cfg)["emb_dim"] = 1
    assert cfg == GPT_CONFIG_124M


def test_only_the_keys_that_are_asked_for_must_be_there():
    assert check_config({"emb_dim": 12}, ("emb_dim",)) == {"emb_dim": 12}


@pytest.mark.parametrize("key", ["vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "qkv_bias"])
def test_a_missing_key_is_named_in_a_readable_sentence(key):
    cfg = {name: value for name, value in GPT_CONFIG_124M.items() if name != key}
    with pytest.raises(KeyError) as caught:
        check_config(cfg)
    assert str(caught.value).startswith(f"The configuration has no '{key}'; got ")


def test_a_missing_drop_rate_names_both_ways_to_give_it():
    cfg = {name: value for name, value in GPT_CONFIG_124M.items() if name != "drop_rate"}
    with pytest.raises(KeyError, match=r"'drop_rate_emb' \(or 'drop_rate' for all three sites\)"):
        check_config(cfg)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"emb_dim": 768.0}, TypeError, "emb_dim must be a whole number; got 768.0 of type float"),
        ({"n_heads": "12"}, TypeError, "n_heads must be a whole number; got '12' of type str"),
        ({"n_layers": True}, TypeError, "n_layers must be a whole number"),
        ({"context_length": 0}, ValueError, "context_length must be at least 1; got 0"),
        ({"n_layers": -1}, ValueError, "n_layers must be at least 0; got -1"),
        ({"emb_dim": 770}, ValueError, "emb_dim must be divisible by n_heads.*emb_dim=770, n_heads=12"),
        ({"drop_rate": 10}, ValueError, "from 0 to 1; got 10"),
        ({"drop_rate": "0.1"}, TypeError, "drop_rate_emb must be a number from 0 to 1"),
        ({"drop_rate_attn": None}, TypeError, "drop_rate_attn must be a number from 0 to 1"),
        ({"qkv_bias": "yes"}, TypeError, "qkv_bias must be True or False; got 'yes'"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_wanted(change, error, text):
    with pytest.raises(error, match=text):
        check_config(GPT_CONFIG_124M | change)


def test_something_else_than_a_dict_is_refused():
    with pytest.raises(TypeError, match="is a dict such as GPT_CONFIG_124M; got str"):
        check_config("gpt2-small (124M)")
