"""The one error of unusable weight files."""

from __future__ import annotations


class WeightsError(ValueError):
    """A file of weights is damaged, truncated, of an unknown kind, or does not fit; nothing of it has been loaded."""
