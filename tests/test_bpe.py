"""Learning and applying merges, against the naive loops."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.bpe import byte_alphabet, fuse_pair, learn_merges, merge_in_order, parse_merges, split_special, to_utf8
from fastgpt.teaching_tokenizers import BPETokenizerSimple
from fastgpt.text import load_story

WORDS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple), max_size=30)


def naive_merges(sequences: list[list[int]], first_id: int, n_merges: int) -> dict[tuple[int, int], int]:
    """The book's loop: count every pair of every sequence again in each round."""
    merges = {}
    for new_id in range(first_id, first_id + n_merges):
        pair = BPETokenizerSimple.find_freq_pair(sequences)
        if pair is None:
            break
        merges[pair] = new_id
        sequences = BPETokenizerSimple.replace_pair(sequences, pair, new_id)
    return merges


@given(WORDS, st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_learning_gives_the_merges_of_the_naive_loop(words: list[tuple[int, ...]], n_merges: int) -> None:
    want = naive_merges([list(word) for word in words], 4, n_merges)
    got = learn_merges(Counter(words), 4, n_merges)
    assert list(got.items()) == list(want.items())


def test_learning_from_a_text_gives_the_merges_of_the_naive_loop() -> None:
    text = load_story()[:3000]
    sequences = [list(word.encode()) for word in BPETokenizerSimple.pretokenize_text(text)]
    got = learn_merges(Counter(map(tuple, sequences)), 256, 120)
    assert list(got.items()) == list(naive_merges(sequences, 256, 120).items())


@given(WORDS)
@settings(max_examples=100, deadline=None)
def test_applying_merges_cuts_the_training_words_as_learning_did(words: list[tuple[int, ...]]) -> None:
    merges = learn_merges(Counter(words), 4, 12)
    for word in words:
        want = list(word)
        for pair, new_id in merges.items():
            want = fuse_pair(want, pair, new_id)
        assert merge_in_order(word, merges, merges.__getitem__) == want


def test_overlapping_pairs_fuse_from_the_left() -> None:
    assert fuse_pair([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]


def test_the_byte_alphabet_is_gpt2s() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert len(set(alphabet.values())) == 256
    assert (alphabet[ord(" ")], alphabet[ord("\n")], alphabet[0], alphabet[0xAD]) == ("Ġ", "Ċ", "Ā", "Ń")
    assert list(alphabet)[:2] == [ord("!"), ord('"')]


def test_merges_are_read_after_the_version_line() -> None:
    assert parse_merges("#version: 0.2\nĠ t\nh e\n") == [("Ġ", "t"), ("h", "e")]
    assert parse_merges("# #\nh e") == [("#", "#"), ("h", "e")]


def test_a_line_that_is_no_pair_is_named() -> None:
    with pytest.raises(ValueError, match="line 2 is 'a b c', not two tokens"):
        parse_merges("h e\na b c\n")


def test_text_is_cut_at_special_tokens_longest_first() -> None:
    parts = list(split_special("a<|x|><|xx|>b", ["<|x|>", "<|xx|>"], {"<|x|>", "<|xx|>"}))
    assert parts == [("a", False), ("<|x|>", True), ("<|xx|>", True), ("b", False)]


def test_a_special_token_that_is_not_allowed_raises() -> None:
    with pytest.raises(ValueError, match=r"Disallowed special tokens in the text: \['<\|x\|>'\].*allowed_special="):
        list(split_special("a<|x|>", ["<|x|>"], ()))


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    assert to_utf8("a\ud800b") == "a\ufffdb".encode()
