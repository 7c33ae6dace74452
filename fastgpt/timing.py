"""Fair timing: providers take turns, so that a noisy machine is noisy for all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median, lower, upper: median and quartiles over the rounds.
        rounds: how many.
    """

    median: float
    lower: float
    upper: float
    rounds: int


def race(
    providers: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    warmup: int = 2,
    min_time: float = 0.0,
    device: str = "cpu",
    after_round: Callable[[], Any] | None = None,
) -> dict[str, Timing]:
    """Time each provider once a round, round after round, and give medians with quartiles.

    Args:
        providers: name -> function of no arguments.
        rounds: samples of each provider.
        warmup: calls of each provider before the first round, at least 1.
        min_time: a sample repeats the call until it lasts this many seconds (as found in the warm-up).
        device: "cuda" waits for the device before the clock is read.
        after_round: called after every round, to show progress.

    Returns:
        name -> Timing, in seconds of one call.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def sample(function: Callable[[], Any], repeats: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        wait()
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name, function in providers.items():
        for _ in range(warmup - 1):
            function()
        repeats[name] = max(1, round(min_time / max(sample(function, 1), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, function in providers.items():
            samples[name].append(sample(function, repeats[name]))
        if after_round is not None:
            after_round()
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, len(values))
