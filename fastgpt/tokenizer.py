"""Tokenizers: GPT-2's through tiktoken, found offline where possible, and two that need no download.

| name    | ids    | what                                                                              |
|---------|--------|-----------------------------------------------------------------------------------|
| "gpt2"  | 50,257 | GPT-2's byte-pair encoding, the book's tokenizer                                  |
| "story" | 1,024  | byte-pair encoding learned from the story that ships with fastgpt; takes any text |
| "byte"  | 257    | one id a byte; takes any text                                                     |
| "auto"  |        | "gpt2" when it is on this machine, else "byte"; never uses the network            |

The name of a tokenizer is the name that `get_tokenizer` gives it back for, so that a checkpoint can keep it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Set
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from fastgpt import env, vocabulary
from fastgpt.bpe import END_OF_TEXT, GPT2_PATTERN, gpt2_words, learn_merges, split_special, to_utf8
from fastgpt.text import load_story
from fastgpt.vocabulary import Ranks, VocabularyError

__all__ = [
    "END_OF_TEXT",
    "NAMES",
    "ByteTokenizer",
    "Tokenizer",
    "VocabularyError",
    "encode_text",
    "get_tokenizer",
    "text_to_token_ids",
    "token_ids_to_text",
]

NAMES = ("gpt2", "story", "byte", "auto")

STORY_N_VOCAB = 1024

logger = logging.getLogger(__name__)


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer of `get_tokenizer` offers; `tiktoken.Encoding` does."""

    name: str

    @property
    def n_vocab(self) -> int:
        """Number of ids: the model's vocab_size."""

    @property
    def eot_token(self) -> int:
        """Id of <|endoftext|>."""

    def encode(self, text: str, *, allowed_special: Literal["all"] | Set[str] = ...) -> list[int]:
        """Token ids of a text; special tokens that are not allowed raise ValueError."""

    def decode(self, tokens: Any) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""


def get_tokenizer(name: str = "auto") -> Tokenizer:
    """A tokenizer by its name.

    Args:
        name: "gpt2", "story", "byte" or "auto" (see the table of this module). Only "gpt2" may download, and only when
            the vocabulary is not on this machine and FASTGPT_OFFLINE is not set.

    Returns:
        For "gpt2" and "story" a `tiktoken.Encoding`, which pickles with its data: a spawned DataLoader worker neither
        downloads nor searches.

    Raises:
        ValueError: unknown name.
        VocabularyError: "gpt2" can neither be found nor downloaded; the text names the ways out.
    """
    if name == "gpt2":
        return _gpt2()
    if name == "story":
        return _story()
    if name == "byte":
        return ByteTokenizer()
    if name == "auto":
        return _auto()
    raise ValueError(f"No tokenizer is called {name!r}; choose one of: {', '.join(map(repr, NAMES))}.")


