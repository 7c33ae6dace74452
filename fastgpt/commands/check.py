"""`fastgpt check`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to check."""
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")


def run(args: argparse.Namespace) -> int:
    """Print one line a check; status 1 when any is red."""
    from fastgpt.check import run_checks

    failed = 0
    for result in run_checks(args.device):
        failed += not result.passed
        print(f"{'ok  ' if result.passed else 'FAIL'}  {result.name:<72} {result.detail}", flush=True)
    print(f"{failed} checks failed; please report this." if failed else "All equal to plain PyTorch within the bound.")
    return int(failed > 0)
