"""Build, test and time everything on a GPU: `python -m benchmarks.gpu --out DIR`, in under nine minutes.

Each section is a process of its own with its own share of the time, so that a kernel that hangs or crashes costs its
section alone. Rows are appended to DIR/rows.jsonl as they come; what each section printed stands in DIR/<section>.log.
A short table comes last. `--dry-run` runs the whole harness on the CPU at tiny sizes: it proves the harness, and its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.table import summary

ROOT = Path(__file__).resolve().parents[2]

# Section -> seconds at most. The order is that of worth: what has never run comes first.
SECTIONS = {
    "build": 170,
    "environment": 30,
    "limits": 20,
    "tests": 170,
    "attention": 110,
    "fused": 80,
    "loss": 50,
    "decode": 110,
    "training": 120,
    "sanitizer": 90,
}


def run_section(name: str, out: Path, limit: float, dry_run: bool) -> str:
    """Run one section in a process of its own. Returns a line that says how it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name, "--out", str(out), "--budget", f"{limit:.0f}"]
    start = time.monotonic()
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command + ["--dry-run"] * dry_run, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        try:
            code = process.wait(timeout=limit)
            ended = "ok" if code == 0 else f"FAILED with {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"STOPPED after its {limit:.0f} s"
    line = f"{name:<12} {ended:<24} {time.monotonic() - start:6.1f} s"
    if ended != "ok":
        tail = (out / f"{name}.log").read_text("utf-8", errors="replace").strip().splitlines()[-6:]
        line += "".join(f"\n    {text[:200]}" for text in tail)
    return line


def work(name: str, out: Path, budget: float, dry_run: bool) -> int:
    """Be one section. Returns the exit code."""
    if name == "build":
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    if name == "tests":
        from benchmarks.gpu.checks import run_tests

        return run_tests(dry_run, budget)
    if name == "sanitizer":
        from benchmarks.gpu.checks import run_sanitizer

        return run_sanitizer(dry_run, budget)
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.sections import RUNNERS

    with Bench(out / "rows.jsonl", name, budget, dry_run) as bench:
        RUNNERS[name](bench)
    return 1 if bench.failures else 0


def main() -> int:
    """Run the chosen sections, then print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl and the logs")
    parser.add_argument(
        "--only", default="", metavar="NAMES", help=f"sections with commas between: {','.join(SECTIONS)}"
    )
    parser.add_argument("--skip", default="", metavar="NAMES", help="sections to leave out")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds in all (default 530)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to prove the harness")
    parser.add_argument("--section", choices=tuple(SECTIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        return work(args.section, args.out, args.budget, args.dry_run)
    unknown = {name for name in f"{args.only},{args.skip}".split(",") if name and name not in SECTIONS}
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are: {', '.join(SECTIONS)}")
    wanted = [n for n in SECTIONS if (not args.only or n in args.only.split(",")) and n not in args.skip.split(",")]
    end = time.monotonic() + args.budget
    lines = []
    for name in wanted:
        left = end - time.monotonic()
        if left < 5:
            lines.append(f"{name:<12} not begun: the time was up")
            continue
        lines.append(run_section(name, args.out, min(SECTIONS[name], left), args.dry_run))
        print(lines[-1], flush=True)
    rows_file = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()] if rows_file.exists() else []
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
