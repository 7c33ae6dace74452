"""The chapter's own tokenizers: names and behaviour of the book, ids of GPT-2 where its files are loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.book.ch02 import BPETokenizerSimple, SimpleTokenizerV1, SimpleTokenizerV2, get_encoder
from fastgpt.bpe import byte_alphabet
from fastgpt.text import load_story, read_text

EDGE_CASES = {
    "Hello,": [15496, 11],
    "Implementations": [3546, 26908, 602],
    "asdf asdfasdf a!!, @aba 9asdf90asdfk": [
        *(292, 7568, 355, 7568, 292, 7568, 257, 3228, 11, 2488, 15498, 860, 292, 7568, 3829, 292, 7568, 74),
    ],
    "Hello, world. Is this-- a test?": [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30],
    "This is some text": [1212, 318, 617, 2420],
}


@pytest.fixture(scope="module")
def trained() -> BPETokenizerSimple:
    tokenizer = BPETokenizerSimple()
    tokenizer.train(load_story(), vocab_size=1000, allowed_special={"<|endoftext|>"})
    return tokenizer


@pytest.fixture
def gpt2_files(shared_data: Path) -> Path:
    return shared_data / "gpt2_bpe"


def words_of(text: str) -> dict[str, int]:
    """A vocabulary as section 2.3 of the book builds it."""
    words = sorted({word.strip() for word in re.split(r'([,.:;?_!"()\']|--|\s)', text) if word.strip()})
    return {word: i for i, word in enumerate([*words, "<|endoftext|>", "<|unk|>"])}


def test_v1_reads_and_writes_the_chapters_sentence(shared_data: Path) -> None:
    tokenizer = SimpleTokenizerV1(words_of(read_text(shared_data / "the-verdict.txt")))
    ids = tokenizer.encode('"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.')
    assert ids == [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851, 1108, 754, 793, 7]
    assert tokenizer.decode(ids) == '" It\' s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'


def test_v2_writes_unk_for_unknown_words(shared_data: Path) -> None:
    tokenizer = SimpleTokenizerV2(words_of(read_text(shared_data / "the-verdict.txt")))
    text = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of the palace."
    ids = tokenizer.encode(text)
    assert ids == [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7]
    assert tokenizer.decode(ids) == "<|unk|>, do you like tea? <|endoftext|> In the sunlit terraces of the <|unk|>."


def test_v1_and_v2_read_the_story() -> None:
    vocab = words_of(load_story())
    ids = SimpleTokenizerV1(vocab).encode("The tide came early, and the bar moved; so?")
    assert [list(vocab)[i] for i in ids] == [
        "The",
        "tide",
        "came",
        "early",
        ",",
        "and",
        "the",
        "bar",
        "moved",
        ";",
        "so",
        "?",
    ]
    # V1's decode leaves a space before a semicolon, V2's does not: the book's own difference.
    assert SimpleTokenizerV1(vocab).decode(ids) == "The tide came early, and the bar moved ; so?"
    assert SimpleTokenizerV2(vocab).decode(ids) == "The tide came early, and the bar moved; so?"


def test_v1_refuses_an_unknown_word() -> None:
    with pytest.raises(KeyError, match="'zebra' is not in the vocabulary of"):
        SimpleTokenizerV1(words_of(load_story())).encode("a zebra")


def test_training_fills_the_vocabulary_as_the_book_does(shared_data: Path) -> None:
    tokenizer = BPETokenizerSimple()
    tokenizer.train(read_text(shared_data / "the-verdict.txt"), vocab_size=1000, allowed_special={"<|endoftext|>"})
    # 256 characters, "Ġ", <|endoftext|> and the merges.
    assert (len(tokenizer.vocab), len(tokenizer.bpe_merges)) == (1000, 742)
    text = "Jack embraced beauty through art and life."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_on_the_story_fills_the_vocabulary(trained: BPETokenizerSimple) -> None:
    assert (len(trained.vocab), len(trained.bpe_merges), trained.n_vocab) == (1000, 742, 1000)
    assert (trained.vocab[256], trained.vocab[257], trained.eot_token) == ("Ġ", "<|endoftext|>", 257)
    assert trained.get_special_token_id("<|endoftext|>") == 257
    assert trained.get_special_token_id("<|none|>") is None


def test_training_gives_the_merges_of_the_books_loop() -> None:
    text = load_story()[:1500]
    tokenizer = BPETokenizerSimple()
    tokenizer.train(text, vocab_size=340)
    sequences = [[tokenizer.inverse_vocab[c] for c in word] for word in tokenizer.pretokenize_text(text)]
    for new_id in range(258, 340):
        pair = tokenizer.find_freq_pair(sequences, mode="most")
        assert tokenizer.bpe_merges[pair] == new_id
        sequences = tokenizer.replace_pair(sequences, pair, new_id)


def test_training_stops_when_no_pair_is_left() -> None:
    tokenizer = BPETokenizerSimple()
    tokenizer.train("aaaa", vocab_size=5000)
    assert list(tokenizer.bpe_merges) == [(97, 97), (258, 258)]
    assert tokenizer.encode("aaaa") == [259]


@given(st.text(alphabet=st.characters(codec="latin-1"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_trained_tokens_give_back_any_latin1_text(trained: BPETokenizerSimple, text: str) -> None:
    assert trained.decode(trained.encode(text, allowed_special={"<|endoftext|>"})) == text


def test_special_tokens_need_permission(trained: BPETokenizerSimple) -> None:
    text = "the tide<|endoftext|>the bar"
    with pytest.raises(ValueError, match="Disallowed special tokens"):
        trained.encode(text)
    ids = trained.encode(text, allowed_special={"<|endoftext|>"})
    assert ids == [*trained.encode("the tide"), 257, *trained.encode("the bar")]
    assert trained.decode(ids) == text
    with pytest.raises(ValueError, match=r"not found in the vocabulary: \['<\|pad\|>'\]"):
        trained.encode("<|pad|>", allowed_special={"<|pad|>"})


def test_unknown_characters_and_ids_are_named(trained: BPETokenizerSimple) -> None:
    with pytest.raises(ValueError, match=r"Characters not found in vocab: \['漢'\]"):
        trained.encode("a漢")
    with pytest.raises(ValueError, match="Token ID 1000 not found in vocab, which has 1000 entries"):
        trained.decode([1000])


def test_words_take_one_space_and_other_spaces_stand_alone() -> None:
    cut = BPETokenizerSimple.pretokenize_text("one  two \r\nthree ")
    assert cut == ["one", "Ġ", "Ġtwo", "Ġ", "\r", "\n", "three", "Ġ"]


def test_the_least_frequent_pair_can_be_asked_for() -> None:
    assert BPETokenizerSimple.find_freq_pair([[1, 2, 1, 2], [2, 3]], mode="least") == (2, 1)
    assert BPETokenizerSimple.find_freq_pair([[1], []]) is None
    with pytest.raises(ValueError, match="Choose 'most' or 'least'"):
        BPETokenizerSimple.find_freq_pair([], mode="median")


def test_a_saved_tokenizer_encodes_as_before(trained: BPETokenizerSimple, tmp_path: Path) -> None:
    paths = tmp_path / "vocab.json", tmp_path / "bpe_merges.txt"
    trained.save_vocab_and_merges(*paths)
    loaded = BPETokenizerSimple()
    loaded.load_vocab_and_merges(*paths)
    assert (loaded.vocab, loaded.bpe_merges) == (trained.vocab, trained.bpe_merges)
    assert loaded.encode(load_story()) == trained.encode(load_story())


def test_openais_files_give_gpt2s_ids(gpt2_files: Path) -> None:
    tokenizer = BPETokenizerSimple()
    tokenizer.load_vocab_and_merges_from_openai(gpt2_files / "encoder.json", gpt2_files / "vocab.bpe")
    assert (len(tokenizer.vocab), len(tokenizer.bpe_ranks), tokenizer.eot_token) == (50257, 50000, 50256)
    assert {text: tokenizer.encode(text) for text in EDGE_CASES} == EDGE_CASES
    for text in ("naïve café — 漢字 🌊\t\n\n  end ", load_story()[:2000]):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_get_encoder_reads_openais_folder(gpt2_files: Path) -> None:
    encoder = get_encoder(model_name="gpt2_bpe", models_dir=str(gpt2_files.parent))
    assert {text: encoder.encode(text) for text in EDGE_CASES} == EDGE_CASES
    assert encoder.bpe("ĠImplementations") == "ĠImplement ations"
    text = "naïve café — 漢字 🌊\t\n\n  end "
    assert encoder.decode(encoder.encode(text)) == text


@pytest.fixture
def small_files(tmp_path: Path) -> Path:
    """A vocabulary of 256 bytes and three merges, in OpenAI's two formats."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokens = [*byte_alphabet().values(), *(left + right for left, right in merges), "<|endoftext|>"]
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (tmp_path / "small" / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "small"


@pytest.mark.parametrize("kind", ["simple", "encoder"])
def test_files_of_our_own_in_openais_format_work_too(small_files: Path, kind: str) -> None:
    tokenizer = BPETokenizerSimple() if kind == "simple" else get_encoder("small", small_files.parent)
    if isinstance(tokenizer, BPETokenizerSimple):
        tokenizer.load_vocab_and_merges_from_openai(small_files / "encoder.json", small_files / "vocab.bpe")
    h, newline = list(byte_alphabet()).index(ord("h")), list(byte_alphabet()).index(10)
    assert tokenizer.encode("the the\nh") == [257, 258, newline, h]
    assert tokenizer.decode([257, 258, newline, h]) == "the the\nh"


def test_a_vocabulary_of_characters_is_not_taken_for_openais(trained: BPETokenizerSimple, tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text(json.dumps(trained.inverse_vocab))
    with pytest.raises(KeyError, match="line feed 'Ċ' at id 198"):
        BPETokenizerSimple().load_vocab_and_merges_from_openai(tmp_path / "encoder.json", tmp_path / "vocab.bpe")


def test_get_encoder_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no encoder\.json"):
        get_encoder("124M", tmp_path)
