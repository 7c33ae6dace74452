"""One door for all weights on disk: a path in, a ready `GPTModel` out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgpt.config import BASE_CONFIG, check_config
from fastgpt.model import GPTModel
from fastgpt.weights.book import load_weights_into_gpt
from fastgpt.weights.checkpoint_files import read_weights
from fastgpt.weights.errors import WeightsError
from fastgpt.weights.huggingface import load_huggingface
from fastgpt.weights.layouts import infer_config
from fastgpt.weights.models import build_model
from fastgpt.weights.openai import load_gpt2_params_from_tf_ckpt
from fastgpt.weights.safetensors_files import read_info, read_json
from fastgpt.weights.torch_files import is_torch_file

_MAX_LAYERS = 10_000


def load_gpt(path: str | os.PathLike[str], *, n_heads: int | None = None) -> nn.Module:
    """Build the model that weights on disk belong to, and load them.

    | path                                                  | where its configuration is from              |
    |-------------------------------------------------------|----------------------------------------------|
    | a file of fastgpt                                     | the file itself                              |
    | a Hugging Face folder, or a file beside a config.json | config.json                                  |
    | OpenAI's folder (book: "gpt2/124M")                   | hparams.json                                 |
    | any other safetensors or .pth file                    | shapes and `n_heads`; see `infer_config`     |

    Args:
        path: a file or a folder.
        n_heads: heads of a block, where no configuration tells and the width is not one of GPT-2's.

    Returns:
        A `GPTModel` on the CPU in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, or is no GPT-2, or the number of heads is not known.
    """
    path = Path(path)
    if (path / "hparams.json").is_file():
        return _load_openai(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path} (looked from {Path.cwd()}).")
    cfg = saved_config(path) if path.is_file() else None
    if cfg is None and (path.is_dir() or (path.parent / "config.json").is_file()):
        return load_huggingface(path)
    weights = read_weights(path)
    try:
        cfg = infer_config(weights, n_heads) if cfg is None else check_config(cfg)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error} Nothing was loaded.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged: it holds an impossible configuration. {str(error)[:300]}") from None
    return build_model(path, weights, cfg)


def saved_config(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The configuration that a file of fastgpt holds beside its weights; None for any other file.

    Raises:
        WeightsError: the file is damaged.
    """
    if is_torch_file(path):
        return None
    info = read_info(path)
    cfg = info.get("config")
    return cfg if isinstance(cfg, dict) else None


def _load_openai(folder: Path) -> nn.Module:
    settings = read_json(folder / "hparams.json")
    names = {"vocab_size": "n_vocab", "context_length": "n_ctx", "emb_dim": "n_embd", "n_heads": "n_head"}
    try:
        cfg = BASE_CONFIG | {ours: settings[theirs] for ours, theirs in names.items()}
        cfg = check_config(cfg | {"n_layers": settings["n_layer"]})
        if cfg["n_layers"] > _MAX_LAYERS:
            raise ValueError(f"n_layer is {cfg['n_layers']}.")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / 'hparams.json'} is damaged: {str(error)[:300]}") from None
    try:
        params = load_gpt2_params_from_tf_ckpt(folder / "model.ckpt", settings)
        with torch.device("meta"):
            model = GPTModel(cfg)
        # Every parameter is replaced by one with memory, once its shape agrees.
        load_weights_into_gpt(model, params)
    except FileNotFoundError:
        raise
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder} holds no whole GPT-2 of its hparams.json: {str(error)[:300]}") from None
    return model.eval()