class ByteTokenizer:
    """One id a byte of UTF-8 (0 to 255), and <|endoftext|> = 256. Needs no data and takes any text."""

    name = "byte"
    n_vocab = 257
    eot_token = 256

    def __repr__(self) -> str:
        return "ByteTokenizer()"

    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
        disallowed_special: Literal["all"] | Collection[str] = "all",
    ) -> list[int]:
        """Ids of a text, with tiktoken's rules for special tokens.

        Args:
            text: any text.
            allowed_special: {"<|endoftext|>"} or "all" makes <|endoftext|> in the text one id.
            disallowed_special: () makes it thirteen plain bytes instead of an error.

        Raises:
            ValueError: <|endoftext|> is in the text and was not allowed.
        """
        if allowed_special == "all" or END_OF_TEXT in allowed_special:
            ids: list[int] = []
            for part, special in split_special(text, [END_OF_TEXT], [END_OF_TEXT]):
                ids.extend([self.eot_token] if special else to_utf8(part))
            return ids
        if disallowed_special == "all" or END_OF_TEXT in disallowed_special:
            next(split_special(text, [END_OF_TEXT], ()), None)
        return list(to_utf8(text))

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text in which <|endoftext|> is plain text."""
        return list(to_utf8(text))

    def decode(self, tokens: Iterable[int], errors: str = "replace") -> str:
        """Text of ids from 0 to 256.

        Args:
            tokens: ids.
            errors: what becomes of bytes that are not UTF-8, as in `bytes.decode`.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        data = bytearray()
        for token in map(int, tokens):
            if 0 <= token < 256:
                data.append(token)
            elif token == self.eot_token:
                data += END_OF_TEXT.encode()
            else:
                raise ValueError(
                    f"Token id {token} is outside the byte vocabulary of 257 ids. Was the model made with another "
                    "tokenizer? Its vocab_size must be tokenizer.n_vocab."
                )
        return data.decode("utf-8", errors=errors)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text in which <|endoftext|> stands for its own id, for any tokenizer that can `encode`.

    Args:
        tokenizer: its `encode` is given allowed_special={"<|endoftext|>"} when it takes that argument.
        text: any text.

    Returns:
        A list of ids.
    """
    if _takes_allowed_special(tokenizer.encode):
        return list(tokenizer.encode(text, allowed_special={END_OF_TEXT}))
    return list(tokenizer.encode(text))


def text_to_token_ids(text: str, tokenizer: Any) -> torch.Tensor:
    """Encode a text as a batch of one (chapter 5).

    Args:
        text: any text; <|endoftext|> in it becomes one id.
        tokenizer: from `get_tokenizer`, or any object with `encode`.

    Returns:
        (1, n_tokens) int64.
    """
    return torch.tensor(encode_text(tokenizer, text), dtype=torch.int64).unsqueeze(0)  # (1, T)


def token_ids_to_text(token_ids: torch.Tensor, tokenizer: Any) -> str:
    """Decode a batch of one (chapter 5).

    Args:
        token_ids: (1, n_tokens) or (n_tokens,), whole numbers.
        tokenizer: the one that encoded them.

    Returns:
        The text.

    Raises:
        ValueError: there are several rows.
    """
    if token_ids.ndim == 2 and token_ids.shape[0] == 1:
        token_ids = token_ids[0]
    if token_ids.ndim != 1:
        raise ValueError(
            f"token_ids_to_text decodes one row: wanted shape (1, n_tokens) or (n_tokens,), got "
            f"{tuple(token_ids.shape)}. For a batch call it with each row."
        )
    text: str = tokenizer.decode(token_ids.tolist())
    return text


def _takes_allowed_special(encode: Any) -> bool:
    try:
        return "allowed_special" in inspect.signature(encode).parameters
    except ValueError:
        # Built-in methods may not tell their arguments.
        return False


def _auto() -> Tokenizer:
    try:
        return _gpt2_found()
    except VocabularyError:
        if env.bpe_dir() is not None:
            raise
    logger.warning(
        'GPT-2\'s vocabulary is not on this machine; using the "byte" tokenizer. '
        'get_tokenizer("gpt2") downloads it once.'
    )
    return ByteTokenizer()


def _gpt2() -> Tokenizer:
    try:
        return _gpt2_found()
    except VocabularyError as error:
        if env.bpe_dir() is not None:
            raise
        return _gpt2_downloaded(str(error))


@functools.cache
def _gpt2_found() -> Tokenizer:
    ranks, path = vocabulary.find_gpt2_ranks()
    logger.info("GPT-2's vocabulary comes from %s", path)
    return _encoding("gpt2", ranks)


@functools.cache
def _gpt2_downloaded(searched: str) -> Tokenizer:
    return _encoding("gpt2", vocabulary.download_gpt2_ranks(searched))


@functools.cache
def _story() -> Tokenizer:
    words = Counter(tuple(to_utf8(word)) for word in gpt2_words(load_story()))
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in learn_merges(words, len(tokens), STORY_N_VOCAB - 1 - len(tokens)):
        tokens.append(tokens[left] + tokens[right])
    return _encoding("story", {token: i for i, token in enumerate(tokens)})


def _encoding(name: str, ranks: Ranks) -> Tokenizer:
    import tiktoken

    # Not entered into tiktoken's registry: a registered encoding pickles as its name alone, and a spawned worker would
    # then download the vocabulary.
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )
