"""Reading text: UTF-8 files with errors that can be acted on, and the story that ships with the package."""

from __future__ import annotations

import codecs
import functools
import os
from importlib import resources
from pathlib import Path

_WIDE_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file; a byte order mark is dropped and line ends become "\\n", as `open` does it.

    Args:
        path: the file.

    Returns:
        The whole text.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file, or it is a folder.
        ValueError: it is not UTF-8; the message names the line and the byte.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the path of one text file.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path} (looked from {Path.cwd()}).")
    data = path.read_bytes()
    for mark, encoding in _WIDE_MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"{path} is {encoding}, not UTF-8. Convert it: iconv -f {encoding} -t UTF-8 {path}")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_where_it_breaks(path, data, error)) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


@functools.cache
def load_story() -> str:
    """The short story that ships with fastgpt, about 20 kB of plain ASCII English.

    Returns:
        The text of assets/story.txt ("The Tide Clerk", Apache-2.0).
    """
    return resources.files("fastgpt").joinpath("assets/story.txt").read_text(encoding="utf-8")


def _where_it_breaks(path: Path, data: bytes, error: UnicodeDecodeError) -> str:
    line = data.count(b"\n", 0, error.start) + 1
    column = error.start - data.rfind(b"\n", 0, error.start)
    return (
        f"{path} is not UTF-8: line {line}, byte {column} of that line (byte {error.start} of the file) is "
        f"0x{data[error.start]:02x}, {error.reason}. Save it as UTF-8; if it was written as Latin-1: "
        f"iconv -f LATIN1 -t UTF-8 {path}"
    )
