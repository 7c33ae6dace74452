"""LoRA adapters on disk: the trained matrices alone, with what they were trained on, in one safetensors file.

| tensor                       | what                                                                     |
|------------------------------|--------------------------------------------------------------------------|
| trf_blocks.0.att.W_query.lora.A, .lora.B | the matrices of one layer, under their names in the model    |
| names given as `also`        | whole tensors that belong to the adapter, such as a classifier's head    |

The header says rank, alpha and scaling of each layer and the CRC-32 of each weight that was adapted, so that an
adapter cannot go onto another model unnoticed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.finetuning.lora import LinearWithLoRA, check_lora, lora_layers, wrap_linear
from fastgpt.weights.files import CheckpointError, check_same, describe, model_tensors, read_tensors, write_tensors

_KEYS = ("rank", "alpha", "scaling", "base_crc32")


def save_adapter(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    also: Collection[str] = (),
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write the LoRA layers of a model.

    Args:
        path: where; a file there is replaced at once, never half.
        model: after `replace_linear_with_lora`.
        also: names of other tensors of the model to keep whole, such as "out_head.linear.weight".
        info: kept with them, as JSON.

    Raises:
        ValueError: the model has no LoRA layer, or no tensor of a name in `also`.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError(
            "The model has no LoRA layers to save; replace_linear_with_lora(model, rank, alpha) adds them."
        )
    everything = model_tensors(model)
    unknown = sorted(set(also) - set(everything))
    if unknown:
        raise ValueError(f"The model has no tensor {unknown[0]!r}; names are those of model.named_parameters().")
    tensors = {f"{name}.lora.{part}": everything[f"{name}.lora.{part}"] for name in layers for part in "AB"}
    tensors |= {name: everything[name] for name in also}
    description = {name: _describe_layer(layer) for name, layer in layers.items()}
    write_tensors(path, tensors, {**(info or {}), "lora": {"layers": description, "also": list(also)}})


def load_adapter(path: str | os.PathLike[str], model: nn.Module, *, check_base: bool = True) -> dict[str, Any]:
    """Add the LoRA layers of a file to a model, or fill those that it has.

    Everything is compared first: when anything does not fit, nothing has been changed.

    Args:
        path: a file of `save_adapter`.
        model: the model that was adapted, either without LoRA layers, or with exactly those of the file.
        check_base: insist on the very weights that the adapter was trained on.

    Returns:
        The info that was saved with it.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, no adapter, or does not fit this model.
    """
    tensors, info = read_tensors(path)
    layers, also = _read_description(path, info)
    current = dict(lora_layers(model))
    _check_layers(path, model, layers, current)
    if check_base:
        _check_base(path, model, layers, also, current)
    _check_shapes(path, model, tensors, layers, also, current)
    if not current:
        for name, layer in layers.items():
            wrap_linear(model, name, layer["rank"], layer["alpha"], layer["scaling"])
    with torch.no_grad():
        targets = model_tensors(model)
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
    return {key: value for key, value in info.items() if key != "lora"}


def _describe_layer(layer: LinearWithLoRA) -> dict[str, Any]:
    lora = layer.lora
    return {"rank": lora.rank, "alpha": lora.alpha, "scaling": lora.scaling, "base_crc32": _crc(layer.linear.weight)}


def _crc(weight: Tensor) -> int:
    return zlib.crc32(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _read_description(
    path: str | os.PathLike[str], info: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    lora = info.get("lora")
    if not isinstance(lora, dict):
        raise CheckpointError(
            f"{path} is no LoRA adapter (a file of fastgpt.finetuning.save_adapter); nothing was loaded."
        )
    layers, also = lora.get("layers"), lora.get("also")
    if not (isinstance(layers, dict) and layers and isinstance(also, list)):
        raise CheckpointError(f"{path} does not describe its LoRA layers. Nothing was loaded.")
    for name, layer in layers.items():
        if not isinstance(layer, dict) or any(key not in layer for key in _KEYS):
            raise CheckpointError(f"{path} does not give {', '.join(_KEYS)} of {name}. Nothing was loaded.")
        try:
            check_lora(layer["rank"], layer["alpha"], layer["scaling"])
        except ValueError as error:
            raise CheckpointError(f"{path}, layer {name}: {error} Nothing was loaded.") from None
    return layers, also


def _check_layers(
    path: str | os.PathLike[str],
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Any]],
    current: Mapping[str, LinearWithLoRA],
) -> None:
    """Each layer of the file has its place in the model, and the model's own LoRA layers are those of the file."""
    if not current:
        modules = dict(model.named_modules())
        for name in layers:
            if not isinstance(modules.get(name), nn.Linear):
                found = type(modules[name]).__name__ if name in modules else "nothing"
                raise CheckpointError(
                    f"{path} adapts a linear layer {name!r}; this model has {found} there. Nothing was loaded."
                )
        return
    got = {name: _settings(layer) for name, layer in layers.items()}
    wanted = {name: _settings(vars(layer.lora)) for name, layer in current.items()}
    check_same(path, got, wanted)


def _settings(layer: Mapping[str, Any]) -> str:
    return f"rank {layer['rank']}, alpha {layer['alpha']:g}, scaling {layer['scaling']}"


def _check_base(
    path: str | os.PathLike[str],
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Any]],
    also: Collection[str],
    current: Mapping[str, LinearWithLoRA],
) -> None:
    tensors = model_tensors(model)
    changed = []
    for name, layer in layers.items():
        weight = tensors[f"{name}.linear.weight" if name in current else f"{name}.weight"]
        # What the file brings along whole may be anything now.
        if f"{name}.linear.weight" not in also and (weight.is_meta or _crc(weight) != layer["base_crc32"]):
            changed.append(name)
    if changed:
        raise CheckpointError(
            f"{path} was trained on other weights: {changed[0]} differs ({len(changed)} of {len(layers)} layers). "
            "Load the model that it was trained on, or pass check_base=False. Nothing was loaded."
        )


def _check_shapes(
    path: str | os.PathLike[str],
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Any]],
    also: list[str],
    current: Mapping[str, LinearWithLoRA],
) -> None:
    modules, own = dict(model.named_modules()), model_tensors(model)
    wanted: dict[str, str] = {}
    for name, layer in layers.items():
        linear: Any = current[name].linear if name in current else modules[name]
        size = {"A": (linear.in_features, layer["rank"]), "B": (layer["rank"], linear.out_features)}
        for part, shape in size.items():
            wanted[f"{name}.lora.{part}"] = f"{str(linear.weight.dtype).removeprefix('torch.')} {shape}"
    for name in also:
        plain = name if current else _without_wrapper(name, layers)
        if plain not in own:
            raise CheckpointError(f"{path} holds {name!r}, which this model has not. Nothing was loaded.")
        wanted[name] = describe(own[plain])
    check_same(path, {name: describe(tensor) for name, tensor in tensors.items()}, wanted)


def _without_wrapper(name: str, layers: Mapping[str, Any]) -> str:
    """The name of a tensor before its layer was wrapped: out_head.linear.weight was out_head.weight."""
    owner, _, leaf = name.rpartition(".")
    inside = owner.removesuffix(".linear")
    return f"{inside}.{leaf}" if inside != owner and inside in layers else name
