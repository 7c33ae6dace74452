"""The layout that every layer_norm kernel reads: rows with a contiguous last axis."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x as (rows, n) with a contiguous last axis; a view where the layout allows, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()
