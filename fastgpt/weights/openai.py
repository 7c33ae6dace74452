"""Chapter 5: OpenAI's GPT-2 checkpoints, downloaded and read without TensorFlow."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastgpt import env
from fastgpt.weights.tensor_bundle import BundleError, TensorBundle

MODEL_SIZES = ("124M", "355M", "774M", "1558M")
FILES = (
    "checkpoint",
    "encoder.json",
    "hparams.json",
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.ckpt.meta",
    "vocab.bpe",
)
PRIMARY = "https://openaipublic.blob.core.windows.net/gpt-2/models"
BACKUP = "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2"

_TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class DownloadError(OSError):
    """A file could not be downloaded; the text says what was tried, and the ways out."""


def download_and_load_gpt2(
    model_size: str, models_dir: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """OpenAI's GPT-2 of one size: its settings and parameters (chapter 5).

    The seven files are kept in `models_dir/model_size`. When they are all there and whole, the network is not used.

    Args:
        model_size: "124M", "355M", "774M" or "1558M".
        models_dir: where models are kept, such as "gpt2".

    Returns:
        (settings, params): settings has n_vocab, n_ctx, n_embd, n_head, n_layer; params are nested dicts of float32
        arrays, {"blocks": [{"attn": ..., "mlp": ..., "ln_1": ..., "ln_2": ...}], "wpe", "wte", "g", "b"}.

    Raises:
        ValueError: there is no such size, or a file is damaged.
        DownloadError: a file is missing and could not be downloaded.
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(f"Model size not in {MODEL_SIZES}; got {model_size!r}.")
    folder = Path(models_dir) / model_size
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_whole(folder):
        for name in FILES:
            download_file(f"{PRIMARY}/{model_size}/{name}", folder / name, f"{BACKUP}/{model_size}/{name}")
    settings = _read_settings(folder / "hparams.json")
    return settings, load_gpt2_params_from_tf_ckpt(_latest_checkpoint(folder), settings)


def download_file(url: str, destination: str | os.PathLike[str], backup_url: str | None = None) -> None:
    """Download a file, unless it is there already with the size that the server names.

    The file appears at its place only when it is complete. What an interrupted download has fetched stays beside it, in
    `<destination>.part`, and the next call goes on from there where the server allows it.

    Args:
        url: where from.
        destination: where to; its folder must exist.
        backup_url: tried when `url` fails.

    Raises:
        DownloadError: neither address works, or FASTGPT_OFFLINE forbids the network.
    """
    destination = Path(destination)
    reasons = []
    for address in (url, backup_url):
        if address is None:
            continue
        if env.offline():
            reasons.append(f"{address}: FASTGPT_OFFLINE=1 forbids the network")
            continue
        try:
            if _download(address, destination):
                print(f"File already exists and is up-to-date: {destination}")
            return
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{address}: {error or type(error).__name__}")
            logger.warning("%s failed: %s", address, error)
    raise DownloadError(
        f"{destination.name} could not be downloaded.\n  " + "\n  ".join(reasons) + "\n"
        f"Is this machine online? Call again to go on where it stopped, or put the file at {destination} by hand."
    )


def load_gpt2_params_from_tf_ckpt(ckpt_path: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read GPT-2's parameters from a TensorFlow checkpoint (chapter 5), without TensorFlow.

    Args:
        ckpt_path: the checkpoint's prefix, such as "gpt2/124M/model.ckpt".
        settings: from hparams.json; `n_layer` is read.

    Returns:
        Nested dicts of arrays, axes of size 1 removed: "model/h0/attn/c_attn/w" is at
        ["blocks"][0]["attn"]["c_attn"]["w"], "model/ln_f/g" at ["g"].

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        BundleError: it is damaged, or it is not a GPT-2 with that many layers.
    """
    bundle = TensorBundle(ckpt_path)
    n_layers = int(settings["n_layer"])
    params: dict[str, Any] = {"blocks": [{} for _ in range(n_layers)]}
    for name in bundle.entries:
        parts = name.split("/")[1:]
        if not parts:
            raise BundleError(f"{ckpt_path} holds {name!r}; a GPT-2 checkpoint has only names under 'model/'.")
        target = params
        layer = re.fullmatch(r"h(\d+)", parts[0])
        if layer is not None:
            if int(layer[1]) >= n_layers:
                raise BundleError(f"{ckpt_path} has {name!r}, but settings['n_layer'] is {n_layers}.")
            target = params["blocks"][int(layer[1])]
        for key in parts[1:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise BundleError(f"{ckpt_path} has {name!r} below another tensor; it is not a GPT-2 checkpoint.")
        target[parts[-1]] = np.squeeze(bundle.read(name))
    for i, block in enumerate(params["blocks"]):
        if not block:
            raise BundleError(f"{ckpt_path} has no layer h{i}, but settings['n_layer'] is {n_layers}.")
    return params


def _is_whole(folder: Path) -> bool:
    """Whether all files are there and the checkpoint's data is as long as its index says."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    try:
        _read_settings(folder / "hparams.json")
        TensorBundle(_latest_checkpoint(folder))
    except (OSError, ValueError) as error:
        logger.info("%s is not complete: %s", folder, error)
        return False
    return True


def _latest_checkpoint(folder: Path) -> Path:
    # The file names a path on the machine that wrote it; only its last part holds here.
    found = re.search(r'model_checkpoint_path:\s*"([^"]+)"', (folder / "checkpoint").read_text("utf-8", "replace"))
    return folder / (Path(found[1]).name if found else "model.ckpt")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Delete it and download it again.") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("n_layer"), int):
        raise ValueError(f"{path} does not name n_layer. Delete it and download it again.")
    return settings


def _download(url: str, destination: Path) -> bool:
    """Fetch one file; True when it was already there."""
    part = destination.with_name(destination.name + ".part")
    begin = part.stat().st_size if part.exists() and not destination.exists() else 0
    try:
        response = _open(url, begin)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not begin:
            raise
        # The part is as long as the file, or longer: what it is cannot be known, so begin anew.
        response, begin = _open(url, 0), 0
    with response:
        total = _total_bytes(response, begin)
        if total is not None and destination.exists() and destination.stat().st_size == total:
            return True
        begin = begin if _continues(response, begin) else 0
        _receive(response, part, begin, total)
    os.replace(part, destination)
    return False


def _open(url: str, begin: int) -> Any:
    # Asking for the bytes as they are keeps Content-Length the size of the file.
    headers = {"Accept-Encoding": "identity", "User-Agent": "fastgpt"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)


def _continues(response: Any, begin: int) -> bool:
    return response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {begin}-")


def _total_bytes(response: Any, begin: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    if not length.isdecimal():
        return None
    return int(length) + (begin if _continues(response, begin) else 0)


def _receive(response: BinaryIO, part: Path, begin: int, total: int | None) -> None:
    from tqdm import tqdm

    with (
        part.open("ab" if begin else "wb") as file,
        tqdm(
            total=total, initial=begin, unit="iB", unit_scale=True, desc=part.stem, disable=None, leave=False
        ) as progress,
    ):
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            progress.update(len(chunk))
        got = file.tell()
    if total is not None and got != total:
        if got > total:
            part.unlink()
        raise DownloadError(f"the connection ended after {got:,} of {total:,} bytes")
