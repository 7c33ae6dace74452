"""Providers that live in processes of their own and take turns.

For what must not share a process: memory peaks, malloc settings, other engines' thread pools. A worker is a module run
as `python -m MODULE worker ARGUMENT...`, which calls `serve`. Only one worker works at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any


def serve(work: Callable[[], Any], about: Mapping[str, Any] | None = None) -> None:
    """The worker's side: say what is ready, then do the work once for each line that comes in.

    Args:
        work: called without arguments; what it returns goes back beside the seconds, so it must be JSON.
        about: facts for the first line.
    """
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True, **(about or {})}), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "result": result, "peak_mb": peak_mb()}), file=answers, flush=True)


def peak_mb() -> float:
    """The largest resident size of this process so far, in MB; 0 where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))
    except OSError:
        return 0.0


class WorkerError(RuntimeError):
    """A worker did not start or ended early; the text holds the end of what it printed."""


@dataclass
class Worker:
    """One provider's process.

    Attributes:
        name: the provider.
        process: talks in JSON lines.
        printed: the file that takes its standard error.
        about: what it said when it was ready.
        seconds, results, peaks: of each turn.
    """

    name: str
    process: subprocess.Popen[str]
    about: dict[str, Any]
    printed: IO[str]
    seconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        name: str,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> Worker:
        """Start `python -m module worker arguments...` and wait until it is ready.

        Raises:
            WorkerError: it ended instead.
        """
        # A file, not a pipe: nobody reads while the worker works, and a full pipe would stop it.
        printed = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        process = subprocess.Popen(
            [python, "-m", module, "worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        worker = cls(name, process, {}, printed)
        worker.about = worker._answer()
        return worker

    def turn(self, keep: bool = True) -> None:
        """Let it work once; a warm-up is not kept."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        if keep:
            self.seconds.append(answer["seconds"])
            self.results.append(answer["result"])
            self.peaks.append(answer["peak_mb"])

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.printed):
            if stream is not None:
                stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.printed.seek(0)
            text = self.printed.read().strip().splitlines()[-5:]
            raise WorkerError(f"{self.name} ended with {self.process.returncode}: {' | '.join(text)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def take_turns(
    workers: Sequence[Worker], rounds: int, warmup: int = 1, after_round: Callable[[], Any] | None = None
) -> None:
    """Each worker once a round, round after round; fills their lists."""
    for kept in [False] * warmup + [True] * rounds:
        for worker in workers:
            worker.turn(keep=kept)
        if after_round is not None and kept:
            after_round()
