"""safetensors files and the JSON beside them, checked by their own claims before anything is allocated.

A safetensors file is: length of the header (8 bytes, little-endian) | header (JSON) | the tensors' bytes. The header is
{name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}} and, optionally, "__metadata__".
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgpt.weights.errors import WeightsError
from fastgpt.weights.files import CheckpointError, read_tensors

_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# JSON becomes many times larger in memory; the header of GPT-2 XL has 0.1 MiB.
_MAX_HEADER_BYTES = _MAX_JSON_BYTES = 8 << 20
_REMEDY = "Nothing was loaded; get or write the file again."


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file into memory; checksums are compared where the file has them.

    The state of a training run, whose names have a "/", is left out.

    Raises:
        WeightsError: the file is damaged or truncated.
    """
    return _read(Path(path), lambda name: "/" not in name)[0]


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What fastgpt wrote beside the tensors of a safetensors file; {} for a file that is not ours.

    Raises:
        WeightsError: the file is damaged or truncated.
    """
    return _read(Path(path), lambda name: False)[1]


def _read(path: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _check_header(path)
    try:
        tensors, info = read_tensors(path, wanted=wanted)
    except WeightsError:
        raise
    except (CheckpointError, ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged or truncated: {error}. {_REMEDY}") from None
    return tensors, info if isinstance(info, dict) else {}


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        WeightsError: it does not, or is too long, or names a key twice.
    """
    path = Path(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise WeightsError(f"{path} has {path.stat().st_size:,} bytes; a file of this kind is never that long.")
    return _parse(path, path.read_bytes())


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: it has no valid JSON ({str(error)[:200]}). {_REMEDY}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is damaged: its JSON is a {type(content).__name__}, wanted an object. {_REMEDY}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands there twice")
    return content


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise WeightsError(f"{path} is damaged or truncated: a header of {length:,} bytes in {size:,}. {_REMEDY}")
        header = _parse(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise WeightsError(f"{path} is damaged: its metadata are not strings. {_REMEDY}")
    for name, entry in header.items():
        problem = _problem(entry, size - 8 - length)
        if problem:
            raise WeightsError(f"{path} is damaged or not supported: {name[:100]!r} {problem}. {_REMEDY}")


def _problem(entry: Any, n_bytes: int) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "has no dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEMSIZE:
        return f"has the dtype {str(dtype)[:20]!r}, which GPT weights do not have"
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or len(shape) > 64:
        return "has an impossible shape or place"
    begin, end = offsets
    if not begin <= end <= n_bytes:
        return f"reaches to byte {end:,} of {n_bytes:,}"
    if math.prod(shape) * _ITEMSIZE[dtype] != end - begin:
        return f"of shape {tuple(shape)} and {dtype} claims {end - begin:,} bytes"
    return None


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
