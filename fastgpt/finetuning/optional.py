"""Packages that only some of the chapters' helpers need, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = 'pip install "fastgpt[book]"'


def require(package: str, who: str) -> Any:
    """Import a package, or say how to get it.

    Args:
        package: its name.
        who: the function that needs it.

    Returns:
        The module.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{who} needs {package}, which is not installed: {INSTALL}") from error
