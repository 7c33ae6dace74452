"""Token files: exact tokens, whole or not at all, damage is found; random batches that can be resumed."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.text import load_story
from fastgpt.token_file import HEADER_BYTES, RandomBatches, TokenFile, TokenFileError, _cuts
from fastgpt.tokenizer import ByteTokenizer, get_tokenizer

# Words, spaces, line ends, marks and the special token, so that pieces are cut in all kinds of places.
TEXTS = st.lists(
    st.sampled_from(
        ["the", " tide", "  ", "\n", "\n\n", "\t", " 漢", "é", "'s", "--", " 12", "\x1c", "\u00a0", "<|endoftext|>"]
    ),
    max_size=40,
).map("".join)


@pytest.fixture
def story_file(tmp_path: Path) -> TokenFile:
    return TokenFile.write(tmp_path / "story.tokens", load_story(), get_tokenizer("story"))


def test_a_file_holds_the_tokens_of_its_text(story_file: TokenFile) -> None:
    ids = get_tokenizer("story").encode(load_story())
    assert len(story_file) == len(ids)
    assert story_file[:].tolist() == ids
    assert story_file[3].item() == ids[3]
    assert story_file[-5:-2].tolist() == ids[-5:-2]
    assert story_file[:2].dtype == torch.int64


def test_a_file_knows_its_tokenizer(story_file: TokenFile) -> None:
    again = TokenFile(story_file.path)
    assert (again.vocab_size, again.tokenizer_name, again.array.dtype) == (1024, "story", np.dtype("<u2"))
    assert get_tokenizer(again.tokenizer_name).decode(again[:].tolist()) == load_story()


@given(TEXTS, st.integers(1, 12), st.sampled_from(["story", "byte"]))
@settings(max_examples=300, deadline=None)
def test_pieces_give_the_tokens_of_the_whole(text: str, size: int, name: str) -> None:
    tokenizer = get_tokenizer(name)
    pieces = [text[begin:end] for begin, end in _cuts(text, size)]
    assert "".join(pieces) == text
    ids = [i for piece in pieces for i in tokenizer.encode(piece, allowed_special={"<|endoftext|>"})]
    assert ids == tokenizer.encode(text, allowed_special={"<|endoftext|>"})


def test_pieces_give_gpt2s_tokens_of_the_whole(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(shared_data / "gpt2_bpe"))
    gpt2 = get_tokenizer("gpt2")
    text = (shared_data / "the-verdict.txt").read_text(encoding="utf-8") + load_story()
    file = TokenFile.write(tmp_path / "a.tokens", text, gpt2, chunk_characters=100)
    assert file[:].tolist() == gpt2.encode(text)


def test_documents_are_parted_by_end_of_text(tmp_path: Path) -> None:
    file = TokenFile.write(tmp_path / "a.tokens", iter(["ab", "", "c d"]), ByteTokenizer(), chunk_characters=1)
    assert file[:].tolist() == [97, 98, 256, 256, 99, 32, 100]


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    class Wide:
        n_vocab = 70_000

        def encode(self, text: str) -> list[int]:
            return [ord(c) + 69_000 for c in text]

    file = TokenFile.write(tmp_path / "a.tokens", "abc", Wide())
    assert (file.array.dtype, file.tokenizer_name) == (np.dtype("<u4"), "Wide")
    assert file[:].tolist() == [69_097, 69_098, 69_099]


@pytest.mark.parametrize("documents", [False, True])
def test_progress_counts_characters_up_to_the_total(tmp_path: Path, documents: bool) -> None:
    text = load_story()
    seen: list[tuple[int, int]] = []
    TokenFile.write(
        tmp_path / "a.tokens",
        [text, text] if documents else text,
        ByteTokenizer(),
        progress=lambda done, total: seen.append((done, total)),
        chunk_characters=5_000,
    )
    total = len(text) * (2 if documents else 1)
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert {n for _, n in seen} == {total}
    assert seen[-1][0] == total


def test_a_failed_write_leaves_the_old_file_and_nothing_else(story_file: TokenFile) -> None:
    class Breaks(ByteTokenizer):
        def encode(self, text: str, **options: Any) -> list[int]:
            if "slate" in text:
                raise RuntimeError("no more")
            return super().encode(text)

    before = story_file.path.read_bytes()
    with pytest.raises(RuntimeError, match="no more"):
        TokenFile.write(story_file.path, load_story(), Breaks(), chunk_characters=100)
    assert story_file.path.read_bytes() == before
    assert [path.name for path in story_file.path.parent.iterdir()] == ["story.tokens"]


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the text has no tokens"):
        TokenFile.write(tmp_path / "a.tokens", "", ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_ids_outside_the_tokenizers_own_vocabulary_are_refused(tmp_path: Path) -> None:
    class Lies(ByteTokenizer):
        n_vocab = 100

    with pytest.raises(ValueError, match="ids from 97 to 122, outside its vocabulary of 100"):
        TokenFile.write(tmp_path / "a.tokens", "az", Lies())


def reheadered(data: bytes, offset: int, field: bytes) -> bytes:
    """The file with one field of its header changed, and the header's checksum made to fit."""
    header = bytearray(data[:HEADER_BYTES])
    header[offset : offset + len(field)] = field
    header[-4:] = struct.pack("<I", zlib.crc32(bytes(header[:-4])))
    return bytes(header) + data[HEADER_BYTES:]


