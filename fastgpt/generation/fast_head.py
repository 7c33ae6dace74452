"""The screened head: an 8-bit copy of the head's weights that tells which logits can be the largest.

Only those are then multiplied in float32, so the tokens are the same, for a quarter of the bytes (the proof stands in
kernels/cpu/fast_head.h). The copy takes a quarter of the head's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import extension

# What kernels/cpu/decoder_args.h says.
MOST_TOP = 128
_STATS = 3
_UNIT = 64
_WIDEST = 65536
# 16 MiB: a smaller head may lie in the caches, where there is little to save.
_SMALLEST = 4 * 2**20
# GPT-2's copy takes 28 ms, and saves 2 ms a token (2 cores of an AMD EPYC, Zen 3).
_WORTH_TOKENS = 24


@dataclass(frozen=True)
class _Copy:
    """The copy, and what it is a copy of. The weight is kept, so that no other comes to lie at its address."""

    state: tuple[int, int, int]
    weight: Tensor
    rows: Tensor
    stats: Tensor


class HeadCopy:
    """The 8-bit copy of one weight at a time, made again when the weight has changed.

    Changes are seen by identity, address and version counter. An edit through `.data` is found when a logit falls
    outside what the copy allows, which is likely but not certain; `clear` makes it certain.
    """

    def __init__(self) -> None:
        self._copy: _Copy | None = None

    def clear(self) -> None:
        """Forget the copy."""
        self._copy = None

    def ready(self, weight: Tensor, n_tokens: int) -> bool:
        """Whether the copy is there or, for so many tokens, worth making."""
        copy = self._copy
        there = copy is not None and copy.state == _state(weight)
        return weight.numel() >= _SMALLEST and weight.shape[1] <= _WIDEST and (there or n_tokens >= _WORTH_TOKENS)

    def attach(self, decoder: Any, weight: Tensor) -> object:
        """Give a decoder (fastgpt._cpu.Decoder) the copy of its head.

        Args:
            decoder: with its head set to `weight`.
            weight: (n_logits, emb_dim) float32, contiguous, on the CPU.

        Returns:
            Something to keep for as long as the decoder runs.
        """
        copy = self._copy
        if copy is None or copy.state != _state(weight):
            copy = self._copy = _make(weight)
        decoder.set_screen(copy.rows.data_ptr(), copy.stats.data_ptr())
        return copy


def _make(weight: Tensor) -> _Copy:
    n_out, n_in = weight.shape
    state = _state(weight)
    rows = torch.empty(n_out, -(-n_in // _UNIT) * _UNIT, dtype=torch.int8, device="cpu")
    stats = torch.empty(n_out, _STATS, dtype=torch.float32, device="cpu")
    extension.load("cpu").screen_rows(
        rows.data_ptr(), stats.data_ptr(), weight.data_ptr(), n_out, n_in, extension.num_threads()
    )
    return _Copy(state, weight, rows, stats)


def _state(weight: Tensor) -> tuple[int, int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.numel()
