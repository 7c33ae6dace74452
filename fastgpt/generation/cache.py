"""The keys and values of all tokens that were read: allocated ahead, grown by doubling, at most to the context."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CacheFormat(NamedTuple):
    """How the native decoder keeps the keys and values of a token: its code, the dtype of the buffer, and how many more
    of its numbers a row of head_dim has.
    """

    code: int
    dtype: torch.dtype
    more: int


# "int8": the row's largest magnitude becomes 127, and the float32 behind its numbers is what they are multiplied by.
CACHE_FORMATS: dict[torch.dtype | str, CacheFormat] = {
    torch.float32: CacheFormat(0, torch.float32, 0),
    torch.bfloat16: CacheFormat(1, torch.bfloat16, 0),
    "int8": CacheFormat(2, torch.int8, 4),
}


class Cache:
    """Keys and values of every layer, each (batch, n_heads, capacity, head_dim).

    What lies behind a row's length is undefined (it may be NaN) and must not be read.

    Args:
        n_layers, batch, n_heads, head_dim: sizes.
        limit: the largest length that will ever be needed.
        like: a tensor whose dtype and device the cache takes.

    Attributes:
        buffer: everything, (n_layers, 2, batch, n_heads, capacity, head_dim), contiguous.
        keys, values: its parts, one of each for every layer.
    """

    def __init__(self, n_layers: int, batch: int, n_heads: int, head_dim: int, limit: int, like: Tensor) -> None:
        self._shape = (n_layers, 2, batch, n_heads)
        self._head_dim = head_dim
        self._limit = limit
        self._like = like
        self.capacity = 0
        self.buffer = like.new_empty(*self._shape, 0, head_dim)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, length: int, spare: int = 0) -> None:
        """Make room for `length` tokens, keeping what is there; when it must grow, it at least doubles.

        Args:
            length: tokens that must fit.
            spare: more tokens that will probably follow.
        """
        if length <= self.capacity:
            return
        capacity = min(self._limit, max(length + spare, 2 * self.capacity))
        buffer = self._like.new_empty(*self._shape, capacity, self._head_dim)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            buffer[layer, 0, :, :, : self.capacity] = keys
            buffer[layer, 1, :, :, : self.capacity] = values
        self.capacity = capacity
        self.buffer = buffer
        self.keys = list(buffer[:, 0].unbind())
        self.values = list(buffer[:, 1].unbind())

    def write_prompt(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the first tokens of all rows: keys and values (batch, n_heads, n_tokens, head_dim)."""
        n_tokens = keys.shape[2]
        self.keys[layer][:, :, :n_tokens] = keys
        self.values[layer][:, :, :n_tokens] = values

    def write_token(self, layer: int, position: int | Tensor, keys: Tensor, values: Tensor) -> None:
        """Store one token of each row.

        Args:
            layer: whose keys and values these are.
            position: one for all rows, or (batch,) int64 on the device of the cache.
            keys, values: (batch, n_heads, head_dim).
        """
        if isinstance(position, int):
            self.keys[layer].select(2, position).copy_(keys)
            self.values[layer].select(2, position).copy_(values)
        else:
            rows = torch.arange(keys.shape[0], device=keys.device)
            self.keys[layer][rows, :, position] = keys
            self.values[layer][rows, :, position] = values
