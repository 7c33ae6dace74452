"""What a wrong prompt raises."""

from __future__ import annotations


class PromptError(ValueError):
    """Prompts that no model could read: empty, of the wrong shape or type."""


class OutOfRangeError(PromptError, IndexError):
    """Prompts that this model cannot read: an unknown token, or more tokens than its context.

    An IndexError too, since that is what the book's embeddings raise.
    """
