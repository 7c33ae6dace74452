"""The tokens of a pretraining run: opened, split into training and validation, cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.data import TokenFile, load_story, read_text
from fastgpt.token_file import HEADER_BYTES, MAGIC
from fastgpt.tokenizer import encode_text, get_tokenizer
from fastgpt.training.settings import PretrainSettings

TOKENS_NAME = "tokens.bin"


@dataclass(frozen=True)
class Corpus:
    """Tokens and what is known of them.

    Attributes:
        tokens: a token file, or (n_tokens,) int64.
        n_vocab, tokenizer_name: of the tokenizer that made them.
        fingerprint: tells one token file from another; "" for tokens in memory.
    """

    tokens: TokenFile | Tensor
    n_vocab: int
    tokenizer_name: str
    fingerprint: str

    def split(self, val_fraction: float) -> int:
        """Where the validation part begins: the last `val_fraction` of the tokens.

        Raises:
            ValueError: one of the parts has no token and target.
        """
        first = int(len(self.tokens) * (1 - val_fraction))
        if first < 2 or len(self.tokens) - first < 2:
            raise ValueError(
                f"{len(self.tokens)} tokens are too few to split: training and validation need at least 2 each. "
                "Use a longer text."
            )
        return first

    def load_tokenizer(self) -> Any:
        """The tokenizer that made the tokens."""
        return get_tokenizer(self.tokenizer_name)


def open_corpus(settings: PretrainSettings, progress: Callable[[int, int], None]) -> Corpus:
    """Open the token file that the settings name, or encode their text.

    A text is encoded into `out_dir/tokens.bin`, so that a resumed run reads the same tokens whatever becomes of the
    text; without an `out_dir` the tokens stay in memory.

    Args:
        settings: `data`, `tokenizer` and `out_dir` are read.
        progress: called as progress(characters done, characters in all).

    Raises:
        FileNotFoundError, ValueError: the file is missing, is not UTF-8, is damaged, or has another tokenizer.
    """
    if settings.data is not None and is_token_file(settings.data):
        corpus = open_token_file(settings.data)
        if settings.tokenizer not in ("auto", corpus.tokenizer_name):
            raise ValueError(
                f"{settings.data} was encoded with the tokenizer {corpus.tokenizer_name!r}, "
                f"not {settings.tokenizer!r}. Leave the tokenizer out, or encode the text again."
            )
        return corpus
    text = load_story() if settings.data is None else read_text(settings.data)
    tokenizer: Any = get_tokenizer(settings.tokenizer)
    if settings.out_dir is None:
        ids = torch.tensor(encode_text(tokenizer, text), dtype=torch.int64)
        return Corpus(ids, tokenizer.n_vocab, tokenizer.name, "")
    path = Path(settings.out_dir) / TOKENS_NAME
    TokenFile.write(path, text, tokenizer, progress=progress)
    return open_token_file(path)


def reopen_corpus(settings: PretrainSettings) -> Corpus:
    """Open the tokens of a run that is being resumed."""
    own = Path(settings.out_dir or "") / TOKENS_NAME
    return open_token_file(own if own.is_file() else settings.data or own)


def open_token_file(path: str | Path) -> Corpus:
    """A token file as a corpus."""
    tokens = TokenFile(path)
    # The header's own checksum covers the number of tokens and their checksum.
    fingerprint = _head(path, HEADER_BYTES)[-4:].hex()
    return Corpus(tokens, tokens.vocab_size, tokens.tokenizer_name, fingerprint)


def is_token_file(path: str | Path) -> bool:
    """Whether a file exists and begins as a token file does."""
    return Path(path).is_file() and _head(path, len(MAGIC)) == MAGIC


def validation_batches(
    tokens: TokenFile | Tensor, first: int, context: int, batch_size: int, limit: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens from `first` on as batches that predict each of them once: no overlap, no gap, no randomness.

    Args:
        tokens: all tokens.
        first: where the validation part begins.
        context: tokens a row; a last row that is shorter is a batch of its own.
        batch_size: rows a batch.
        limit: read only this many batches, spread evenly; None for all.

    Yields:
        (inputs, targets), each (rows, row length) int64.
    """
    n_targets = len(tokens) - first - 1
    rows = [(start, min(context, n_targets - start)) for start in range(0, n_targets, context)]
    ragged = rows.pop() if rows[-1][1] < context else None
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if ragged is not None:
        batches.append([ragged])
    if limit is not None and limit < len(batches):
        batches = [batches[i * len(batches) // limit] for i in range(limit)]
    for batch in batches:
        windows = torch.stack([tokens[first + start : first + start + length + 1] for start, length in batch])
        yield windows[:, :-1], windows[:, 1:]


def _head(path: str | Path, size: int) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(size)
