"""From logits to the next token: greedy, or drawn after temperature, top_k and top_p, in the book's order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from fastgpt.generation.draws import draw


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token; above 0 draws, the higher the more freely.
        top_k: draw from the k likeliest tokens only (and those that tie with the last of them).
        top_p: draw from the smallest set of likeliest tokens whose probabilities reach top_p (and ties with the last).
        seed: draws by `draws.draw`: calls repeat, a row's tokens do not depend on the other rows, and all engines draw
            the same. None draws from torch's global generator, as the book does.

    Raises:
        TypeError, ValueError: an option is not usable; the text says what is wanted.

    Papers: Fan et al., "Hierarchical neural story generation", 2018 (top_k); Holtzman et al., "The curious case of
    neural text degeneration", 2020 (top_p).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature must be 0 (take the likeliest token) or a positive number; got {self.temperature}."
            )
        for name, value in (("top_k", self.top_k), ("seed", self.seed)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise TypeError(f"{name} must be a whole number or None; got {value!r}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is how many tokens may be drawn, at least 1; got {self.top_k}. None means all.")
        if self.top_p is not None:
            _check_number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p is a probability, above 0 and at most 1; got {self.top_p}.")

    @property
    def greedy(self) -> bool:
        """The likeliest token is taken, and nothing is drawn."""
        return self.temperature == 0

    @property
    def inverse_temperature(self) -> float:
        """What logits are multiplied by: 1 / temperature, at most the largest float32; 0 when greedy."""
        return 0.0 if self.greedy else min(1.0 / self.temperature, torch.finfo(torch.float32).max)

    def choose(self, logits: Tensor, drawn: int = 0) -> Tensor:
        """The next token of each row.

        Without a seed one torch.multinomial call on (batch, vocab_size) a step, in the dtype of the logits: from the
        same state of torch's global generator this draws the tokens that the book's `generate` draws.

        Args:
            logits: (batch, vocab_size).
            drawn: how many tokens were drawn before in each row; only a seed asks for it.

        Returns:
            (batch,) int64.

        Raises:
            ValueError: top_k is larger than the vocabulary.
        """
        if self.top_k is not None and self.top_k > logits.shape[-1]:
            raise ValueError(
                f"top_k is {self.top_k}, but there are only {logits.shape[-1]} tokens; use None for no limit."
            )
        if self.greedy:
            # The first index on ties.
            return logits.argmax(dim=-1)
        if self.seed is None:
            return torch.multinomial(self._probabilities(logits), num_samples=1).squeeze(1)
        top_k = None if self.top_k is None else int(self.top_k)
        top_p = None if self.top_p is None else float(self.top_p)
        return draw(logits, self.inverse_temperature, top_k, int(self.seed), drawn, top_p)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn with, (batch, vocab_size): 0 where top_k and top_p leave them out."""
        if self.top_k is not None:
            kth_best = torch.topk(logits, int(self.top_k)).values[:, -1:]
            logits = logits.masked_fill(logits < kth_best, -torch.inf)
        logits = logits / self.temperature
        logits = logits - logits.max(dim=-1, keepdim=True).values
        probabilities = torch.softmax(logits, dim=-1)
        return probabilities if self.top_p is None else _nucleus(probabilities, self.top_p)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Set to 0 what the likeliest tokens, together at least top_p, do not need. (batch, vocab_size) both."""
    ordered = probabilities.sort(dim=-1, descending=True).values
    total = ordered.cumsum(dim=-1, dtype=torch.promote_types(ordered.dtype, torch.float32))
    # A token is needed while those before it have not reached top_p; the first one always is.
    needed = (total - ordered < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    least = ordered.gather(1, needed - 1)
    return probabilities.masked_fill(probabilities < least, 0.0)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}.")
