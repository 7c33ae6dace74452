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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.weights.errors import WeightsError
from fastgpt.weights.layouts import plain_names, to_book
from fastgpt.weights.safetensors_files import read_json, read_safetensors
from fastgpt.weights.torch_files import LEGACY_MAGIC, ZIP_MAGIC, read_torch

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
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SHOWN = 4


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
    with path.open("rb") as file:
        begin = file.read(len(LEGACY_MAGIC))
    if begin.startswith(ZIP_MAGIC) or begin == LEGACY_MAGIC:
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


def copy_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy weights under the book's names into a model once all of them fit.

    Args:
        path: where they are from, for the error.
        weights: from `read_weights` or `to_book`.
        model: as for `load_weights_file`.

    Raises:
        WeightsError: names, shapes or dtypes differ; the model is as it was.
    """
    targets = book_views(model)
    weights = _without_zero_biases(weights, targets)
    problems = list(_problems(weights, targets))
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise WeightsError(
            f"{path} does not fit this model: {'; '.join(problems[:_SHOWN])}{more}. Nothing was loaded. "
            "Build the model with the configuration of these weights; fastgpt.weights.infer_config reads it from them."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])


def book_views(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers under the book's names, without masks: views that can be written to.

    Raises:
        WeightsError: this is no GPT-2 under the names of `GPTModel` or `GPTModelFast`.
    """
    buffers = {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set and name != "mask"
    }
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)} | buffers
    if "tok_emb.weight" not in plain_names(tensors):
        raise WeightsError(f"{type(model).__name__} is no model with the book's names: it has no tok_emb.weight.")
    return to_book(tensors)


def _without_zero_biases(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def needless(name: str) -> bool:
        extra = name not in targets and name.endswith((".att.W_query.bias", ".att.W_key.bias", ".att.W_value.bias"))
        return extra and not weights[name].is_meta and not bool(weights[name].any())

    return {name: tensor for name, tensor in weights.items() if not needless(name)}


def _problems(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in targets if name not in weights)
    yield from (f"{name[:100]} is not part of the model" for name in weights if name not in targets)
    common = [name for name in targets if name in weights]
    for name in common:
        got, wanted = weights[name], targets[name]
        if got.shape != wanted.shape:
            yield f"{name} has shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
        elif got.dtype != wanted.dtype and not (got.dtype in _FLOATS and wanted.dtype in _FLOATS):
            yield f"{name} is {got.dtype}, wanted {wanted.dtype}"
        elif got.is_meta or wanted.is_meta:
            yield f"{name} is on the meta device, which holds no numbers (model.to_empty(device='cpu') gives it memory)"
        elif got.layout != torch.strided:
            yield f"{name} is sparse"
    if {"tok_emb.weight", "out_head.weight"} <= set(common):
        yield from _tie_problem(weights, targets)


def _tie_problem(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Iterator[str]:
    wte, head = weights["tok_emb.weight"], weights["out_head.weight"]
    one = targets["tok_emb.weight"].data_ptr() == targets["out_head.weight"].data_ptr()
    same = one and wte.shape == head.shape == targets["out_head.weight"].shape
    if same and not targets["out_head.weight"].is_meta and wte is not head and not torch.equal(wte, head):
        yield "out_head.weight and tok_emb.weight are one tensor in the model, two different ones in the file"


def _optimizer_state(path: str | os.PathLike[str], content: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The file's optimizer state, once its groups and shapes are known to be those of `optimizer`."""
    saved = content.get(_OPTIMIZER_KEY) if isinstance(content, Mapping) else None
    if not isinstance(saved, Mapping):
        raise WeightsError(f"{path} has no {_OPTIMIZER_KEY!r}; save it as chapter 5 does, or leave the optimizer out.")
    groups, states = saved.get("param_groups"), saved.get("state")
    if (
        not isinstance(groups, list)
        or not isinstance(states, Mapping)
        or not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    ):
        raise WeightsError(f"{path} is damaged: its {_OPTIMIZER_KEY} has no param_groups and state.")
    got = [len(group["params"]) for group in groups]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if got != wanted:
        raise WeightsError(f"{path} is of another optimizer: groups of {got} parameters, wanted {wanted}.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    if sorted(map(str, numbers)) != sorted({str(n) for n in numbers}) or not set(states) <= set(numbers):
        raise WeightsError(f"{path} is damaged: its {_OPTIMIZER_KEY} numbers its parameters wrongly.")
    for number, parameter in zip(numbers, parameters, strict=True):
        state = states.get(number, {})
        wrong = not isinstance(state, Mapping) or any(
            isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape for value in state.values()
        )
        if wrong:
            raise WeightsError(f"{path} is of another optimizer: the state of parameter {number} has another shape.")
    return dict(saved)
