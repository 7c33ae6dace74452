"""The tokenizers that the book builds by hand in chapter 2, for reading and for its examples.

For work use `fastgpt.get_tokenizer("gpt2")`: GPT-2's ids at the speed of tiktoken's compiled code.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgpt.bpe import (
    END_OF_TEXT,
    Pair,
    byte_alphabet,
    bytes_to_glyphs,
    fuse_pair,
    glyphs_to_bytes,
    gpt2_words,
    learn_merges,
    merge_in_order,
    parse_merges,
    split_special,
    to_utf8,
)

UNKNOWN = "<|unk|>"

_SPACED_WORD = re.compile(r" ?[^ \r\n]+|[ \r\n]")


class SimpleTokenizerV1:
    """Words and punctuation marks as tokens; a word outside the vocabulary is an error (section 2.3).

    Args:
        vocab: {token: id}.
    """

    _CUT = re.compile(r"""([,.:;?_!"()']|--|\s)""")
    _SPACE_BEFORE_MARK = re.compile(r"""\s+([,.?!"()'])""")

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self.str_to_int = vocab
        self.int_to_str = {i: token for token, i in vocab.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`; KeyError for a word that the vocabulary lacks."""
        return [self._id_of(word.strip()) for word in self._CUT.split(text) if word.strip()]

    def decode(self, ids: Iterable[int]) -> str:
        """Words joined by spaces, with none before a punctuation mark."""
        text = " ".join(self.int_to_str[int(i)] for i in ids)
        return self._SPACE_BEFORE_MARK.sub(r"\1", text)

    def _id_of(self, word: str) -> int:
        if word not in self.str_to_int:
            raise KeyError(f"{word!r} is not in the vocabulary of {len(self.str_to_int)} words")
        return self.str_to_int[word]


class SimpleTokenizerV2(SimpleTokenizerV1):
    """As V1, but a word outside the vocabulary becomes <|unk|>, which the vocabulary must hold (section 2.4)."""

    _SPACE_BEFORE_MARK = re.compile(r"""\s+([,.:;?!"()'])""")

    def _id_of(self, word: str) -> int:
        return super()._id_of(word if word in self.str_to_int else UNKNOWN)


class BPETokenizerSimple:
    """The book's bonus tokenizer of chapter 2: trains on a text, or loads GPT-2's files.

    Trained, its symbols are characters and a space is written "Ġ"; with OpenAI's files they are bytes, and `encode`
    gives exactly GPT-2's ids. Merges apply in the order learned, so `encode` cuts a training text as `train` did.

    Attributes:
        vocab: {id: token}.  inverse_vocab: {token: id}.
        bpe_merges: {(left id, right id): new id}.
        bpe_ranks: {(left token, right token): rank}, filled by OpenAI's files alone.
    """

    name = "bpe-simple"

    def __init__(self) -> None:
        self.vocab: dict[int, str] = {}
        self.inverse_vocab: dict[str, int] = {}
        self.bpe_merges: dict[Pair, int] = {}
        self.bpe_ranks: dict[tuple[str, str], int] = {}
        self._cache: dict[str, list[int]] = {}
        self._specials: list[str] = []

    @property
    def n_vocab(self) -> int:
        """Number of ids, from 0 to the largest."""
        return max(self.vocab, default=-1) + 1

    @property
    def eot_token(self) -> int | None:
        """Id of <|endoftext|>, or None."""
        return self.get_special_token_id(END_OF_TEXT)

    def train(self, text: str, vocab_size: int, allowed_special: Collection[str] | None = (END_OF_TEXT,)) -> None:
        """Learn a vocabulary of `vocab_size` tokens from `text` (fewer when the text runs out of pairs).

        Args:
            text: what to learn from.
            vocab_size: characters (at least 257), special tokens and merges together.
            allowed_special: special tokens that get an id of their own.
        """
        words = Counter(self.pretokenize_text(text))
        characters = dict.fromkeys([*map(chr, range(256)), *sorted(set().union(*words, "Ġ"))])
        specials = sorted(set(allowed_special or ()) - set(characters))
        self._set_vocab(dict(enumerate([*characters, *specials])))
        spelled = {tuple(self.inverse_vocab[c] for c in word): n for word, n in words.items()}
        self.bpe_ranks = {}
        self.bpe_merges = learn_merges(spelled, len(self.vocab), vocab_size - len(self.vocab))
        for (left, right), new_id in self.bpe_merges.items():
            self.vocab[new_id] = self.vocab[left] + self.vocab[right]
            self.inverse_vocab[self.vocab[new_id]] = new_id

    def encode(self, text: str, allowed_special: Collection[str] | None = None) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any text, of known characters when the vocabulary was trained on characters.
            allowed_special: special tokens ("<|...|>") that may stand in the text and become one id.

        Raises:
            ValueError: a special token that is not allowed, or a character that the vocabulary lacks.
        """
        allowed = set(allowed_special or ())
        missing = sorted(token for token in allowed if token in text and token not in self.inverse_vocab)
        if missing:
            raise ValueError(f"Special tokens not found in the vocabulary: {missing}; train with them first.")
        ids: list[int] = []
        for part, special in split_special(text, self._specials, allowed):
            if special:
                ids.append(self.inverse_vocab[part])
            else:
                for word in self._words(part):
                    ids.extend(self._encode_word(word))
        return ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn token ids back into text; ValueError for an id outside the vocabulary."""
        tokens = []
        for token_id in map(int, token_ids):
            if token_id not in self.vocab:
                raise ValueError(f"Token ID {token_id} not found in vocab, which has {len(self.vocab)} entries.")
            tokens.append(self.vocab[token_id])
        if self._byte_level():
            return glyphs_to_bytes("".join(tokens)).decode("utf-8", errors="replace")
        return "".join(" " + token[1:] if token.startswith("Ġ") else token for token in tokens)

    def tokenize_with_bpe(self, token: str) -> list[int]:
        """Ids of one word (space as "Ġ"), by merges alone."""
        unknown = sorted({c for c in token if c not in self.inverse_vocab})
        if unknown:
            raise ValueError(
                f"Characters not found in vocab: {unknown}. Train on a text that has them, or use a tokenizer that "
                'works on bytes: fastgpt.get_tokenizer("byte") or "gpt2".'
            )
        ids = [self.inverse_vocab[c] for c in token]
        return merge_in_order(ids, self.bpe_merges, self.bpe_merges.__getitem__)

    def save_vocab_and_merges(self, vocab_path: str | Path, bpe_merges_path: str | Path) -> None:
        """Write the vocabulary and the merges as two JSON files."""
        merges = [{"pair": list(pair), "new_id": new_id} for pair, new_id in self.bpe_merges.items()]
        for path, content in ((vocab_path, self.vocab), (bpe_merges_path, merges)):
            Path(path).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")

    def load_vocab_and_merges(self, vocab_path: str | Path, bpe_merges_path: str | Path) -> None:
        """Read what `save_vocab_and_merges` wrote."""
        self._set_vocab({int(i): token for i, token in _read_json(vocab_path).items()})
        self.bpe_ranks = {}
        self.bpe_merges = {
            (merge["pair"][0], merge["pair"][1]): merge["new_id"] for merge in _read_json(bpe_merges_path)
        }

    def load_vocab_and_merges_from_openai(self, vocab_path: str | Path, bpe_merges_path: str | Path) -> None:
        """Read GPT-2's encoder.json and vocab.bpe.

        Raises:
            KeyError: the files are not a byte-level vocabulary, or do not belong together.
        """
        self._set_vocab({i: token for token, i in _read_json(vocab_path).items()})
        if not self._byte_level():
            raise KeyError(f"{vocab_path} does not have GPT-2's line feed 'Ċ' at id 198; is it GPT-2's encoder.json?")
        pairs = parse_merges(Path(bpe_merges_path).read_text(encoding="utf-8"))
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(pairs)}
        ids = self.inverse_vocab
        self.bpe_merges = {(ids[left], ids[right]): ids[left + right] for left, right in pairs}

    def get_special_token_id(self, token: str) -> int | None:
        """Id of a token, or None."""
        return self.inverse_vocab.get(token)

    @staticmethod
    def pretokenize_text(text: str) -> list[str]:
        """Cut text into words: each takes one space before it, written "Ġ"; other spaces and line ends stand alone."""
        return [word.replace(" ", "Ġ") for word in _SPACED_WORD.findall(text)]

    @staticmethod
    def find_freq_pair(token_id_sequences: Iterable[Sequence[int]], mode: str = "most") -> Pair | None:
        """The most (or "least") frequent neighbouring pair; the first one among equals; None without pairs."""
        if mode not in ("most", "least"):
            raise ValueError(f"Invalid mode {mode!r}. Choose 'most' or 'least'.")
        counts = Counter(pair for ids in token_id_sequences for pair in zip(ids, ids[1:], strict=False))
        pick = max if mode == "most" else min
        return pick(counts, key=counts.__getitem__, default=None)

    @staticmethod
    def replace_pair(token_id_sequences: Iterable[Sequence[int]], pair_id: Pair, new_id: int) -> list[list[int]]:
        """Replace `pair_id` by `new_id` in each sequence."""
        return [fuse_pair(ids, pair_id, new_id) for ids in token_id_sequences]

    def _set_vocab(self, vocab: dict[int, str]) -> None:
        self.vocab = vocab
        self.inverse_vocab = {token: i for i, token in vocab.items()}
        self._cache = {}
        self._specials = [token for token in vocab.values() if token.startswith("<|") and token.endswith("|>")]

    def _byte_level(self) -> bool:
        # In a vocabulary of characters id 198 is chr(198); only GPT-2's byte alphabet has its line feed there.
        return self.vocab.get(198) == byte_alphabet()[10]

    def _words(self, text: str) -> list[str]:
        if self._byte_level():
            return [bytes_to_glyphs(to_utf8(word)) for word in gpt2_words(text)]
        return self.pretokenize_text(text)

    def _encode_word(self, word: str) -> list[int]:
        if word in self.inverse_vocab:
            return [self.inverse_vocab[word]]
        if word not in self._cache:
            self._cache[word] = self.tokenize_with_bpe(word)
        return self._cache[word]


class Encoder:
    """GPT-2's byte-pair encoder with the attributes of OpenAI's release (the book's bonus 02).

    Args:
        encoder: {token: id} of encoder.json.
        bpe_merges: the pairs of vocab.bpe in order.
        errors: what `decode` does with bytes that are not UTF-8, as in `bytes.decode`.
    """

    def __init__(
        self, encoder: Mapping[str, int], bpe_merges: Iterable[tuple[str, str]], errors: str = "replace"
    ) -> None:
        self.encoder = dict(encoder)
        self.decoder = {i: token for token, i in self.encoder.items()}
        self.errors = errors
        self.byte_encoder = byte_alphabet()
        self.byte_decoder = {glyph: byte for byte, glyph in self.byte_encoder.items()}
        self.bpe_ranks = {(left, right): rank for rank, (left, right) in enumerate(bpe_merges)}
        self.cache: dict[str, str] = {}

    def bpe(self, token: str) -> str:
        """The pieces of one word (in GPT-2's byte alphabet), with spaces between."""
        if token not in self.cache:
            self.cache[token] = " ".join(merge_in_order(token, self.bpe_ranks, "".join))
        return self.cache[token]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens are plain text here."""
        words = (bytes_to_glyphs(to_utf8(word)) for word in gpt2_words(text))
        return [self.encoder[piece] for word in words for piece in self.bpe(word).split(" ")]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of token ids."""
        glyphs = "".join(self.decoder[int(token)] for token in tokens)
        return glyphs_to_bytes(glyphs).decode("utf-8", errors=self.errors)


def get_encoder(model_name: str, models_dir: str | os.PathLike[str]) -> Encoder:
    """The `Encoder` of GPT-2's files in the folder `models_dir`/`model_name`.

    Raises:
        FileNotFoundError: encoder.json or vocab.bpe is not there.
    """
    folder = Path(models_dir) / model_name
    for name in ("encoder.json", "vocab.bpe"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; it must hold GPT-2's encoder.json and vocab.bpe.")
    merges = parse_merges((folder / "vocab.bpe").read_text(encoding="utf-8"))
    return Encoder(encoder=_read_json(folder / "encoder.json"), bpe_merges=merges)


def _read_json(path: str | os.PathLike[str]) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))
