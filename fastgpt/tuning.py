"""Tile sizes found by timing: `fastgpt bench --tune` writes them to a file, the Triton attention takes them from there.

The file holds rows for one version of Triton, since another may turn the order of the candidates round; read with
another version it counts for nothing, and the tables that come with fastgpt decide. Nothing is ever timed unasked.

    {"triton": "3.9.0", "tiles": {"forward sm_90 16 64 plain": [128, 64, 4, 3]}}

A key is: kernel, chip, bits of the dtype, head_dim rounded up to a power of two, plain or dropout. A tile is: queries,
keys, warps, stages.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fastgpt import env

Tile = tuple[int, int, int, int]
# How many times the best of a round are timed again, each time a third of them.
KEEP = 3

_forced: ContextVar[tuple[str, Tile] | None] = ContextVar("fastgpt_forced_tile", default=None)


def lookup(kernel: str, chip: str, bits: int, block_d: int, dropout: bool) -> Tile | None:
    """The tile that was found for this kernel here, or None."""
    forced = _forced.get()
    if forced is not None and forced[0] == kernel:
        return forced[1]
    return _tiles().get(key(kernel, chip, bits, block_d, dropout))


def key(kernel: str, chip: str, bits: int, block_d: int, dropout: bool) -> str:
    """How a row of the file is named."""
    return f"{kernel} {chip} {bits} {block_d} {'dropout' if dropout else 'plain'}"


@contextmanager
def force(kernel: str, tile: Tile) -> Iterator[None]:
    """Let one kernel run with this tile inside the `with` block."""
    token = _forced.set((kernel, tile))
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _tiles() -> dict[str, Tile]:
    return read(env.tiles_file())


def read(path: Path) -> dict[str, Tile]:
    """The rows of a file; none where it does not exist or was written with another version of Triton.

    Raises:
        ValueError: the file is not what `fastgpt bench --tune` writes.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
        tiles = {str(name): _checked(tile) for name, tile in content["tiles"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of tiles ({error}); delete it, or write it anew with `fastgpt bench --tune`."
        ) from None
    return tiles if content["triton"] == triton_version() else {}


def _checked(tile: list[int]) -> Tile:
    block_m, block_n, num_warps, num_stages = tile
    powers = (block_m, block_n, num_warps)
    if not all(type(value) is int and value > 0 and value & (value - 1) == 0 for value in powers):
        raise ValueError(f"queries, keys and warps of {tile} must be powers of two")
    if min(block_m, block_n) < 16 or max(block_m, block_n) > 256 or num_warps > 16 or num_stages not in range(1, 9):
        raise ValueError(f"{tile} is outside 16 to 256 queries and keys, 1 to 16 warps, 1 to 8 stages")
    return block_m, block_n, num_warps, num_stages


def write(path: Path, tiles: dict[str, Tile]) -> None:
    """Add rows to a file, over those of the same name."""
    content = {"triton": triton_version(), "tiles": read(path) | tiles}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    _tiles.cache_clear()


def triton_version() -> str:
    """The version of Triton that is installed, or "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def search(
    candidates: Iterable[Tile],
    seconds: Callable[[Tile, int], float],
    *,
    rounds: int = 3,
    unusable: tuple[type[Exception], ...] = (),
) -> tuple[Tile, float]:
    """The fastest candidate: all are timed shortly, the best third again and longer, until one is left.

    Args:
        candidates: what to try, at least one.
        seconds: time of one call of a candidate, over so many rounds.
        rounds: of the first pass; each later pass has three times as many.
        unusable: what `seconds` raises for a candidate that this device cannot run.

    Returns:
        The tile, and its seconds in the last pass.

    Raises:
        ValueError: no candidate ran.
    """
    left = list(dict.fromkeys(candidates))
    while True:
        times: dict[Tile, float] = {}
        for tile in left:
            try:
                times[tile] = seconds(tile, rounds)
            except unusable:
                continue
        if not times:
            raise ValueError("no candidate runs on this device; the tables that come with fastgpt stay in use.")
        left = sorted(times, key=times.__getitem__)
        if len(left) == 1:
            return left[0], times[left[0]]
        left, rounds = left[: math.ceil(len(left) / KEEP)], rounds * 3
