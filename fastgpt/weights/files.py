"""Tensors in safetensors files, written whole or not at all, and read only when every checksum agrees.

A file of ours is an ordinary safetensors file; its header carries, beside the tensors, two strings:

| key           | what                                                                                     |
|---------------|------------------------------------------------------------------------------------------|
| fastgpt       | JSON: {"version": 1, "info": what the caller gave, "crc32": {tensor name: checksum}}      |
| fastgpt_crc32 | CRC-32 of that string, in hexadecimal                                                    |

Nothing in such a file is executed when it is read, as a pickle's content is. Model weights stand there under the book's
names, without the causal masks, which are not weights.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.weights.errors import WeightsError

VERSION = 1
_MASK = ".mask"
_SHOWN = 4


class CheckpointError(WeightsError):
    """A file is damaged, truncated, or does not fit the model; nothing of it has been loaded."""


def save_weights(path: str | os.PathLike[str], model: nn.Module, info: Mapping[str, Any] | None = None) -> None:
    """Write a model's weights under the book's names; `info` with "config" lets `load_model` build the model again.

    Args:
        path: where; a file there is replaced at once, never half.
        model: any module.
        info: kept with them, as JSON.
    """
    write_tensors(path, model_tensors(model), info or {})


def load_weights(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Load weights into a model that has exactly these names, shapes and dtypes.

    Args:
        path: a file of `save_weights`, a training checkpoint, or any safetensors file with the book's names.
        model: keeps its weights as they are unless all fit.

    Returns:
        The info that was saved with them; {} for a file that is not ours.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or does not fit.
    """
    tensors, info = read_tensors(path, wanted=is_weight)
    load_tensors(path, model, tensors)
    return info


def load_model(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model that a file describes, and load its weights.

    Args:
        path: a file that `save_weights` wrote with "config" in its info, as `fastgpt train` does.

    Returns:
        (model on the CPU in evaluation mode and in the dtype of the file, info).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or does not say what model it belongs to.
    """
    from fastgpt.model import GPTModel

    tensors, info = read_tensors(path, wanted=is_weight)
    if not tensors or not isinstance(info.get("config"), dict):
        raise CheckpointError(
            f"{path} does not say which configuration its weights belong to. "
            "Build the model yourself and use fastgpt.weights.load_weights(path, model)."
        )
    # Memory without the initial random numbers: all of it is about to be overwritten.
    with torch.device("meta"):
        model = GPTModel(info["config"]).to(next(iter(tensors.values())).dtype)
    model.to_empty(device="cpu")
    load_tensors(path, model, tensors)
    return model.eval(), info


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers by name, without causal masks; not copied."""
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in _persistent(model)}
    tensors = dict(model.named_parameters()) | buffers
    return {name: tensor.detach() for name, tensor in tensors.items() if not name.endswith(_MASK)}


def is_weight(name: str) -> bool:
    """Whether a tensor of a file belongs to the model: not a mask, not the state of the training run."""
    return not name.endswith(_MASK) and "/" not in name


def load_tensors(path: str | os.PathLike[str], model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model once names, shapes and dtypes agree; CheckpointError, naming `path`, if they do not."""
    targets = model_tensors(model)
    check_same(path, {name: describe(t) for name, t in tensors.items()}, {n: describe(t) for n, t in targets.items()})
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def describe(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, as they stand in error messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_same(path: str | os.PathLike[str], got: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise CheckpointError unless both have the same names with the same descriptions."""
    problems = [f"{name} is missing" for name in wanted if name not in got]
    problems += [f"{name} is not part of it" for name in got if name not in wanted]
    problems += [
        f"{name} is {got[name]}, wanted {text}" for name, text in wanted.items() if name in got and got[name] != text
    ]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{path} does not fit this model: {'; '.join(problems[:_SHOWN])}{more}. Nothing was loaded. "
            "Is it from another configuration?"
        )


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors and `info` (JSON) to a file that appears whole or not at all; OSError when it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    crcs = {name: _checksum(tensor) for name, tensor in host.items()}
    text = json.dumps({"version": VERSION, "info": dict(info), "crc32": crcs}, sort_keys=True)
    metadata = {"format": "pt", "fastgpt": text, "fastgpt_crc32": f"{zlib.crc32(text.encode()):08x}"}
    try:
        _replace(path, lambda unfinished: save_file(host, unfinished, metadata))
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) that appears whole or not at all."""
    _replace(Path(path), lambda unfinished: unfinished.write_text(text, "utf-8"))


def read_tensors(
    path: str | os.PathLike[str], *, wanted: Callable[[str], bool] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and verify the checksums of what was read.

    Args:
        path: a file of `write_tensors`, or any safetensors file; the latter has no checksums.
        wanted: which names to read; all when None.

    Returns:
        (tensors on the CPU, info).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged or truncated.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path} (looked from {Path.cwd()}).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = [name for name in file.keys() if wanted is None or wanted(name)]  # noqa: SIM118 - not a dict
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, UnicodeDecodeError, struct.error, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}. {_REMEDY}") from None
    return tensors, _verified_info(path, metadata, tensors, wanted)


_REMEDY = "Nothing was loaded; use another checkpoint of the run, if there is one, or train again."


def _verified_info(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], wanted: Callable[[str], bool] | None
) -> dict[str, Any]:
    text = metadata.get("fastgpt")
    if text is None and "fastgpt_crc32" not in metadata:
        return {}
    if text is None or f"{zlib.crc32(text.encode()):08x}" != metadata.get("fastgpt_crc32"):
        raise CheckpointError(f"{path} is damaged: its header does not match its checksum. {_REMEDY}")
    content = json.loads(text)
    if content["version"] != VERSION:
        raise CheckpointError(f"{path} has version {content['version']}; this fastgpt reads version {VERSION}.")
    crcs: dict[str, int] = content["crc32"]
    absent = [name for name in crcs if name not in tensors and (wanted is None or wanted(name))]
    if absent:
        raise CheckpointError(f"{path} is damaged: {absent[0]} is missing. {_REMEDY}")
    for name, tensor in tensors.items():
        if crcs.get(name) != _checksum(tensor):
            raise CheckpointError(f"{path} is damaged: {name} does not match its checksum. {_REMEDY}")
    info: dict[str, Any] = content["info"]
    return info


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of dtype, shape and bytes."""
    start = zlib.crc32(describe(tensor).encode())
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, start)


def _persistent(model: nn.Module) -> set[str]:
    """Names of the buffers that belong into a state dict."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with unfinished.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        write(unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        # safetensors makes files that only their owner may read; this is what the user's umask asks for.
        unfinished.chmod(mode)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":
        # The new name must reach the disk too, or a power cut brings the old file back.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
