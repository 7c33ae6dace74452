"""How the Triton kernels get their tiles: rows of tables, and rows found by timing, which go before them.

`fastgpt bench --tune` times and writes the second kind to a file. It holds rows for one version of Triton, since
another may turn the order of the candidates round; read with another version it counts for nothing, and the tables
that come with fastgpt decide. Nothing is ever timed unasked.

    {"triton": "3.9.0", "tiles": {"attention_forward sm_90 16 64 plain": [128, 64, 4, 3, 0]}}

A key is: kernel, chip, bits of the dtype, width (head_dim or n, rounded up to a power of two), plain or dropout.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from fastgpt import env


class AttentionTile(NamedTuple):
    """Queries and keys of a tile, warps of a program, depth of the software pipeline, 1 to read by TMA descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: int = 0


class RowTile(NamedTuple):
    """Rows of a tile, its columns (0: a whole row), warps of a program, and, in a kernel whose programs stride over the
    rows, how many of them run on each multiprocessor (0: there are as many as tiles)."""

    rows: int
    columns: int
    num_warps: int
    programs: int = 0


Tile = AttentionTile | RowTile
Row = TypeVar("Row", AttentionTile, RowTile)

KERNELS: dict[str, type[AttentionTile] | type[RowTile]] = {
    "attention_forward": AttentionTile,
    "attention_backward_dq": AttentionTile,
    "attention_backward_dkdv": AttentionTile,
    "layer_norm_forward": RowTile,
    "layer_norm_backward": RowTile,
    "dropout_add_layer_norm_forward": RowTile,
    "dropout_add_layer_norm_backward": RowTile,
    "gelu_forward": RowTile,
    "gelu_backward": RowTile,
    "gelu_bias_forward": RowTile,
    "gelu_bias_backward": RowTile,
    "embedding_forward": RowTile,
    "embedding_backward": RowTile,
    "cross_entropy": RowTile,
}

_POWERS = tuple(1 << exponent for exponent in range(17))
# What a field may be.
ALLOWED: dict[str, tuple[int, ...]] = {
    "block_m": _POWERS[4:9],
    "block_n": _POWERS[4:9],
    "num_warps": _POWERS[:5],
    "num_stages": tuple(range(1, 9)),
    "tma": (0, 1),
    "rows": _POWERS[:8],
    "columns": (0, *_POWERS[4:]),
    "programs": tuple(range(65)),
}

# (chip, bits, width), with "dropout" behind them where it has a row of its own. "any" chip, 0 bits and a width of 0
# stand for all; a chip may have a version of Triton behind it, "sm_90@3.9".
Key = tuple[str, int, int] | tuple[str, int, int, str]

# How many times the best of a round are timed again, each time a third of them.
KEEP = 3

_forced: ContextVar[tuple[str, Tile] | None] = ContextVar("fastgpt_forced_tile", default=None)


def choose(kernel: str, table: Mapping[Key, Row], chip: str, bits: int, width: int, dropout: bool = False) -> Row:
    """The nearest row: forced, found by timing here, of this chip and Triton, of this chip, of any chip.

    Args:
        kernel: a name in KERNELS.
        table: rows that come with fastgpt; must have one for every case.
        chip: as `triton_support.chip` names it.
        bits, width: of the dtype, and of the row as a key has it.
        dropout: whether the kernel draws a mask.
    """
    forced = _forced.get()
    if forced is not None and forced[0] == kernel:
        return cast(Row, forced[1])
    found = _tiles().get(key(kernel, chip, bits, width, dropout))
    return cast(Row, found) if found else nearest(table, chip, bits, width, dropout)


def nearest(table: Mapping[Key, Row], chip: str, bits: int, width: int, dropout: bool) -> Row:
    """The row of a table that says most about this case."""
    version = ".".join(triton_version().split(".")[:2])
    for name in (f"{chip}@{version}", chip, "any"):
        for row_bits, row_width in ((bits, width), (0, width), (bits, 0), (0, 0)):
            own = table.get((name, row_bits, row_width, "dropout")) if dropout else None
            tile = own or table.get((name, row_bits, row_width))
            if tile is not None:
                return tile
    raise KeyError(f"the table has no row for any chip, {bits} bits and width {width}")


def key(kernel: str, chip: str, bits: int, width: int, dropout: bool) -> str:
    """How a row of the file is named."""
    return f"{kernel} {chip} {bits} {width} {'dropout' if dropout else 'plain'}"


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
        tiles = {name: checked(name, tile) for name, tile in content["tiles"].items()}
        version = content["triton"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of tiles ({error}); delete it, or write it anew with `fastgpt bench --tune`."
        ) from None
    return tiles if version == triton_version() else {}


def checked(name: str, values: Iterable[int]) -> Tile:
    """The tile of one row of the file.

    Raises:
        ValueError: the name is no key, or a value is none that its field may have.
    """
    parts = name.split(" ")
    if len(parts) != 5 or parts[0] not in KERNELS or not (parts[2] + parts[3]).isdecimal():
        raise ValueError(f"{name!r} names no kernel, chip, bits, width and plain or dropout")
    if parts[4] not in ("plain", "dropout"):
        raise ValueError(f"{name!r} must end with plain or dropout")
    kind, listed = KERNELS[parts[0]], list(values)
    if len(listed) != len(kind._fields):
        raise ValueError(f"{name!r} has {len(listed)} values, wanted {', '.join(kind._fields)}")
    for field, value in zip(kind._fields, listed, strict=True):
        if type(value) is not int or value not in ALLOWED[field]:
            raise ValueError(f"{field} of {name!r} is {value!r}, wanted one of {_shown(ALLOWED[field])}")
    return kind(*listed)


def _shown(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values)) if len(values) < 10 else f"{values[0]}, {values[1]}, ... {values[-1]}"


def write(path: Path, tiles: Mapping[str, Tile]) -> None:
    """Add rows to a file, over those of the same name."""
    content = {"triton": triton_version(), "tiles": {**read(path), **tiles}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    _tiles.cache_clear()


@functools.cache
def triton_version() -> str:
    """The version of Triton that is installed, or "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def search(
    candidates: Iterable[Row],
    seconds: Callable[[Row, int], float],
    *,
    rounds: int = 3,
    unusable: tuple[type[Exception], ...] = (),
) -> tuple[Row, float]:
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
        times: dict[Row, float] = {}
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
