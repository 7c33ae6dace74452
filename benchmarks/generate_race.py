"""Processes that take turns: one for each engine, and a probe of the memory's speed beside each sample."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent


class Probe:
    """Tells the read bandwidth of this moment, in GB/s. Needs g++."""

    def __init__(self, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        program = Path(self._folder.name, "probe")
        command = ["g++", "-O3", "-march=native", "-fopenmp", str(HERE / "probe.cpp"), "-o", str(program)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        self._process = subprocess.Popen(
            [str(program), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read_gbs(self) -> float:
        """GB/s now."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


class Worker:
    """One engine's process, started at once; `wait` tells when it is ready.

    Attributes:
        about: the engine's version and sizes; an "error" when it could not be made.
    """

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.generate_worker", name, str(folder), str(threads)]
        # Every engine's own threads come from OpenMP or from its argument; the variable is for the former.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.about: dict[str, Any] = {}

    def wait(self) -> None:
        """Wait until the engine is made."""
        self.about = self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"its process ended with {self._process.wait()}"}

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send a command and wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"error": "its process has ended"}
        return self._receive()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()


@dataclass
class Samples:
    """Seconds of one engine in one case, with the memory's speed beside each."""

    seconds: list[float] = field(default_factory=list)
    read_gbs: list[float] = field(default_factory=list)

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the seconds."""
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 3
        lower, median, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, median, upper

    def limit_share(self, bytes_a_run: float) -> float:
        """The median share of the read bandwidth that so many bytes in each sample's time are."""
        shares = [bytes_a_run / seconds / gbs / 1e9 for seconds, gbs in zip(self.seconds, self.read_gbs, strict=True)]
        return statistics.median(shares)


def take_turns(
    workers: list[Worker], commands: dict[str, dict[str, Any]], rounds: int, probe: Probe | None, warmup: int = 1
) -> dict[str, Samples]:
    """Each engine once a round, round after round. An engine that fails is left out from then on.

    Args:
        workers: who takes part.
        commands: worker's name -> what it does each time.
        rounds: samples of each.
        probe: asked before and after every sample.
        warmup: runs of each before the first round.
    """
    samples = {worker.name: Samples() for worker in workers}
    for number in range(-warmup, rounds):
        for worker in workers:
            if worker.name not in samples:
                continue
            before = probe.read_gbs() if probe is not None else float("nan")
            answer = worker.ask(commands[worker.name])
            after = probe.read_gbs() if probe is not None else float("nan")
            if "error" in answer:
                print(f"  {worker.name}: {answer['error']}", file=sys.stderr)
                del samples[worker.name]
            elif number >= 0:
                samples[worker.name].seconds.append(answer["seconds"])
                samples[worker.name].read_gbs.append((before + after) / 2)
    return {name: entry for name, entry in samples.items() if entry.seconds}
