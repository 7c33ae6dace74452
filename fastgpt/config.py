"""The book's model configurations, their check, and what they cost in parameters.

A configuration is a plain dict with the book's keys: `GPT_CONFIG_124M | {"context_length": 256}`
makes a variant, and keys that fastgpt does not know are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

Config = dict[str, Any]

DROP_RATES = ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")
KEYS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", *DROP_RATES, "qkv_bias")
BLOCK_KEYS = (
    "context_length",
    "emb_dim",
    "n_heads",
    "drop_rate_attn",
    "drop_rate_shortcut",
    "qkv_bias",
)

# What the released GPT-2 weights need (chapter 5), to be completed with one row of `model_configs`.
BASE_CONFIG: Config = {
    "vocab_size": 50257,
    "context_length": 1024,
    "drop_rate": 0.0,
    "qkv_bias": True,
}

model_configs: dict[str, Config] = {
    "gpt2-small (124M)": {"emb_dim": 768, "n_layers": 12, "n_heads": 12},
    "gpt2-medium (355M)": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large (774M)": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl (1558M)": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}


def _untrained(name: str) -> Config:
    size = model_configs[name]
    return {
        "vocab_size": 50257,
        "context_length": 1024,
        "emb_dim": size["emb_dim"],
        "n_heads": size["n_heads"],
        "n_layers": size["n_layers"],
        "drop_rate": 0.1,
        "qkv_bias": False,
    }


GPT_CONFIG_124M = _untrained("gpt2-small (124M)")
GPT_CONFIG_355M = _untrained("gpt2-medium (355M)")
GPT_CONFIG_774M = _untrained("gpt2-large (774M)")
GPT_CONFIG_1558M = _untrained("gpt2-xl (1558M)")


class MissingKeyError(KeyError):
    """A configuration lacks a key. A KeyError, as in the book, whose text is a sentence."""

    def __str__(self) -> str:
        return str(self.args[0])


def pretrained_config(name: str) -> Config:
    """The configuration that fits the released GPT-2 weights of one size.

    Args:
        name: a key of `model_configs`, such as "gpt2-small (124M)".

    Returns:
        A new dict: `BASE_CONFIG` completed with the row of `model_configs`.

    Raises:
        ValueError: there is no such row.
    """
    if name not in model_configs:
        known = ", ".join(repr(row) for row in model_configs)
        raise ValueError(f"No GPT-2 is called {name!r}; the four sizes are {known}.")
    return BASE_CONFIG | model_configs[name]


def check_config(cfg: Mapping[str, Any], keys: Sequence[str] = KEYS) -> Config:
    """Check a book configuration and fill in the three drop rates.

    Args:
        cfg: the book's keys. `drop_rate` serves all three dropout sites; `drop_rate_emb`,
            `drop_rate_attn` and `drop_rate_shortcut` (exercise 4.3) go before it, each for its
            site. Other keys are kept and ignored.
        keys: the keys that must be there; a module of the model asks only for those it reads.

    Returns:
        A new dict with everything of `cfg` and, where asked for, the three drop rates.

    Raises:
        MissingKeyError: a key is missing.
        TypeError: `cfg` is no dict, or a value has the wrong type.
        ValueError: a value is out of range, or `emb_dim` cannot be split into `n_heads`.
    """
    if not isinstance(cfg, Mapping):
        raise TypeError(f"A configuration is a dict such as GPT_CONFIG_124M; got {type(cfg).__name__} {cfg!r}.")
    checked = dict(cfg)
    for key in keys:
        if key in DROP_RATES and key not in checked and "drop_rate" in checked:
            checked[key] = checked["drop_rate"]
        if key not in checked:
            raise MissingKeyError(_missing(key, checked))
        _check_value(key, checked[key])
    if "emb_dim" in keys and "n_heads" in keys:
        check_heads(checked["emb_dim"], checked["n_heads"])
    return checked


def check_heads(width: int, n_heads: int, names: tuple[str, str] = ("emb_dim", "n_heads")) -> None:
    """Raise ValueError unless `width` splits evenly into heads; the message says `names`."""
    if n_heads < 1 or width % n_heads:
        raise ValueError(
            f"{names[0]} must be divisible by {names[1]}, since each head takes an equal slice; "
            f"got {names[0]}={width}, {names[1]}={n_heads}."
        )


def count_parameters(cfg: Mapping[str, Any], *, tied: bool = False) -> int:
    """How many parameters `GPTModel(cfg)` has, without building it.

    Args:
        cfg: a configuration, see `check_config`.
        tied: count the token embedding and the output head as one, as GPT-2 itself does.

    Returns:
        The number of parameters; 163,009,536 for `GPT_CONFIG_124M`, 124,412,160 when tied.
    """
    cfg = check_config(cfg)
    dim = cfg["emb_dim"]
    attention = 3 * (dim * dim + (dim if cfg["qkv_bias"] else 0)) + dim * dim + dim
    feed_forward = dim * 4 * dim + 4 * dim + 4 * dim * dim + dim
    norm = 2 * dim
    embeddings = (cfg["vocab_size"] + cfg["context_length"]) * dim
    head = 0 if tied else cfg["vocab_size"] * dim
    total: int = embeddings + cfg["n_layers"] * (attention + feed_forward + 2 * norm) + norm + head
    return total


def _missing(key: str, cfg: Config) -> str:
    where = f"{key!r} (or 'drop_rate' for all three sites)" if key in DROP_RATES else repr(key)
    got = ", ".join(repr(name) for name in cfg) or "nothing"
    return f"The configuration has no {where}; got {got}. Start from a copy of GPT_CONFIG_124M."


def _check_value(key: str, value: Any) -> None:
    if key in DROP_RATES:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{key} must be a number from 0 to 1, such as 0.1; got {value!r}.")
        if not 0.0 <= float(value) <= 1.0:
            raise ValueError(f"{key} is the share of values that are dropped, from 0 to 1; got {value!r}.")
    elif key == "qkv_bias":
        if value not in (True, False):
            raise TypeError(f"qkv_bias must be True or False; got {value!r}.")
    else:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{key} must be a whole number; got {value!r} of type {type(value).__name__}.")
        # A model without blocks is a bigram model: odd, but it works.
        least = 0 if key == "n_layers" else 1
        if value < least:
            raise ValueError(f"{key} must be at least {least}; got {value}.")
