"""Interleaved races, written as rows: `python -m benchmarks.rows [NAME ...]`.

A row holds what was timed, on which machine, with which versions and at which commit; README's figures come from rows
alone. NAME picks the cases whose name contains it; --out names the file (default: by instruction set).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastgpt
from benchmarks import cache_cases, cases, fusion_cases, model_cases
from fastgpt.memory import kept_memory
from fastgpt.ops import extension
from fastgpt.ops.linear.engines import processor
from fastgpt.timing import race

RESULTS = Path(__file__).parent / "results"


def commit_of_this_tree() -> str:
    """The commit that is checked out, with a mark when files differ from it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def circumstances() -> dict[str, object]:
    """What a figure depends on besides the code that it times."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit_of_this_tree(),
        "fastgpt": fastgpt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "isa": extension.load("cpu").isa(),
        "threads": torch.get_num_threads(),
    }


def rows_of(case: cases.Case, rounds: int) -> Iterator[dict[str, object]]:
    """Check, race, one row a provider."""
    case.check()
    # As in every training loop of fastgpt, for all providers alike: page faults would be most of what big tensors cost.
    with kept_memory():
        times = race(case.providers, rounds=rounds, min_time=0.02)
    scale = 1.0 if case.unit == "tokens/s" else 1e9
    base = next(iter(times))
    for provider, timing in times.items():
        yield {
            "case": case.name,
            "provider": provider,
            "rate": round(case.work / timing.median / scale, 1),
            "unit": case.unit,
            "ms": round(timing.median * 1e3, 4),
            "ms_quartiles": [round(timing.lower * 1e3, 4), round(timing.upper * 1e3, 4)],
            "rounds": timing.rounds,
            f"times_{base}": round(times[base].median / timing.median, 2),
        }


def all_cases() -> Iterator[cases.Case]:
    """Ops, then the whole model, then its cache."""
    yield from cases.op_cases()
    yield from fusion_cases.fusion_cases()
    yield from model_cases.model_cases()
    yield from cache_cases.cache_cases()


def main() -> None:
    """Race the chosen cases and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of case names; all without")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each provider (default 9)")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to; '-' only prints")
    args = parser.parse_args()
    about = circumstances()
    stem = f"cpu-{about['isa']}"
    out = args.out or RESULTS / f"{stem}.jsonl"
    for case in all_cases():
        if args.names and not any(name in case.name for name in args.names):
            continue
        print(case.name, file=sys.stderr)
        lines = [json.dumps({**row, **about}) for row in rows_of(case, args.rounds)]
        for line in lines:
            row = json.loads(line)
            print(f"  {row['provider']:<10}{row['rate']:>10} {row['unit']:<9} {row['ms']:>10} ms", file=sys.stderr)
        if str(out) != "-":
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
