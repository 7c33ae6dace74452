"""The data sets of chapters 6 and 7, downloaded once. A file that is there already needs no network."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from fastgpt.text import read_text
from fastgpt.weights import download_file

_SPAM_FILE = "SMSSpamCollection"

# The collection is half a megabyte; an archive that unpacks to more than this is not it.
_MAX_BYTES = 64 << 20


def download_and_unzip_spam_data(
    url: str,
    zip_path: str | os.PathLike[str],
    extracted_path: str | os.PathLike[str],
    data_file_path: str | os.PathLike[str],
) -> None:
    """Get chapter 6's messages, unless `data_file_path` exists already.

    Args:
        url: address of the archive.
        zip_path: where the archive is kept.
        extracted_path: folder for its content.
        data_file_path: what its file SMSSpamCollection becomes, the book's "SMSSpamCollection.tsv".

    Raises:
        OSError: the download failed, or FASTGPT_OFFLINE forbids it; the text names the ways out.
        ValueError: the archive is damaged, unsafe, or holds no SMSSpamCollection.
    """
    data_file_path = Path(data_file_path)
    if data_file_path.exists():
        print(f"{data_file_path} already exists. Skipping download and extraction.")
        return
    download_file(url, zip_path)
    unpack(zip_path, extracted_path)
    unpacked = Path(extracted_path) / _SPAM_FILE
    if not unpacked.is_file():
        raise ValueError(f"{zip_path} holds no {_SPAM_FILE}; is {url} the address of the SMS Spam Collection?")
    os.replace(unpacked, data_file_path)
    print(f"File downloaded and saved as {data_file_path}")


def download_and_load_file(file_path: str | os.PathLike[str], url: str) -> Any:
    """Chapter 7's entries: the content of a JSON file, downloaded first if it is not there.

    Args:
        file_path: the file.
        url: where to get it.

    Returns:
        What the JSON says: for the book's file, a list of 1,100 dicts.

    Raises:
        OSError: the download failed, or FASTGPT_OFFLINE forbids it; the text names the ways out.
        ValueError: the file is not UTF-8 or not JSON; the text names the line.
    """
    if not os.path.exists(file_path):
        download_file(url, file_path)
    return parse_json(read_text(file_path), file_path)


def parse_json(text: str, where: str | os.PathLike[str]) -> Any:
    """Parse JSON; ValueError, naming `where` and the line, when it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = text.splitlines()
        line = lines[error.lineno - 1].strip()[:80] if error.lineno <= len(lines) else ""
        raise ValueError(
            f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}: {line!r}"
        ) from None
    except RecursionError:
        raise ValueError(f"{where} is not usable: its JSON is nested too deeply.") from None


def unpack(zip_path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Unpack an archive into a folder, and nowhere else.

    Every member is checked before the first one is written.

    Args:
        zip_path: the archive.
        folder: made if it is not there.

    Raises:
        ValueError: the archive is damaged, unpacks to more than 64 MiB, or has a member that would land outside.
    """
    folder = Path(folder)
    try:
        with zipfile.ZipFile(zip_path) as archive:
            members = archive.infolist()
            for member in members:
                _check_member(zip_path, member, folder)
            if sum(member.file_size for member in members) > _MAX_BYTES:
                raise ValueError(
                    f"{zip_path} unpacks to more than {_MAX_BYTES >> 20} MiB; it is not the archive wanted."
                )
            folder.mkdir(parents=True, exist_ok=True)
            for member in members:
                archive.extract(member, folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{zip_path} is no usable zip archive ({error}); delete it and download it again.") from error


def _check_member(zip_path: str | os.PathLike[str], member: zipfile.ZipInfo, folder: Path) -> None:
    # orig_filename is the name as it stands in the archive; filename has been cut and translated already.
    names = {member.filename.replace("\\", "/"), member.orig_filename.replace("\\", "/")}
    inside = all(
        (folder / name).resolve().is_relative_to(folder.resolve()) and ":" not in name and not name.startswith("/")
        for name in names
        if "\0" not in name
    )
    is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
    if not inside or is_link or any("\0" in name for name in names):
        raise ValueError(
            f"{zip_path} holds {member.orig_filename!r}, which would be written outside {folder}. "
            "Nothing was unpacked; do not trust this archive."
        )
