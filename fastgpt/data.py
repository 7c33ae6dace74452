"""Chapter 2: text into training examples. The book's dataset and loader, and token files for longer texts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from fastgpt.text import load_story, read_text
from fastgpt.token_file import RandomBatches, TokenFile, TokenFileError
from fastgpt.tokenizer import encode_text, get_tokenizer

__all__ = [
    "GPTDatasetV1",
    "RandomBatches",
    "TokenFile",
    "TokenFileError",
    "TokenWindows",
    "create_dataloader_v1",
    "load_story",
    "read_text",
]

logger = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class TokenWindows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows over one run of tokens: inputs of `max_length` tokens, targets one token later.

        tokens     0 1 2 3 4 5 6 7 8        max_length 4, stride 3
        input 0    0 1 2 3
        target 0     1 2 3 4
        input 1          3 4 5 6
        target 1           4 5 6 7

    Windows begin at range(0, n_tokens - max_length, stride). Only the run is kept; an item is two views of it (copies
    for a `TokenFile`), so memory does not grow with the overlap.

    Args:
        tokens: (n_tokens,) int64, or a `TokenFile`.
        max_length: tokens a window.
        stride: tokens from one window to the next.

    Raises:
        ValueError: `max_length` or `stride` is below 1.
    """

    def __init__(self, tokens: torch.Tensor | TokenFile, max_length: int, stride: int) -> None:
        if max_length < 1 or stride < 1:
            raise ValueError(f"max_length and stride must be at least 1; got max_length={max_length}, stride={stride}.")
        self.tokens = tokens
        self.max_length = max_length
        self._starts = range(0, len(tokens) - max_length, stride)
        if not self._starts:
            logger.warning(
                "The dataset is empty: %d tokens, but one window of max_length=%d needs %d. "
                "Use a longer text or a smaller max_length.",
                len(tokens),
                max_length,
                max_length + 1,
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Window `idx`: input_ids and target_ids, each (max_length,) int64."""
        start = self._starts[idx]
        stop = start + self.max_length
        return self.tokens[start:stop], self.tokens[start + 1 : stop + 1]

    @functools.cached_property
    def input_ids(self) -> list[torch.Tensor]:
        """All inputs, as the list that the book's dataset keeps; made when first asked for."""
        return [self.tokens[start : start + self.max_length] for start in self._starts]

    @functools.cached_property
    def target_ids(self) -> list[torch.Tensor]:
        """All targets, as the list that the book's dataset keeps; made when first asked for."""
        return [self.tokens[start + 1 : start + self.max_length + 1] for start in self._starts]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process needs the run of tokens, not thousands of views of it.
        return {key: value for key, value in self.__dict__.items() if key not in ("input_ids", "target_ids")}


class GPTDatasetV1(TokenWindows):
    """The book's dataset: a text, encoded and cut into windows (see `TokenWindows`).

    Args:
        txt: the text; <|endoftext|> in it is one token.
        tokenizer: from `get_tokenizer`, or any object with `encode`.
        max_length: tokens a window.
        stride: tokens from one window to the next.

    Raises:
        ValueError: `max_length` or `stride` is below 1. A text that is too short gives an empty dataset and a warning.
    """

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int) -> None:
        super().__init__(torch.tensor(encode_text(tokenizer, txt), dtype=torch.int64), max_length, stride)


def _tokenizer_may_come_second(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Accept f(txt, tokenizer, batch_size, ...) too, as the book's later chapters write it."""

    @functools.wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if len(args) > 1 and hasattr(args[1], "encode"):
            kwargs["tokenizer"] = args[1]
            return function(args[0], *args[2:], **kwargs)  # type: ignore[arg-type]
        return function(*args, **kwargs)

    return wrapper


@_tokenizer_may_come_second
def create_dataloader_v1(
    txt: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    *,
    tokenizer: Any = None,
) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """The book's loader: batches of windows over a text.

    Random numbers are drawn as by the book's: only by torch's DataLoader, from torch's default generator.

    Args:
        txt: the text.
        batch_size: windows a batch.
        max_length: tokens a window.
        stride: tokens from one window to the next.
        shuffle: draw the windows in random order, anew in each epoch.
        drop_last: leave out a last batch that is smaller than the others.
        num_workers: worker processes; 0 loads in this process.
        tokenizer: None for GPT-2's, `get_tokenizer("gpt2")`. May also be given as second positional argument.

    Returns:
        A DataLoader over (input_ids, target_ids), each (batch_size, max_length) int64.

    Raises:
        ValueError: `max_length` or `stride` is below 1.
        VocabularyError: no tokenizer was given, and GPT-2's can be neither found nor downloaded.
    """
    dataset = GPTDatasetV1(txt, get_tokenizer("gpt2") if tokenizer is None else tokenizer, max_length, stride)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=num_workers)
