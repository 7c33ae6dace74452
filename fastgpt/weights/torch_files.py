"""PyTorch's own files (`torch.save`): read without executing anything, mapped into memory instead of copied."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastgpt.weights.errors import WeightsError
from fastgpt.weights.pickle_scan import PICKLE_ERRORS, Scan, Storage, scan

# Both kinds begin like this: a zip archive since PyTorch 1.6, a pickle of protocol 2 before.
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# A pickle becomes up to 64 times larger in memory; that of GPT-2 XL with its optimizer is below 1 MiB.
_MAX_PICKLE_BYTES = 8 << 20
_MAX_MEMBERS = 1_000_000
_ENCRYPTED = 1
# torch.load asserts, too, what a file must be like.
_TORCH_ERRORS = (AssertionError, OSError, RuntimeError, struct.error)
_REMEDY = "Nothing was loaded; get or write the file again."


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as those of `torch.save` do."""
    with open(path, "rb") as file:
        begin = file.read(len(LEGACY_MAGIC))
    return begin.startswith(ZIP_MAGIC) or begin == LEGACY_MAGIC


def read_torch(path: str | os.PathLike[str]) -> Any:
    """Read a file of `torch.save`, of which only tensors, numbers, text, dicts, lists and tuples are accepted.

    Sizes and checksums are compared before anything is allocated. Tensors of a zip file (any since PyTorch 1.6) are
    mapped: they take memory when they are read.

    Args:
        path: the file.

    Returns:
        The saved object, its tensors on the CPU.

    Raises:
        WeightsError: the file is damaged or truncated, or holds Python objects.
    """
    path = Path(path)
    with path.open("rb") as file:
        begin = file.read(len(LEGACY_MAGIC))
    zipped = begin.startswith(ZIP_MAGIC)
    if not zipped and begin != LEGACY_MAGIC:
        raise WeightsError(f"{path} was not written by torch.save: it begins with {begin[:8]!r}. {_REMEDY}")
    try:
        if zipped:
            _check_zip(path)
        else:
            _check_legacy(path)
        # Newer versions of PyTorch take the name's word for the kind of a file, so there only the bytes are passed.
        if zipped and path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except (*PICKLE_ERRORS, *_TORCH_ERRORS, zipfile.BadZipFile) as error:
        raise WeightsError(_explain(path, error)) from None


def _explain(path: Path, error: BaseException) -> str:
    text = f"{error}".split("\n", 1)[0][:300] or type(error).__name__
    if isinstance(error, pickle.UnpicklingError) and text.startswith("it asks for "):
        return (
            f"{path} is refused: {text}, and weights need no such thing. Reading it could run a program. If it is a "
            "whole model that you saved yourself, save model.state_dict() instead."
        )
    return f"{path} is damaged or truncated: {text}. {_REMEDY}"


def _check_zip(path: Path) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = {member.filename: member for member in members}
        if len(names) != len(members) or len(names) > _MAX_MEMBERS:
            raise WeightsError(f"{path} is refused: its zip archive names a member twice, or has too many. {_REMEDY}")
        for member in members:
            # PyTorch compresses nothing; a compressed member could be of any size.
            plain = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
            if not plain or member.flag_bits & _ENCRYPTED or member.header_offset + member.file_size > size:
                raise WeightsError(f"{path} is refused: {member.filename!r} is compressed or reaches past the end.")
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or names[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise WeightsError(f"{path} is no checkpoint: its zip archive has no single data.pkl of a usual size.")
        root = pickles[0].removesuffix("data.pkl")
        if root + "constants.pkl" in names:
            raise WeightsError(f"{path} holds a TorchScript program, not weights; save model.state_dict() instead.")
        # torch.serialization.set_crc32_options(False) leaves all of them 0.
        if any(member.CRC for member in members) and (broken := archive.testzip()) is not None:
            raise WeightsError(f"{path} is damaged: {broken!r} does not match its checksum. {_REMEDY}")
        found = scan(io.BytesIO(_raw(path, names[pickles[0]])))
        for storage in found.storages.values():
            record = names.get(f"{root}data/{storage.key}")
            _check_storage(path, storage, -1 if record is None else record.file_size)


def _raw(path: Path, member: zipfile.ZipInfo) -> bytes:
    """The bytes of an uncompressed member, which zipfile itself does not give without a checksum."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        name_length, extra_length = struct.unpack_from("<HH", file.read(30), 26)
        file.seek(name_length + extra_length, os.SEEK_CUR)
        return file.read(member.file_size)


def _check_storage(path: Path, storage: Storage, got: int) -> None:
    if got < storage.n_bytes:
        raise WeightsError(
            f"{path} is damaged: storage {storage.key!r} needs {storage.n_bytes:,} bytes, "
            f"{'there is none' if got < 0 else f'got {got:,}'}. {_REMEDY}"
        )


def _check_legacy(path: Path) -> None:
    with path.open("rb") as file:
        # Magic number, protocol version, the writer's machine, the object, and the keys of its storages.
        pickles = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    scans: list[Scan] = [scan(pickles) for _ in range(5)]
    left = path.stat().st_size - pickles.tell()
    storages, keys = scans[3].storages, scans[4].content
    claimed = sum(8 + storage.n_bytes for storage in storages.values())
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages) or claimed != left:
        raise WeightsError(f"{path} is damaged or truncated: it needs {claimed:,} more bytes, got {left:,}. {_REMEDY}")
