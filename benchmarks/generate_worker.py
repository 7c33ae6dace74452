"""One engine in a process of its own: reads one JSON command a line, answers with one line. generate.py starts it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import generate_engines


def answer(engine: generate_engines.Engine, command: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked, and tell how long it took and which tokens came."""
    started = time.perf_counter()
    if command["what"] == "sample":
        assert engine.sample is not None
        engine.sample()
        return {"seconds": time.perf_counter() - started}
    tokens = engine.generate(command["prompts"], command["n"])
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def main() -> None:
    """Serve until the input ends."""
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    # Libraries print what they like: only answers go to the pipe.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=pipe, flush=True)

    try:
        engine = generate_engines.make(name, folder, threads)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        send({"error": f"{type(error).__name__}: {error}"})
        return
    about = {"version": engine.version, "bytes": engine.bytes_a_token, "samples": engine.sample is not None}
    send(about)
    for line in sys.stdin:
        try:
            send(answer(engine, json.loads(line)))
        except (RuntimeError, ValueError, MemoryError) as error:
            send({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
