"""The table of targets from rows: target, rival, ours, ratio, share of the limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: as the table names it.
        case, ours, rivals: whose rows are compared; against the best rival.
        ratio: wanted at least.
        limit: wanted share of the read limit, where there is one.
    """

    what: str
    case: str
    ours: str
    rivals: tuple[str, ...]
    ratio: float
    limit: float | None = None


TARGETS = (
    Target("float32, batch 1", "batch 1", "fastgpt-plain", ("llama.cpp", "ctranslate2"), 1.15, 0.85),
    Target("float32, batch 1, the book's cache", "batch 1", "fastgpt-plain", ("book-cache",), 3.5),
    Target("float32, batch 1, the book's generate", "batch 1", "fastgpt-plain", ("book",), 35.0),
    Target("bfloat16, batch 1", "batch 1", "fastgpt-bf16", ("llama.cpp-bf16", "transformers-bf16"), 1.2, 0.8),
    Target("8 bit, batch 1", "batch 1", "fastgpt-int8", ("llama.cpp-q8_0", "ctranslate2-int8"), 1.25),
    Target("4 bit, batch 1", "batch 1", "fastgpt-int4", ("llama.cpp-q4_0",), 1.2),
    Target("shortcuts, text that never repeats", "batch 1", "fastgpt", ("fastgpt-plain",), 1.25),
    Target("shortcuts, text that repeats itself", "batch 1", "fastgpt-repeat", ("fastgpt-plain-repeat",), 2.0),
    Target("float32, batch 8", "batch 8", "fastgpt", ("llama.cpp", "ctranslate2", "transformers-onednn"), 1.0),
    Target("bfloat16, batch 32", "batch 32", "fastgpt-bf16", ("llama.cpp-bf16", "transformers-bf16"), 3.0),
    Target("8 bit, batch 32", "batch 32", "fastgpt-int8", ("ctranslate2-int8", "llama.cpp-q8_0"), 1.63),
    Target("float32, prefill 512", "prefill 512", "fastgpt", ("ctranslate2", "llama.cpp", "transformers-onednn"), 1.25),
    Target("bfloat16, prefill 512", "prefill 512", "fastgpt-bf16", ("llama.cpp-bf16", "transformers-bf16"), 1.7),
    Target("8 bit, prefill 512", "prefill 512", "fastgpt-int8", ("ctranslate2-int8", "llama.cpp-q8_0"), 1.37),
    Target("generate_and_print_sample in training", "sample in training", "fastgpt-sample", ("book-sample",), 15.0),
)


def lines_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table's cells; a target whose rows are missing says which."""
    found = {(row["case"], row["engine"]): row for row in rows}
    table = []
    for target in TARGETS:
        ours = found.get((target.case, target.ours))
        rivals = [found[target.case, name] for name in target.rivals if (target.case, name) in found]
        if ours is None or not rivals:
            continue
        best = min(rivals, key=lambda row: row["ms"])
        ratio = best["ms"] / ours["ms"]
        share = ours.get("read_limit_share")
        missing = [name for name in target.rivals if (target.case, name) not in found]
        wanted = f"{target.ratio:g} x" + (f", {target.limit:.0%}" if target.limit else "")
        reached = ratio >= target.ratio and (target.limit is None or (share or 0.0) >= target.limit)
        table.append(
            [
                target.what,
                f"{best['engine']} {_speed(best)}" + (f" (without {', '.join(missing)})" if missing else ""),
                _speed(ours),
                f"{ratio:.2f} x",
                f"{share:.0%}" if share else "",
                wanted,
                "yes" if reached else "no",
            ]
        )
    return table


def _speed(row: dict[str, Any]) -> str:
    return f"{row['rate']:g}" if row["new"] > 1 else f"{row['ms']:.0f} ms"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print it as Markdown."""
    heads = ["GPT-2 124M", "best rival, tokens/s or ms", "ours", "ratio", "of the read limit", "target", "reached"]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for line in lines_of(rows):
        print("| " + " | ".join(line) + " |")
