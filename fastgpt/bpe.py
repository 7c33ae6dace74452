"""Byte-pair encoding in plain Python: learning merges and applying them.

A merge joins two neighbouring symbols into one. Learning takes the most frequent pair again and
again; encoding applies the learned merges in the order in which they were learned. Long texts are
encoded by tiktoken (tokenizer.py); this is what learns the vocabulary of the story, and what the
book's bonus tokenizers (teaching_tokenizers.py) are made of.

Paper: Sennrich et al. (2016), "Neural Machine Translation of Rare Words with Subword Units".
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

END_OF_TEXT = "<|endoftext|>"

# GPT-2's split of text into words, which merges never cross (Radford et al., 2019). The possessive `++` only spares
# backtracking; what matches is the same.
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

Pair = tuple[int, int]
Symbol = TypeVar("Symbol", int, str)

_NEVER = 1 << 62


@functools.cache
def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's files, in the order of GPT-2's first 256 ids.

    Bytes that print as themselves in Latin-1 come first and stay; the others take the characters from U+0100 on, so
    a space is written "Ġ" and a line feed "Ċ".
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def gpt2_words(text: str) -> list[str]:
    """Cut text into the words that GPT-2's merges stay within; joined they give the text."""
    # tiktoken depends on `regex`, so it is there; only this module's slow paths need it.
    import regex  # type: ignore[import-untyped]

    words: list[str] = regex.findall(GPT2_PATTERN, text)
    return words


def to_utf8(text: str) -> bytes:
    """UTF-8 of any Python string: pairs of surrogates are joined, a lone one becomes U+FFFD, as in tiktoken."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def glyphs_to_bytes(glyphs: str) -> bytes:
    """Bytes of a token as GPT-2's files write it; KeyError for a character outside the alphabet."""
    return bytes(map(_byte_of_glyph().__getitem__, glyphs))


def bytes_to_glyphs(data: bytes) -> str:
    """A token's bytes as GPT-2's files write them."""
    return "".join(map(byte_alphabet().__getitem__, data))


@functools.cache
def _byte_of_glyph() -> dict[str, int]:
    return {glyph: byte for byte, glyph in byte_alphabet().items()}


def parse_merges(text: str) -> list[tuple[str, str]]:
    """The merges of a vocab.bpe or merges.txt: one pair a line, after a line that gives the version.

    Raises:
        ValueError: a line is not a pair.
    """
    merges = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise ValueError(f"line {number} is {line!r}, not two tokens with a space between")
        merges.append((left, right))
    return merges


def split_special(text: str, specials: Collection[str], allowed: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Cut text at its special tokens.

    Args:
        text: any text.
        specials: the special tokens of the vocabulary.
        allowed: those among them that may stand in the text.

    Yields:
        (part, whether it is a special token), without empty parts.

    Raises:
        ValueError: the text holds a special token that is not allowed.
    """
    present = [special for special in specials if special in text]
    forbidden = sorted(set(present) - set(allowed))
    if forbidden:
        raise ValueError(
            f"Disallowed special tokens in the text: {forbidden}. If they are meant as tokens, pass "
            f"allowed_special={set(forbidden)}."
        )
    if not present:
        parts = [text]
    else:
        longest_first = sorted(present, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    for index, part in enumerate(parts):
        if part:
            yield part, index % 2 == 1


def fuse_pair(symbols: Sequence[Symbol], pair: tuple[Symbol, Symbol], fused: Symbol) -> list[Symbol]:
    """Replace each occurrence of `pair` in `symbols`, from the left, by `fused`."""
    out: list[Symbol] = []
    i = 0
    while i < len(symbols):
        if i + 1 < len(symbols) and symbols[i] == pair[0] and symbols[i + 1] == pair[1]:
            out.append(fused)
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def merge_in_order(
    symbols: Sequence[Symbol],
    ranks: Mapping[tuple[Symbol, Symbol], int],
    fuse: Callable[[tuple[Symbol, Symbol]], Symbol],
) -> list[Symbol]:
    """Apply merges to one word, the earliest learned (lowest rank) first, until none applies."""
    merged = list(symbols)
    while len(merged) > 1:
        pair = min(zip(merged, merged[1:], strict=False), key=lambda p: ranks.get(p, _NEVER))
        if pair not in ranks:
            break
        merged = fuse_pair(merged, pair, fuse(pair))
    return merged


def learn_merges(words: Mapping[tuple[int, ...], int], first_id: int, n_merges: int) -> dict[Pair, int]:
    """Learn merges from words and their counts.

    The same merges as counting all pairs anew in each round, but a round only touches the words that hold the chosen
    pair. Among equally frequent pairs the one that occurs first wins, as in the book's `find_freq_pair`.

    Args:
        words: how often each word (its symbol ids) occurs, in the order of first occurrence.
        first_id: id of the first new symbol.
        n_merges: how many merges to learn; fewer come back when no pair is left.

    Returns:
        {(left id, right id): new id} in the order learned.
    """
    spelled = [list(word) for word in words]
    counts = list(words.values())
    pairs = _PairTable()
    for index, symbols in enumerate(spelled):
        pairs.add(index, symbols, counts[index])
    merges: dict[Pair, int] = {}
    for new_id in range(first_id, first_id + n_merges):
        pair = pairs.most_frequent(spelled)
        if pair is None:
            break
        merges[pair] = new_id
        for index in sorted(pairs.words_with[pair]):
            fused = fuse_pair(spelled[index], pair, new_id)
            pairs.remove(index, spelled[index], counts[index])
            pairs.add(index, fused, counts[index])
            spelled[index] = fused
    return merges


class _PairTable:
    """Counts of all neighbouring pairs, kept up to date word by word, with the pairs of each count at hand."""

    def __init__(self) -> None:
        self.count: Counter[Pair] = Counter()
        self.words_with: defaultdict[Pair, set[int]] = defaultdict(set)
        self._of_count: defaultdict[int, set[Pair]] = defaultdict(set)

    def add(self, word: int, symbols: Sequence[int], times: int) -> None:
        for pair, n in Counter(zip(symbols, symbols[1:], strict=False)).items():
            self._move(pair, n * times)
            self.words_with[pair].add(word)

    def remove(self, word: int, symbols: Sequence[int], times: int) -> None:
        for pair, n in Counter(zip(symbols, symbols[1:], strict=False)).items():
            self._move(pair, -n * times)
            self.words_with[pair].discard(word)

    def most_frequent(self, spelled: Sequence[Sequence[int]]) -> Pair | None:
        top = max((n for n, pairs in self._of_count.items() if pairs), default=0)
        if top == 0:
            return None

        def first_occurrence(pair: Pair) -> tuple[int, int]:
            word = min(self.words_with[pair])
            symbols = spelled[word]
            return word, next(i for i in range(len(symbols)) if (symbols[i], symbols[i + 1]) == pair)

        return min(self._of_count[top], key=first_occurrence)

    def _move(self, pair: Pair, change: int) -> None:
        old = self.count[pair]
        self._of_count[old].discard(pair)
        self.count[pair] = old + change
        if old + change:
            self._of_count[old + change].add(pair)
