"""The tokenizers of get_tokenizer: known ids, round trips, rules for special tokens, pickling, and stepping down."""

from __future__ import annotations

import logging
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken.load
import tiktoken.registry
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt.tokenizer as module
from fastgpt import vocabulary
from fastgpt.text import load_story, read_text
from fastgpt.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    VocabularyError,
    encode_text,
    get_tokenizer,
    text_to_token_ids,
    token_ids_to_text,
)

CHAPTER_2 = "Hello, do you like tea? <|endoftext|> In the sunlit terracesof someunknownPlace."


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without the vocabulary and without network."""
    for variable in ("FASTGPT_BPE_DIR", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "HF_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("FASTGPT_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(vocabulary, "WHEELS", ())
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", _no_network)
    monkeypatch.chdir(tmp_path)
    module._gpt2_found.cache_clear()
    module._gpt2_downloaded.cache_clear()
    yield
    module._gpt2_found.cache_clear()
    module._gpt2_downloaded.cache_clear()


def _no_network(path: str) -> bytes:
    raise AssertionError(f"the network was asked for {path}")


@pytest.fixture
def gpt2(offline: None, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(shared_data / "gpt2_bpe"))
    return get_tokenizer("gpt2")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, I am", [15496, 11, 314, 716]),
        ("Every effort moves you", [6109, 3626, 6100, 345]),
        ("<|endoftext|>", [50256]),
        (
            CHAPTER_2,
            [15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250, 8812, 2114, 1659]
            + [617, 34680, 27271, 13],
        ),
    ],
)
def test_gpt2_gives_the_books_ids(gpt2: Tokenizer, text: str, ids: list[int]) -> None:
    assert gpt2.encode(text, allowed_special={"<|endoftext|>"}) == ids
    assert gpt2.decode(ids) == text


def test_gpt2_cuts_the_verdict_into_5145_tokens(gpt2: Tokenizer, shared_data: Path) -> None:
    assert len(gpt2.encode(read_text(shared_data / "the-verdict.txt"))) == 5_145


def test_gpt2_has_the_names_and_numbers_of_tiktokens(gpt2: Tokenizer) -> None:
    assert (gpt2.name, gpt2.n_vocab, gpt2.eot_token) == ("gpt2", 50257, 50256)
    assert isinstance(gpt2, tiktoken.Encoding)


def test_gpt2_pickles_with_its_data(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(gpt2)
    monkeypatch.delenv("FASTGPT_BPE_DIR")
    assert pickle.loads(data).encode("Hello, I am") == [15496, 11, 314, 716]


def test_story_pickles_with_its_data(offline: None) -> None:
    story = get_tokenizer("story")
    assert pickle.loads(pickle.dumps(story)).encode(load_story()) == story.encode(load_story())


def test_gpt2_equals_tiktokens_own(
    gpt2: Tokenizer, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    # Copies: tiktoken deletes a cached file that it does not like.
    for name, sha1 in (
        ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
        ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    ):
        (cache / sha1).write_bytes((shared_data / "gpt2_bpe" / name).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    theirs = tiktoken.get_encoding("gpt2")
    texts = [
        load_story(),
        read_text(shared_data / "the-verdict.txt"),
        "I'll we've 'S it's they'd don't 12,345.6 x² ½ ٣ naïve 漢字 🌊 \t\t\n\n  a   \n  b  ",
        "    ",
        "a\u00a0b\u2003 c\x1cd\x85e",
    ]
    assert [gpt2.encode(text) for text in texts] == [theirs.encode(text) for text in texts]


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_story_gives_back_any_text(text: str) -> None:
    story = get_tokenizer("story")
    assert story.decode(story.encode(text, disallowed_special=())) == text


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_bytes_give_back_any_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_ordinary(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_story_is_a_small_vocabulary_that_shortens_the_story() -> None:
    story = get_tokenizer("story")
    assert (story.name, story.n_vocab, story.eot_token) == ("story", 1024, 1023)
    # 19,881 bytes: 3.5 a token.
    assert len(story.encode(load_story())) == 5_712


def test_storys_vocabulary_does_not_change() -> None:
    # Checkpoints keep only the name "story"; whoever changes the story must give the new vocabulary a new name.
    story = get_tokenizer("story")
    ranks = {story.decode_single_token_bytes(i): i for i in range(1023)}
    assert vocabulary.hash_of_ranks(ranks)[:16] == "deaead24e592779a"


@pytest.mark.parametrize("name", ["byte", "story"])
def test_special_tokens_follow_tiktokens_rules(name: str) -> None:
    tokenizer = get_tokenizer(name)
    text = "tide<|endoftext|>bar"
    with pytest.raises(ValueError, match="allowed_special"):
        tokenizer.encode(text)
    want = [*tokenizer.encode("tide"), tokenizer.eot_token, *tokenizer.encode("bar")]
    assert tokenizer.encode(text, allowed_special={"<|endoftext|>"}) == want
    assert tokenizer.encode(text, allowed_special="all") == want
    plain = tokenizer.encode(text, disallowed_special=())
    assert tokenizer.eot_token not in plain
    assert tokenizer.decode(plain) == tokenizer.decode(want) == text


def test_byte_tokens_are_bytes_and_one_end_of_text() -> None:
    tokenizer = get_tokenizer("byte")
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token) == ("byte", 257, 256)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 0xC3, 0xA9, 256]) == "aé<|endoftext|>"


def test_half_a_character_decodes_to_the_replacement_character() -> None:
    assert ByteTokenizer().decode([97, 0xC3]) == "a\ufffd"


@pytest.mark.parametrize("bad", [-1, 257, 50256])
def test_byte_tokens_outside_the_vocabulary_are_named(bad: int) -> None:
    with pytest.raises(ValueError, match=f"Token id {bad} is outside the byte vocabulary of 257 ids"):
        ByteTokenizer().decode([97, bad])


@pytest.mark.parametrize("name", ["byte", "story"])
def test_the_name_of_a_tokenizer_gives_it_back(name: str) -> None:
    assert get_tokenizer(get_tokenizer(name).name).encode("the tide") == get_tokenizer(name).encode("the tide")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="No tokenizer is called 'gpt5'; choose one of: 'gpt2', 'story', 'byte', 'auto'"
    ):
        get_tokenizer("gpt5")


def test_auto_is_gpt2_where_it_is_found(gpt2: Tokenizer) -> None:
    assert get_tokenizer() is gpt2


def test_auto_steps_down_to_bytes_without_asking_the_network(
    offline: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTGPT_OFFLINE", "0")
    with caplog.at_level(logging.WARNING, logger="fastgpt"):
        assert get_tokenizer("auto").name == "byte"
    assert len(caplog.records) == 1
    assert 'using the "byte" tokenizer' in caplog.text


@pytest.mark.parametrize("name", ["auto", "gpt2"])
def test_a_wrong_explicit_folder_is_never_passed_over(
    offline: None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(tmp_path))
    with pytest.raises(VocabularyError, match="FASTGPT_BPE_DIR=.* does not hold GPT-2's vocabulary"):
        get_tokenizer(name)


def test_gpt2_offline_says_what_was_wrong_where_and_the_ways_out(offline: None, tmp_path: Path) -> None:
    (tmp_path / "gpt2" / "124M").mkdir(parents=True)
    (tmp_path / "gpt2" / "124M" / "vocab.bpe").write_text("t h\n")
    with pytest.raises(
        VocabularyError, match=r"(?s)vocab\.bpe is another vocabulary.*FASTGPT_OFFLINE forbids.*Any one"
    ):
        get_tokenizer("gpt2")


def test_text_becomes_a_batch_of_one() -> None:
    ids = text_to_token_ids("aé<|endoftext|>", ByteTokenizer())
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[97, 0xC3, 0xA9, 256]]


@pytest.mark.parametrize("shape", [(1, 4), (4,)])
def test_a_batch_of_one_becomes_text(shape: tuple[int, ...]) -> None:
    ids = torch.tensor([97, 0xC3, 0xA9, 256]).reshape(shape)
    assert token_ids_to_text(ids, ByteTokenizer()) == "aé<|endoftext|>"


def test_one_token_becomes_text() -> None:
    assert token_ids_to_text(torch.tensor([[97]]), ByteTokenizer()) == "a"


def test_several_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decodes one row: wanted shape .* got \(2, 3\)"):
        token_ids_to_text(torch.zeros(2, 3, dtype=torch.int64), ByteTokenizer())


def test_tokenizers_without_allowed_special_are_called_plainly() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(c) for c in text]

    class Free:
        def encode(self, text: str, **options: object) -> list[int]:
            return [len(options)]

    assert encode_text(Letters(), "ab") == [97, 98]
    assert encode_text(Free(), "ab") == [0]
