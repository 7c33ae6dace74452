"""What `accelerate` did, as a table for readers and as rows for programs."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_WIDTH = 100


@dataclass(frozen=True)
class Row:
    """One module that looked like a hot path.

    Attributes:
        path: its name in the model, as `named_modules` gives it; "" is the model itself.
        kind: "attention", "layer norm" or "GELU".
        swapped: it runs on fastgpt now.
        reason: which op it runs, or why it was left alone.
    """

    path: str
    kind: str
    swapped: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """The report of `fastgpt.accelerate(model)`; print it.

    Attributes:
        rows: one for every module that was recognised, in the order of the model.
        notes: sentences about the model as a whole.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[Row, ...]:
        """The modules that run on fastgpt."""
        return tuple(row for row in self.rows if row.swapped)

    @property
    def skipped(self) -> tuple[Row, ...]:
        """The modules that were left untouched, each with the reason."""
        return tuple(row for row in self.rows if not row.swapped)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Per kind of module: how many run on fastgpt, how many were found."""
        found = Counter(row.kind for row in self.rows)
        swapped = Counter(row.kind for row in self.swapped)
        return {kind: (swapped[kind], number) for kind, number in found.items()}

    def __str__(self) -> str:
        lines = [_headline(self), *self.notes]
        table = [
            (_join(group), first.kind, "yes" if first.swapped else "no", first.reason)
            for first, group in _groups(self.rows)
        ]
        if table:
            table.insert(0, ("module", "what", "fast", "how, or why not"))
            widths = [max(len(row[column]) for row in table) + 2 for column in range(3)]
            lines += ["", *(_line(row, widths) for row in table)]
        return "\n".join(lines)

    __repr__ = __str__


def _headline(report: Report) -> str:
    if not report.rows:
        return (
            "fastgpt found no attention, layer norm or GELU module here. Attention is recognised by its layers "
            "W_query, W_key, W_value, out_proj (or qkv, proj), layer norm by scale, shift (or weight, bias)."
        )
    parts = ", ".join(f"{swapped} of {found} {kind}" for kind, (swapped, found) in report.counts().items())
    return f"fastgpt runs {len(report.swapped)} of {len(report.rows)} modules: {parts}."


def _groups(rows: Iterable[Row]) -> list[tuple[Row, list[str]]]:
    """Rows that differ in the first number of their path alone (the block) are one line of the table."""
    groups: dict[tuple[str, str, bool, str], tuple[Row, list[str]]] = {}
    for row in rows:
        key = (re.sub(r"\d+", "#", row.path, count=1), row.kind, row.swapped, row.reason)
        groups.setdefault(key, (row, []))[1].append(row.path)
    return list(groups.values())


def _join(paths: list[str]) -> str:
    """ "blocks.0.att", "blocks.1.att", "blocks.3.att" to "blocks.0-1,3.att"."""
    if len(paths) == 1:
        return paths[0] or "(the model)"
    numbers = [int(match[0]) for path in paths if (match := re.search(r"\d+", path))]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return re.sub(r"\d+", text, paths[0], count=1)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    start = "".join(text.ljust(width) for text, width in zip(row[:3], widths, strict=True))
    reason = textwrap.wrap(row[3], max(40, _WIDTH - len(start)))
    return f"\n{' ' * len(start)}".join([start + reason[0], *reason[1:]]) if reason else start.rstrip()
