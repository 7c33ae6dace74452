"""Guesses from the text so far: where its last tokens stood before, what followed them there may follow again.

The model reads a guess of k tokens in one step, which costs little more than reading one, and says at each place which
token it takes itself; the guess is good up to the first difference. So the tokens are the model's own, and several come
out of one step where the text repeats itself.

Paper: Leviathan et al., "Fast inference from transformers via speculative decoding", 2023; guesses from the prompt are
"prompt lookup decoding".
"""

from __future__ import annotations

from collections.abc import Sequence

# Last tokens that must have stood together before, the longest first.
_GRAMS = (3, 2)
_SHORTEST, _LONGEST = 2, 15
# After a guess that did not pay, so many tokens come without one; twice as many after each further one.
_FIRST_REST, _LONGEST_REST = 4, 128


class PromptLookup:
    """Finds guesses in one row of tokens, and decides whether guessing pays.

    Attributes:
        guessed, accepted: tokens of all guesses so far.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._length = 4
        self._rest = 0
        self._next_rest = _FIRST_REST
        self._worth = 1.0
        self.guessed = 0
        self.accepted = 0

    def __len__(self) -> int:
        """Tokens read."""
        return len(self._ids)

    def extend(self, tokens: Sequence[int]) -> None:
        """Read more of the row."""
        for token in tokens:
            place = len(self._ids)
            for n in _GRAMS:
                if place >= n:
                    self._after[tuple(self._ids[place - n :])] = place
            self._ids.append(token)
            self._rest = max(0, self._rest - 1)

    @property
    def resting(self) -> bool:
        """Guessing did not pay lately."""
        return self._rest > 0

    def guess(self, at_most: int) -> list[int]:
        """What may follow, up to `at_most` tokens; empty where nothing is known."""
        count = min(at_most, self._length)
        if count < 1 or self.resting:
            return []
        for n in _GRAMS:
            place = self._after.get(tuple(self._ids[-n:])) if len(self._ids) >= n else None
            if place is not None:
                found = self._ids[place : place + count]
                # At the end of the text the guess goes on in itself: a text that repeats its last tokens is a circle.
                period = len(self._ids) - place
                while len(found) < count:
                    found.append(found[len(found) - period])
                return found
        return []

    def learn(self, guessed: int, accepted: int, seconds: float, seconds_a_token: float | None) -> None:
        """Note how a guess went.

        Args:
            guessed, accepted: tokens of the guess, and how many were the model's own.
            seconds: what the step took.
            seconds_a_token: what a step without a guess takes, None where that is not known.
        """
        self.guessed += guessed
        self.accepted += accepted
        self._length = min(_LONGEST, 2 * guessed) if accepted == guessed else max(_SHORTEST, accepted + 1)
        gain = accepted + 1 if seconds_a_token is None else (accepted + 1) * seconds_a_token / max(seconds, 1e-9)
        self._worth = 0.6 * self._worth + 0.4 * gain
        if accepted:
            self._next_rest = _FIRST_REST
        if self._worth < 1.0:
            self._rest = self._next_rest
            self._next_rest = min(_LONGEST_REST, 2 * self._next_rest)
            self._worth = 1.0
