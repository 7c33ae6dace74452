"""Reading text files, and the story that ships with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.text import load_story, read_text


def test_the_verdict_is_read_whole(shared_data: Path) -> None:
    assert len(read_text(shared_data / "the-verdict.txt")) == 20_479


def test_the_story_is_about_20_kb_of_ascii() -> None:
    story = load_story()
    assert 18_500 <= len(story.encode("ascii")) <= 21_500
    assert story.startswith("The Tide Clerk\n\nThe machine stood in the back room")
    assert story.endswith("The boy is waiting with the slate.\n")


def test_utf8_text_comes_back_as_written(tmp_path: Path) -> None:
    text = "plain, café, 漢字, 🌊\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_text(tmp_path / "a.txt") == text


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfHello")
    assert read_text(str(tmp_path / "a.txt")) == "Hello"


def test_line_ends_are_read_as_open_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\rthree\nfour\r\r\n")
    assert read_text(path) == path.open(encoding="utf-8").read() == "one\ntwo\nthree\nfour\n\n"


def test_a_byte_that_is_not_utf8_is_named_with_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("first\nsecond caf\u00e9 here\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: line 2, byte 11 .*\(byte 16 of the file\) is 0xe9"):
        read_text(tmp_path / "latin.txt")


def test_utf16_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "wide.txt").write_bytes("Hello".encode("utf-16"))
    with pytest.raises(ValueError, match="is UTF-16, not UTF-8"):
        read_text(tmp_path / "wide.txt")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_text(tmp_path)