DAMAGE = {
    "other file": (lambda data: b"PK\x03\x04 a zip file", r"is not a token file: it begins with b'PK"),
    "empty": (lambda data: b"", r"is not a token file: it begins with b''"),
    "header cut": (lambda data: data[:40], r"is truncated: 40 bytes, fewer than its header of 64"),
    "tokens cut": (lambda data: data[:-3], r"is truncated: 11,485 bytes, wanted 11,488 for 5,712 tokens"),
    "tokens added": (lambda data: data + b"\0\0", r"is longer than its header says: 11,490 bytes, wanted 11,488"),
    "header bit": (lambda data: data[:20] + b"\x01" + data[21:], r"header does not match its own checksum"),
    "token bit": (lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:], r"CRC-32 of its tokens is"),
    "later version": (lambda data: reheadered(data, 8, b"\x02"), r"layout version 2 .* reads version 1"),
    "odd width": (lambda data: reheadered(data, 12, b"\x03"), r"with 3 bytes a token"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_file_is_refused_with_the_reason(story_file: TokenFile, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    data = story_file.path.read_bytes()
    bad = story_file.path.with_name("bad.tokens")
    bad.write_bytes(damage(data))
    with pytest.raises(TokenFileError, match=reason):
        TokenFile(bad)


def test_the_checksum_of_the_tokens_can_be_left_out(story_file: TokenFile) -> None:
    data = bytearray(story_file.path.read_bytes())
    data[99] ^= 1
    bad = story_file.path.with_name("bad.tokens")
    bad.write_bytes(data)
    assert len(TokenFile(bad, verify=False)) == len(story_file)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"TokenFile\.write makes one"):
        TokenFile(tmp_path / "none.tokens")


def test_a_file_pickles_as_its_path(story_file: TokenFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(TokenFile("story.tokens"))
    monkeypatch.chdir("/")
    assert len(data) < 500
    assert torch.equal(pickle.loads(data)[:], story_file[:])


def test_a_batch_is_rows_of_the_file_and_their_successors(story_file: TokenFile) -> None:
    inputs, targets = next(RandomBatches(story_file, 6, 16, seed=3))
    assert (inputs.shape, inputs.dtype, targets.dtype) == ((6, 16), torch.int64, torch.int64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    rows = story_file[:].unfold(0, 17, 1)
    for row in torch.cat([inputs, targets[:, -1:]], dim=1):
        assert (rows == row).all(dim=1).any()


def test_files_tensors_and_arrays_give_the_same_batches(story_file: TokenFile) -> None:
    sources = story_file, story_file[:], story_file.array
    batches = [next(RandomBatches(tokens, 4, 8, seed=1)) for tokens in sources]
    for batch in batches[1:]:
        assert torch.equal(batch[0], batches[0][0])


def test_batches_do_not_change_between_versions() -> None:
    # A checkpoint resumes by (seed, drawn): another stream would break every interrupted run.
    inputs, _ = next(RandomBatches(torch.arange(1000), 4, 2, seed=123))
    assert inputs[:, 0].tolist() == [991, 672, 701, 752]


@given(st.integers(0, 2**63 - 1), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_resumed_run_draws_the_same_batches(seed: int, before: int) -> None:
    tokens = torch.arange(500)
    whole = RandomBatches(tokens, 3, 5, seed=seed)
    for _ in range(before):
        next(whole)
    resumed = RandomBatches(tokens, 3, 5)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(3):
        assert torch.equal(next(resumed)[0], next(whole)[0])
    assert resumed.state_dict() == {"seed": seed, "drawn": before + 3}


def test_batches_differ_from_step_to_step_and_from_seed_to_seed() -> None:
    tokens = torch.arange(10_000)
    first = RandomBatches(tokens, 8, 4, seed=1)
    draws = [next(first)[0], next(first)[0], next(RandomBatches(tokens, 8, 4, seed=2))[0]]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_every_start_is_drawn_about_equally_often() -> None:
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]] = RandomBatches(torch.arange(12), 1000, 2, seed=7)
    counts = torch.bincount(torch.cat([next(batches)[0][:, 0] for _ in range(10)]), minlength=10)
    # 10,000 draws from 10 starts: mean 1,000, standard deviation 30; five of them.
    assert counts.shape == (10,)
    assert (counts - 1000).abs().max() < 150


def test_start_and_stop_keep_windows_inside(story_file: TokenFile) -> None:
    ids = story_file[:]
    batches = RandomBatches(ids, 64, 7, seed=5, start=100, stop=110)
    rows = ids[100:110].unfold(0, 8, 1)
    inputs, targets = next(batches)
    for row in torch.cat([inputs, targets[:, -1:]], dim=1):
        assert (rows == row).all(dim=1).any()


def test_a_run_of_exactly_one_row_is_enough() -> None:
    inputs, targets = next(RandomBatches(torch.arange(5), 2, 4))
    assert inputs.tolist() == [[0, 1, 2, 3]] * 2
    assert targets.tolist() == [[1, 2, 3, 4]] * 2


def test_too_few_tokens_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"got 4, wanted at least context_length \+ 1 = 5"):
        RandomBatches(torch.arange(4), 2, 4)


@pytest.mark.parametrize(("batch_size", "context_length"), [(0, 4), (2, 0)])
def test_sizes_below_one_are_refused(batch_size: int, context_length: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1; got {batch_size}, {context_length}"):
        RandomBatches(torch.arange(40), batch_size, context_length)


def test_tokens_of_two_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one run of ids, shape \(n_tokens,\); got shape \(2, 5\)"):
        RandomBatches(torch.zeros(2, 5, dtype=torch.int64), 1, 1)
