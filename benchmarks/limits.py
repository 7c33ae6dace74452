"""What this machine can do at most: `python -m benchmarks.limits` compiles limits.cpp and runs it."""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("limits.cpp")


@functools.cache
def measure(threads: int) -> dict[str, float]:
    """read_gbs, copy_gbs and fma_gflops of this many threads.

    Raises:
        RuntimeError: there is no compiler, or it does not take the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "limits")
        command = ["g++", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", str(SOURCE), "-o", str(program)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            done = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"limits.cpp could not be run: {getattr(error, 'stderr', '') or error}") from error
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(measure(torch.get_num_threads())))
