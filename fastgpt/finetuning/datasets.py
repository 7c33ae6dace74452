"""Labelled messages and instructions: read from files with errors to act on, or embedded; split as in the book.

    messages      label<TAB>text, one a line, no header; the label is "ham" or "spam", or any word for other tasks
    instructions  a JSON list of {"instruction": ..., "input": ..., "output": ...}

Nothing here needs pandas; the rows are those that the book gets with it.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastgpt.finetuning.downloads import parse_json
from fastgpt.text import read_text

Entry = dict[str, str]
Item = TypeVar("Item")

ENTRY_KEYS = ("instruction", "input", "output")

# The book's pandas random_state.
BOOK_SEED = 123


class Message(NamedTuple):
    """A text and its label."""

    label: str
    text: str


def read_messages(path: str | os.PathLike[str]) -> list[Message]:
    """Read a file of labelled messages.

    Args:
        path: UTF-8, one message a line: label, tab, text. Empty lines are skipped; a text in double quotes may hold
            line ends and tabs.

    Returns:
        The messages in order.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is not UTF-8, a line has no label or no tab, or there is no message; the text names the line.
    """
    return _parse_messages(read_text(path), path)


def load_messages() -> list[Message]:
    """The messages that ship with fastgpt: 159 ham, 140 spam (assets/messages.tsv, Apache-2.0)."""
    return _parse_messages(_asset("messages.tsv"), "assets/messages.tsv")


def read_instructions(path: str | os.PathLike[str]) -> list[Entry]:
    """Read a JSON file of instructions.

    Args:
        path: UTF-8 JSON, a list of objects with the strings "instruction", "input" (may be "" or missing) and "output".

    Returns:
        The entries; other keys are kept.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is not UTF-8, not JSON, or an entry is not as wanted; the text names the line or the entry.
    """
    return check_instructions(parse_json(read_text(path), path), path)


def load_instructions() -> list[Entry]:
    """The 60 instructions that ship with fastgpt (assets/instructions.json, Apache-2.0)."""
    return check_instructions(parse_json(_asset("instructions.json"), "instructions.json"), "assets/instructions.json")


def check_instructions(data: Any, where: str | os.PathLike[str]) -> list[Entry]:
    """The data as entries; ValueError, naming `where` and the entry's index, when one is not as wanted."""
    if not isinstance(data, list) or not data:
        raise ValueError(
            f"{where} must hold a JSON list of entries with {', '.join(ENTRY_KEYS)}; "
            f"got {'an empty list' if data == [] else type(data).__name__}."
        )
    entries = []
    for index, entry in enumerate(data):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}, entry {index}: wanted an object, got {type(entry).__name__}.")
        entry = dict(entry)
        entry.setdefault("input", "")
        for key in ENTRY_KEYS:
            if key not in entry:
                raise ValueError(f"{where}, entry {index}: {key!r} is missing; got {', '.join(map(repr, entry))}.")
            if not isinstance(entry[key], str):
                raise ValueError(f"{where}, entry {index}: {key!r} must be a text; got {entry[key]!r}.")
        for key in ("instruction", "output"):
            if not entry[key].strip():
                raise ValueError(f"{where}, entry {index}: {key!r} is empty.")
        entries.append(entry)
    return entries


def classes_of(messages: Sequence[Message]) -> tuple[str, ...]:
    """The labels that occur, in alphabetical order: class 0 is ham, class 1 is spam.

    Raises:
        ValueError: there are fewer than two.
    """
    classes = tuple(sorted({message.label for message in messages}))
    if len(classes) < 2:
        raise ValueError(
            f"A classifier needs messages of at least two labels; got only {', '.join(classes) or 'none'}."
        )
    return classes


def balance(messages: Sequence[Message], seed: int = BOOK_SEED) -> list[Message]:
    """As many messages of each label as the rarest has, drawn at random.

    For ham and spam with the book's seed these are the very rows of `create_balanced_dataset`.

    Args:
        messages: all messages.
        seed: of the draw.

    Returns:
        The drawn messages of the first label, of the second, and so on; a label with no surplus keeps its order.
    """
    fewest = min(Counter(message.label for message in messages).values())
    balanced = []
    for label in classes_of(messages):
        of_label = [message for message in messages if message.label == label]
        balanced += of_label if len(of_label) == fewest else [of_label[i] for i in _draw(len(of_label), fewest, seed)]
    return balanced


def split_messages(
    messages: Sequence[Item], train_frac: float, validation_frac: float, seed: int = BOOK_SEED
) -> tuple[list[Item], list[Item], list[Item]]:
    """Shuffle and cut: training, validation, test. With the book's seed, the very rows of `random_split`.

    Args:
        messages: all of them.
        train_frac, validation_frac: shares; the counts are rounded down, and the rest is for the test.
        seed: of the order.
    """
    shuffled = [messages[i] for i in _draw(len(messages), len(messages), seed)]
    train_end = int(len(shuffled) * train_frac)
    validation_end = train_end + int(len(shuffled) * validation_frac)
    return shuffled[:train_end], shuffled[train_end:validation_end], shuffled[validation_end:]


def split_instructions(
    data: Sequence[Item], train_frac: float = 0.85, test_frac: float = 0.1
) -> tuple[list[Item], list[Item], list[Item]]:
    """Cut in order, as chapter 7 does: training, validation, test; 1,100 entries become 935, 55 and 110.

    Args:
        data: the entries.
        train_frac, test_frac: shares; the counts are rounded down. The test part stands before the validation part.

    Returns:
        (training, validation, test).
    """
    train_end = int(len(data) * train_frac)
    test_end = train_end + int(len(data) * test_frac)
    return list(data[:train_end]), list(data[test_end:]), list(data[train_end:test_end])


def _parse_messages(text: str, where: str | os.PathLike[str]) -> list[Message]:
    # Quotes join lines and fields, as they do for pandas: the book's 5,572 messages stand on 5,574 lines.
    reader = csv.reader(io.StringIO(text), delimiter="\t")
    messages = []
    first = 1
    try:
        for fields in reader:
            line, message = "\t".join(fields), "\t".join(fields[1:])
            if line.strip():
                if len(fields) < 2 or not fields[0].strip() or not message.strip():
                    missing = "tab between label and text" if len(fields) < 2 else "label or no text"
                    raise ValueError(f"{where}, line {first} has no {missing}: {line[:80]!r}. Wanted: label<TAB>text.")
                messages.append(Message(fields[0].strip(), message))
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f'{where}, line {first}: {error}. Is there a quote (") at the start of a text and none after it?'
        ) from None
    if not messages:
        raise ValueError(f"{where} holds no messages. Wanted: label<TAB>text, one a line.")
    return messages


def _draw(total: int, count: int, seed: int) -> list[int]:
    # What pandas' sample(random_state=seed) draws; numpy promises that this generator never changes.
    return list(np.random.RandomState(seed).choice(total, size=count, replace=False))


def _asset(name: str) -> str:
    return resources.files("fastgpt").joinpath(f"assets/{name}").read_text(encoding="utf-8")
