"""`fastgpt info`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace) -> int:
    """Print the report of `fastgpt.info()`."""
    from fastgpt.about import info

    print(info())
    return 0
