"""The keys and values of the last conversation, for the next prompt that begins in the same way."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from fastgpt.generation.cache import Cache

# A shorter common beginning saves less than looking for it costs.
_MIN_SHARED = 16
# Pieces are read a little slower than whole prompts, so so many times the beginning may be left to read.
_MOST_LEFT = 4


@dataclass(frozen=True)
class _Kept:
    """A cache of one row, the tokens that it holds, and of which weights; `owner` keeps their memory in use."""

    cache: Cache
    ids: list[int]
    state: Any
    owner: Any


class PrefixStore:
    """At most one cache: that of the last finished run over a single prompt.

    A run takes it out, so that two runs never share it. Changed weights are seen by address and version counter; edits
    through `.data` are not, see `clear`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: _Kept | None = None

    def clear(self) -> None:
        """Forget the cache."""
        with self._lock:
            self._kept = None

    def put(self, cache: Cache, ids: list[int], state: Any, owner: Any) -> None:
        """Keep a cache that holds the keys and values of `ids`, computed with weights in this state."""
        with self._lock:
            self._kept = _Kept(cache, ids, state, owner)

    def take(self, ids: list[int], state: Any) -> tuple[Cache, int] | None:
        """A cache that holds the first tokens of `ids`, and how many; at least one token is left to be read."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None or kept.state != state:
            return None
        most = min(len(kept.ids), len(ids) - 1)
        shared = next((i for i in range(most) if kept.ids[i] != ids[i]), most)
        worth = shared >= _MIN_SHARED and len(ids) - shared <= _MOST_LEFT * shared
        return (kept.cache, shared) if worth else None
