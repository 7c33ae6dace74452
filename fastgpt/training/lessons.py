"""Two small functions that chapter 5's notebook defines to show what temperature does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The notebook's vocabulary of nine words, in the order of their ids.
WORDS = ("closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you")

_DRAWS = 1_000


def softmax_with_temperature(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature): above 1 flatter, below 1 sharper.

    Args:
        logits: (n,), floating point.
        temperature: above 0.

    Returns:
        Probabilities, (n,).

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}. For the likeliest token use argmax.")
    return torch.softmax(logits / temperature, dim=0)


def print_sampled_tokens(probas: Tensor, inverse_vocab: Mapping[int, str] | None = None) -> None:
    """Draw 1,000 tokens and print how often each came, as in "73 x closer".

    Seeds torch's generator with 123, as the notebook does.

    Args:
        probas: probabilities, (n,).
        inverse_vocab: id to word; None for the notebook's nine words.
    """
    words = dict(enumerate(WORDS)) if inverse_vocab is None else inverse_vocab
    torch.manual_seed(123)
    # One draw at a time: drawing all at once would use the random numbers in another order.
    draws = torch.cat([torch.multinomial(probas, num_samples=1) for _ in range(_DRAWS)])
    for token, count in enumerate(torch.bincount(draws, minlength=len(probas)).tolist()):
        print(f"{count} x {words[token]}")
