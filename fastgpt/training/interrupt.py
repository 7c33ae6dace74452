"""Ctrl-C that lets a training step finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM sets `made`; the second one raises KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, it does nothing.

    Args:
        on_first: called in the signal handler, so it must not take locks or use buffered output.
    """

    def __init__(self, on_first: Callable[[], None] | None = None) -> None:
        self.made = False
        self._on_first = on_first
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python; it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        if self._on_first is not None:
            self._on_first()
