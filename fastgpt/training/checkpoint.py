"""Everything that a training run needs to go on, in one safetensors file (see `fastgpt.weights.files`).

| tensor                                  | what                                                                  |
|-----------------------------------------|-----------------------------------------------------------------------|
| the book's names                        | weights, without masks; `load_weights` takes them alone               |
| optimizer/exp_avg/tok_emb.weight, ...    | state of the optimizer: kind, then the parameter it belongs to        |
| rng/cpu, rng/cuda                       | states of torch's random generators; cuda where the model is on a GPU |
| extra/...                               | what the caller adds                                                  |

The optimizer's settings (learning rate, betas ...) stand in the header as JSON. One file, moved into place when it is
complete, so there is no moment in which weights and moments belong to different steps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.weights.files import CheckpointError, load_tensors, model_tensors, read_tensors, write_tensors

_OPTIMIZER, _RNG, _EXTRA = "optimizer/", "rng/", "extra/"

# How the update is computed, not what: a run that moves to another device keeps what suits that one.
_NOT_KEPT = ("params", "fused", "foreach", "capturable", "differentiable")


def save_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    info: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, optimizer and random states, so that `load_checkpoint` can go on exactly here.

    Args:
        path: where; a file there is replaced at once, never half.
        model: any module.
        optimizer: over parameters of `model`; its state must be tensors and its settings numbers.
        info: kept with them, as JSON.
        extra: more tensors.
    """
    names = _parameter_names(model)
    tensors = dict(model_tensors(model))
    for parameter, state in optimizer.state.items():
        for kind, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{kind}/{names[parameter]}"] = value
    tensors |= {_RNG + name: state for name, state in _random_states(model).items()}
    tensors |= {_EXTRA + name: tensor for name, tensor in (extra or {}).items()}
    groups = [
        {
            "names": [names[p] for p in group["params"]],
            "settings": {key: _plain(value) for key, value in group.items() if key not in _NOT_KEPT},
        }
        for group in optimizer.param_groups
    ]
    write_tensors(path, tensors, {**(info or {}), "optimizer": groups})


def load_checkpoint(
    path: str | os.PathLike[str], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put everything back that `save_checkpoint` wrote, torch's random states included.

    All is read and compared first: when anything does not fit, nothing has been changed.

    Args:
        path: a file of `save_checkpoint`.
        model: of the same names, shapes and dtypes.
        optimizer: over the same parameters in the same groups.

    Returns:
        (info, extra tensors).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or belongs to another model or optimizer.
    """
    tensors, info = read_tensors(path)
    if "optimizer" not in info:
        raise CheckpointError(
            f"{path} holds no training state, only weights; load it with fastgpt.weights.load_weights."
        )
    weights = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    state_dict = _optimizer_state(path, model, optimizer, _below(tensors, _OPTIMIZER), info["optimizer"])
    random = _below(tensors, _RNG)
    _check_random_states(path, model, random)
    load_tensors(path, model, weights)
    optimizer.load_state_dict(state_dict)
    _set_random_states(model, random)
    return {key: value for key, value in info.items() if key != "optimizer"}, _below(tensors, _EXTRA)


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The info of a checkpoint without its tensors; raises as `load_checkpoint` does."""
    return read_tensors(path, wanted=lambda name: False)[1]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parameter_names(model: torch.nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _optimizer_state(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
) -> dict[str, Any]:
    """A state dict that `optimizer` will take, once names and shapes agree."""
    names = _parameter_names(model)
    current = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if [group["names"] for group in groups] != current:
        raise CheckpointError(
            f"{path} was written by an optimizer with other parameter groups. Nothing was loaded; "
            "build the optimizer as it was."
        )
    order = {name: i for i, name in enumerate(name for group in current for name in group)}
    shapes = {name: parameter.shape for parameter, name in names.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if name not in order or (tensor.ndim and tensor.shape != shapes[name]):
            raise CheckpointError(f"{path} has an optimizer state {key!r} that fits no parameter. Nothing was loaded.")
        state.setdefault(order[name], {})[kind] = tensor.clone()
    return {"state": state, "param_groups": _group_dicts(optimizer, groups)}


def _group_dicts(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    dicts, first = [], 0
    for saved, group in zip(groups, optimizer.param_groups, strict=True):
        values = {key: value for key, value in group.items() if key in _NOT_KEPT} | saved["settings"]
        values["params"] = list(range(first, first + len(group["params"])))
        for key, value in values.items():
            if isinstance(group.get(key), tuple):
                values[key] = tuple(value)
        first += len(group["params"])
        dicts.append(values)
    return dicts


def _cuda_device(model: torch.nn.Module) -> torch.device | None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return device if device.type == "cuda" else None


def _random_states(model: torch.nn.Module) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    device = _cuda_device(model)
    if device is not None:
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _check_random_states(path: str | os.PathLike[str], model: torch.nn.Module, states: Mapping[str, Tensor]) -> None:
    for name, current in _random_states(model).items():
        state = states.get(name)
        # A run that moves to a GPU has no state for it: that generator keeps its own.
        if (state is None and name == "cpu") or (state is not None and state.shape != current.shape):
            raise CheckpointError(f"{path} has no usable state of the {name} random generator. Nothing was loaded.")


def _set_random_states(model: torch.nn.Module, states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"].clone())
    device = _cuda_device(model)
    if device is not None and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)
