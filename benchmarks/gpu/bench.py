"""One section's clock, gate and rows."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import commit_of_this_tree

# Larger than any L2, so that a timed call finds it cold.
_FLUSH_BYTES = 256 * 2**20
_WARMUP_SECONDS = 0.15

Provider = Callable[[], Any]


class Bench:
    """Where a section's cases are checked, timed and written down.

    Args:
        rows: file of JSON lines to append to.
        section: the section's name.
        budget: seconds that the section has.
        dry_run: run on the CPU, at sizes that prove only the harness.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        failures: one text for each case that did not come about.
    """

    def __init__(self, rows: Path, section: str, budget: float, dry_run: bool) -> None:
        self.section, self.dry_run = section, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.failures: list[str] = []
        self._rows_path = rows
        self._end = time.monotonic() + budget - 3.0
        self._commit = commit_of_this_tree()
        self._flush = torch.empty(1 if dry_run else _FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def __enter__(self) -> Bench:
        self._file = self._rows_path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    @property
    def seconds_left(self) -> float:
        """Until this section must end."""
        return self._end - time.monotonic()

    def write(self, **row: Any) -> None:
        """Append one row, with what it depends on."""
        line = json.dumps({"section": self.section, **row, **self._circumstances()})
        self._file.write(line + "\n")
        self._file.flush()
        print(line, flush=True)

    def _circumstances(self) -> dict[str, Any]:
        triton = sys.modules.get("triton")
        return {
            "gpu": "dry run" if self.dry_run else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": getattr(triton, "__version__", None),
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "commit": self._commit,
        }

    def attempt(self, name: str, case: Callable[[], None]) -> None:
        """Run one case. One that fails is noted and the next goes on; after a CUDA error nothing can go on.

        Args:
            name: what is checked and timed.
            case: does it.
        """
        if self.seconds_left < 0:
            self.failures.append(name)
            self.write(case=name, error="the section's time was up")
            return
        try:
            case()
        except Exception as error:  # Whatever it is, it is this case's result.
            self.failures.append(name)
            traceback.print_exc()
            self.write(case=name, error=f"{type(error).__name__}: {error}"[:300])
            if "CUDA error" in str(error):
                raise
        finally:
            gc.collect()
            if not self.dry_run:
                torch.cuda.empty_cache()

    def race(self, providers: Mapping[str, Provider], rounds: int = 15, cold: bool = True) -> dict[str, list[float]]:
        """Milliseconds of each provider, one call a round in turns, by device events.

        Args:
            providers: name -> function of no arguments.
            rounds: calls of each.
            cold: empty the L2 before each call.
        """
        for provider in providers.values():
            self._warm_up(provider)
        times: dict[str, list[float]] = {name: [] for name in providers}
        for _ in range(3 if self.dry_run else rounds):
            for name, provider in providers.items():
                times[name].append(self._time_once(provider, cold))
        return times

    def _warm_up(self, provider: Provider) -> None:
        provider()
        self.wait()
        start = time.monotonic()
        while not self.dry_run and time.monotonic() - start < _WARMUP_SECONDS:
            provider()
            self.wait()

    def _time_once(self, provider: Provider, cold: bool) -> float:
        if self.dry_run:
            start = time.perf_counter()
            provider()
            return (time.perf_counter() - start) * 1e3
        if cold:
            self._flush.zero_()
        # The CPU runs ahead while this spins, so that launches are not part of what short kernels take.
        torch.cuda._sleep(100_000)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        provider()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event))

    def wait(self) -> None:
        """Until the device has done everything."""
        if not self.dry_run:
            torch.cuda.synchronize()

    def rows_of(
        self,
        case: str,
        times: Mapping[str, list[float]],
        work: float,
        unit: str,
        limit: float | None = None,
        target: str | None = None,
        **extra: Any,
    ) -> None:
        """One row a provider.

        Args:
            case: what was timed.
            times: from `race`.
            work: of one call, in what `unit` counts: bytes for GB/s, operations for TFLOP/s, tokens for tokens/s.
            unit: "GB/s", "TFLOP/s" or "tokens/s".
            limit: the most that this machine can do, in `unit`.
            target: the project's own, as text.
        """
        scale = {"GB/s": 1e9, "TFLOP/s": 1e12, "tokens/s": 1.0}[unit]
        for provider, samples in times.items():
            median = statistics.median(samples)
            rate = work / (median * 1e-3) / scale
            lower, _, upper = (
                statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
            )
            row = {"case": case, "provider": provider, "ms": round(median, 4), "rate": round(rate, 1), "unit": unit}
            row |= {"ms_quartiles": [round(lower, 4), round(upper, 4)]}
            if limit:
                row["percent_of_limit"] = round(100 * rate / limit, 1)
            self.write(**row, target=target, **extra)


def distance(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖; NaN never passes a comparison with it."""
    got, wide = got.detach(), truth.detach().double()
    return float((got.double() - wide).norm() / wide.norm().clamp_min(1e-30))


def gate(case: str, got: Tensor, naive: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """Raise unless `got` is at most `factor` times as far from the truth as PyTorch in the same dtype (plus 1e-3)."""
    error, allowed = distance(got, truth), factor * distance(naive, truth) + 1e-3
    if not error <= allowed:
        raise AssertionError(f"{case}: relative error {error:.2e}, allowed {allowed:.2e}")
