"""Rows of token ids of different lengths that grow by one token at a time, and the check of what a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.generation.errors import OutOfRangeError, PromptError

Prompts = Tensor | Sequence[Sequence[int] | Tensor]


class Rows:
    """Token rows, padded at the right.

    Args:
        prompts: (n_tokens,) int64 tensors, or one (batch, n_tokens) tensor.

    Attributes:
        ids: (batch, capacity) int64; what lies behind a row's length has no meaning, but is a token.
        lengths: (batch,) int64 on the CPU.
        longest: the largest of them.
        even: they are all equal, and stay so.
    """

    def __init__(self, prompts: Tensor | Sequence[Tensor]) -> None:
        if isinstance(prompts, Tensor):
            self.ids = prompts
            lengths = [prompts.shape[1]] * prompts.shape[0]
        else:
            self.ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
            lengths = [len(prompt) for prompt in prompts]
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        self.longest = max(lengths)
        self.even = min(lengths) == self.longest
        self._positions = self.lengths.to(self.ids.device)

    def append(self, tokens: Tensor) -> None:
        """Add one token, (batch,), to every row."""
        if self.longest == self.ids.shape[1]:
            # Doubling; and the prompt is the user's, so it is never written to.
            self.ids = torch.cat([self.ids, torch.zeros_like(self.ids)], dim=1)
        if self.even:
            self.ids[:, self.longest] = tokens
        else:
            self.ids[torch.arange(len(tokens), device=tokens.device), self._positions] = tokens
            self._positions = self._positions + 1
        self.lengths = self.lengths + 1
        self.longest += 1

    def extend(self, tokens: Tensor) -> None:
        """Add several tokens, (batch, n), to every row."""
        count = tokens.shape[1]
        if self.longest + count > self.ids.shape[1]:
            spare = self.ids.new_zeros(len(self.ids), max(count, self.ids.shape[1]))
            self.ids = torch.cat([self.ids, spare], dim=1)
        if self.even:
            self.ids[:, self.longest : self.longest + count] = tokens
        else:
            self.ids.scatter_(1, self._positions[:, None] + torch.arange(count, device=tokens.device), tokens)
            self._positions = self._positions + count
        self.lengths = self.lengths + count
        self.longest += count

    def newest(self) -> Tensor:
        """The last token of every row, (batch,)."""
        if self.even:
            return self.ids[:, self.longest - 1]
        return self.ids.gather(1, self._positions[:, None] - 1).squeeze(1)

    def from_positions(self, starts: Tensor) -> Tensor:
        """The rows from these positions on, (batch, widest), padded at the right."""
        begins = starts.tolist()
        if self.even and len(set(begins)) == 1:
            return self.ids[:, begins[0] : self.longest]
        ends = self.lengths.tolist()
        rows = [self.ids[i, begin:end] for i, (begin, end) in enumerate(zip(begins, ends, strict=True))]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def read_prompts(
    prompts: Any, device: torch.device | None, vocab_size: int | None = None, context_length: int | None = None
) -> Tensor | list[Tensor]:
    """Check prompts and bring them to the model's device as int64.

    Args:
        prompts: a (batch, n_tokens) tensor, or a list of prompts, each a list of ids or a (n_tokens,) tensor.
        device: the model's, or None to leave them where they are.
        vocab_size: ids must be below it, when given.
        context_length: prompts must not be longer, when given.

    Returns:
        A (batch, n_tokens) tensor for a tensor, a list of (n_tokens,) tensors for a list.

    Raises:
        TypeError: not token ids.
        PromptError: a wrong shape, or an empty prompt.
        OutOfRangeError: an id outside the vocabulary, or a prompt longer than the context.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2:
            raise PromptError(
                f"Prompts in one tensor must have shape (batch, n_tokens); got {tuple(prompts.shape)}. A single row "
                "becomes a batch of one with .unsqueeze(0); prompts of different lengths go into a list."
            )
        checked = _check_ids(prompts, "the prompts").to(device=device)
        _check_values(checked, "row", vocab_size, context_length)
        return checked
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise TypeError(
            "Prompts are token ids: a (batch, n_tokens) tensor or a list of prompts; got "
            f"{type(prompts).__name__}. Text is encoded first, for example with fastgpt.text_to_token_ids."
        )
    rows = [_read_one(prompt, i).to(device=device) for i, prompt in enumerate(prompts)]
    for i, row in enumerate(rows):
        _check_values(row[None], f"prompt {i}", vocab_size, context_length)
    return rows


def _read_one(prompt: Any, number: int) -> Tensor:
    what = f"prompt {number}"
    if isinstance(prompt, int | float):
        raise TypeError(
            f"A list of prompts holds one list of token ids per prompt, but item {number} is the number {prompt!r}; "
            "for a single prompt write [ids]."
        )
    if isinstance(prompt, str | bytes):
        raise TypeError(f"{what} is text; encode it first, for example with fastgpt.text_to_token_ids.")
    if not isinstance(prompt, Tensor):
        prompt = (
            torch.tensor(list(prompt), device="cpu") if len(prompt) else torch.empty(0, dtype=torch.int64, device="cpu")
        )
    if prompt.ndim != 1:
        raise PromptError(
            f"{what} must be one row of token ids, (n_tokens,); got shape {tuple(prompt.shape)}. "
            "Several rows of one length go in as one (batch, n_tokens) tensor."
        )
    return _check_ids(prompt, what)


def _check_ids(ids: Tensor, what: str) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"Token ids are whole numbers (torch.int64); {what} hold {ids.dtype}. Use .long() if they are.")
    if ids.shape[-1] == 0:
        raise PromptError(
            f"A prompt needs at least one token, but {what} have none; to start from nothing, begin with the "
            "end-of-text token (50256 for GPT-2)."
        )
    return ids.to(torch.int64)


def _check_values(ids: Tensor, what: str, vocab_size: int | None, context_length: int | None) -> None:
    if context_length is not None and ids.shape[1] > context_length:
        raise OutOfRangeError(
            f"{'The prompts have' if what == 'row' else what + ' has'} {ids.shape[1]} tokens, but the model reads at "
            f"most {context_length}; keep the last ones, [-{context_length}:], or call fastgpt.generate, which crops."
        )
    if vocab_size is None or ids.numel() == 0 or 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        return
    row, column = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
    where = f"row {row}" if what == "row" else what
    raise OutOfRangeError(
        f"Token id {int(ids[row, column])} at position {column} of {where} is outside the vocabulary, 0 to "
        f"{vocab_size - 1}; was another tokenizer used for the text?"
    )
