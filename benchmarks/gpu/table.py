"""The short table at the end: what was reached, against the best rival and the limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

OURS = ("triton", "cuda", "fastgpt")


def is_ours(provider: str) -> bool:
    """True for providers of fastgpt."""
    return provider.split(" ")[0] in OURS


def summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line a case: our best provider, the best rival, their ratio (above 1 is faster), the share of the limit."""
    cases: dict[str, list[Mapping[str, Any]]] = {}
    errors = []
    for row in rows:
        if "error" in row:
            errors.append(f"  {row['case']}: {row['error'][:120]}")
        elif "provider" in row:
            cases.setdefault(row["case"], []).append(row)
    lines = [f"{'case':<58}{'ours':>22}{'best rival':>24}{'ratio':>7}{'limit':>7}  target"]
    for case, members in cases.items():
        ours = min((r for r in members if is_ours(r["provider"])), key=lambda r: r["ms"], default=None)
        rival = min((r for r in members if not is_ours(r["provider"])), key=lambda r: r["ms"], default=None)
        ratio = f"{rival['ms'] / ours['ms']:.2f}" if ours and rival else ""
        share = next((f"{r['percent_of_limit']:.0f}%" for r in (ours or rival,) if r and "percent_of_limit" in r), "")
        target = next((r["target"] for r in members if r.get("target")), "")
        lines.append(f"{case[:57]:<58}{_cell(ours):>22}{_cell(rival):>24}{ratio:>7}{share:>7}  {target}")
    if errors:
        lines += ["errors:", *errors]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None else f"{row['provider'][:12]} {row['rate']:g}"
