"""Any file with the weights of a GPT-2, read into any GPT-2: the kind is recognised, nothing in it is trusted.

| kind                                                | recognised by                                              |
|-----------------------------------------------------|------------------------------------------------------------|
| safetensors                                         | what is neither of the next two                            |
| torch.save since PyTorch 1.6 (.pth, .pt, .bin)      | begins like a zip archive                                  |
| torch.save before that                              | begins with the magic number of that time                  |
| a Hugging Face folder, also in shards               | the first of FOLDER_FILES in it                            |

The names in it may be the book's, with or without masks, those of GPTModelFast, or Hugging Face's; prefixes of
torch.compile and DDP are ignored. Loading compares everything with the model first and copies then, so a file that does
not fit leaves the model as it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.weights.errors import WeightsError
from fastgpt.weights.files import write_tensors
from fastgpt.weights.layouts import to_book
from fastgpt.weights.models import book_views, copy_weights, model_config
from fastgpt.weights.safetensors_files import read_json, read_safetensors
from fastgpt.weights.torch_files import is_torch_file, read_torch

# In the order in which transformers looks for them.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Where checkpoints keep the model's tensors beside other things; the first is the book's.
_MODEL_KEYS = ("model_state_dict", "state_dict", "model")
_OPTIMIZER_KEY = "optimizer_state_dict"


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of a GPT-2 from a file or folder of any kind in the table above.

    Args:
        path: a file, or a Hugging Face folder.

    Returns:
        Tensors under the book's names, without masks, in the dtypes of the file. They are views of the mapped file
        where it can be mapped: they take memory when they are read, and the file must stay while they are in use. A
        head that is tied to the token embedding is the same tensor.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, truncated, malicious, or no GPT-2.
    """
    return _named(path, read_tensors_of(path))


def load_weights_file(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Load the weights of a file or folder into a model; see `read_weights` for what it may be.

    Values are rounded to the dtype of the model, as `load_state_dict` does. Biases of queries, keys and values that are
    all 0 (which Hugging Face's format needs) may be left out of a model that was built with qkv_bias=False.

    Args:
        path: a file, or a Hugging Face folder.
        model: `GPTModel`, `GPTModelFast`, the reader's own model with the names of either, or one of these inside
            torch.compile or DDP. Its parameters stay the same objects.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is not usable, or does not fit the model; the model is as it was.
    """
    copy_weights(path, read_weights(path), model)


def load_pth(path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load a file of `torch.save(model.state_dict(), path)` or, with "model_state_dict" and "optimizer_state_dict",
    of chapter 5's `torch.save({...}, path)`.

    Args:
        path: the file. It is read with weights_only=True: no code in it is run.
        model: as for `load_weights_file`.
        optimizer: gets the state of the file's optimizer; made for this model, in the layout of the file.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is not usable, or does not fit; model and optimizer are as they were.
    """
    content = read_torch(_existing_file(path))
    weights = _named(path, _state_dict(path, content))
    state = None if optimizer is None else _optimizer_state(path, content, optimizer)
    copy_weights(path, weights, model)
    if optimizer is not None and state is not None:
        optimizer.load_state_dict(state)


def save_weights_file(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write a model's weights as a safetensors file under the book's names, without masks, with its configuration.

    Args:
        path: where; a file there is replaced at once, never half.
        model: as for `load_weights_file`; `GPTModelFast` is written under the book's names, too. A head that is tied to
            the token embedding is written as a tensor of its own.

    Raises:
        WeightsError: this is no model of the book's.
    """
    tensors = book_views(model)
    head, embedding = tensors.get("out_head.weight"), tensors["tok_emb.weight"]
    if head is not None and head.data_ptr() == embedding.data_ptr():
        tensors["out_head.weight"] = head.clone()
    write_tensors(path, tensors, {"config": model_config(model)})


def read_tensors_of(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file or folder under their own names.

    Raises:
        FileNotFoundError, WeightsError: as `read_weights`.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in FOLDER_FILES if (path / name).exists()), None)
        if found is None:
            raise FileNotFoundError(f"{path} has none of {', '.join(FOLDER_FILES)}; is it a Hugging Face folder?")
        path = found
    _existing_file(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if is_torch_file(path):
        return _state_dict(path, read_torch(path))
    return read_safetensors(path)


def _existing_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} (looked from {Path.cwd()}).")
    return path


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f"{index} is damaged: it has no weight_map from tensors to files.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        # A name with a folder in it could point anywhere on this machine.
        if Path(shard).name != shard or "\\" in shard or shard.endswith(".json"):
            raise WeightsError(f"{index} is refused: {shard[:100]!r} is not the name of a file beside it.")
        if not (index.parent / shard).is_file():
            raise WeightsError(f"{index} is incomplete: its file {shard!r} is missing. Download it again.")
        part = read_tensors_of(index.parent / shard)
        wanted = {name for name, place in places.items() if place == shard}
        if set(part) != wanted:
            wrong = sorted(set(part) ^ wanted)[0]
            raise WeightsError(f"{index} does not fit {shard!r}: they disagree about {wrong[:100]!r}.")
        tensors |= part
    return tensors


def _state_dict(path: str | os.PathLike[str], content: Any) -> dict[str, Tensor]:
    """The model's tensors in what torch.save wrote."""
    if isinstance(content, Mapping):
        inner = next((content[key] for key in _MODEL_KEYS if isinstance(content.get(key), Mapping)), content)
        if inner and all(isinstance(key, str) for key in inner):
            wrong = next((key for key, value in inner.items() if not isinstance(value, Tensor)), None)
            if wrong is None:
                return dict(inner)
            raise WeightsError(f"{path} holds no weights: {wrong[:100]!r} is a {type(inner[wrong]).__name__}.")
    raise WeightsError(f"{path} holds no weights: wanted a dict from names to tensors, got {type(content).__name__}.")


def _named(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return to_book(tensors)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error} Nothing was loaded.") from None


def _optimizer_state(path: str | os.PathLike[str], content: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The file's optimizer state, once its groups and shapes are known to be those of `optimizer`."""
    saved = content.get(_OPTIMIZER_KEY) if isinstance(content, Mapping) else None
    if not isinstance(saved, Mapping):
        raise WeightsError(f"{path} has no {_OPTIMIZER_KEY!r}; save it as chapter 5 does, or leave the optimizer out.")
    groups, states = saved.get("param_groups"), saved.get("state")
    if (
        not isinstance(groups, list)
        or not isinstance(states, Mapping)
        or not all(isinstance(group, dict) and _are_numbers(group.get("params")) and "lr" in group for group in groups)
    ):
        raise WeightsError(f"{path} is damaged: its {_OPTIMIZER_KEY} has no usable param_groups and state.")
    got = [len(group["params"]) for group in groups]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if got != wanted:
        raise WeightsError(f"{path} is of another optimizer: groups of {got} parameters, wanted {wanted}.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    if len(set(numbers)) != len(numbers) or not set(states) <= set(numbers):
        raise WeightsError(f"{path} is damaged: its {_OPTIMIZER_KEY} numbers its parameters wrongly.")
    for number, parameter in zip(numbers, parameters, strict=True):
        state = states.get(number, {})
        wrong = not isinstance(state, Mapping) or any(
            isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape for value in state.values()
        )
        if wrong:
            raise WeightsError(f"{path} is of another optimizer: the state of parameter {number} has another shape.")
    return dict(saved)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)
