"""Reads nvcc's -Xptxas=-v output from standard input and prints one line per kernel: registers, spills, shared memory.

Exits with status 1 when a kernel spills registers, which costs more than any tuning gains, or when ptxas serializes its
products of a warpgroup: waits for each before it starts the next.
"""

from __future__ import annotations

import re
import subprocess
import sys

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
SERIALIZED = re.compile(r"wgmma.*serialized due to (.*) (?:for|in) the function '(\S+)'")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def demangled(names: list[str]) -> list[str]:
    """C++ names as a person writes them, where c++filt is at hand."""
    try:
        done = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    return done.stdout.splitlines()


def main() -> int:
    """Print the table."""
    rows: list[list[str]] = []
    serialized: list[str] = []
    spills = "0"
    for line in sys.stdin:
        if match := ENTRY.search(line):
            rows.append([match[1], match[2]])
        elif match := SERIALIZED.search(line):
            serialized.append(f"products are serialized due to {match[1]}: {demangled([match[2]])[0]}")
        elif match := SPILL.search(line):
            spills = match[2]
        elif (match := USED.search(line)) and rows and len(rows[-1]) == 2:
            rows[-1] += [match[1], spills, match[2] or "0"]
    names = demangled([row[0] for row in rows])
    print(f"{'chip':8} {'registers':>9} {'spilled':>8} {'shared':>7}  kernel")
    for name, row in sorted(zip(names, rows, strict=True), key=lambda pair: (pair[1][1], pair[0])):
        print(f"{row[1]:8} {row[2]:>9} {row[3]:>8} {row[4]:>7}  {name}")
    for line in serialized:
        print(line)
    return int(any(row[3] != "0" for row in rows) or bool(serialized))


if __name__ == "__main__":
    sys.exit(main())
