"""The test suite and the memory checker on a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What touches a GPU kernel: every test of an op takes its backends in turn.
GPU_TESTS = "triton or cuda"


def run_tests(dry_run: bool, budget: float) -> int:
    """The suite's GPU tests, with skips for want of a backend turned into failures. Returns pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "--tb=short", "-k", GPU_TESTS, "--timeout=60"]
    if dry_run:
        command += ["--collect-only", "-qq"]
        return subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode
    environment = {**os.environ, "FASTGPT_REQUIRE": "triton,cuda"}
    try:
        # Kernels are compiled on the CPU, and there are many of them.
        import xdist  # noqa: F401

        command += ["-n", "8"]
    except ImportError:
        pass
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=budget).returncode


def run_sanitizer(dry_run: bool, budget: float) -> int:
    """compute-sanitizer's memcheck over the attention kernels, forward and backward. Returns its exit code."""
    script = [sys.executable, "-m", "benchmarks.gpu.touch"]
    if dry_run:
        return subprocess.run([*script, "--device", "cpu"], cwd=ROOT, check=False, timeout=budget).returncode
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("compute-sanitizer is not installed here")
        return 3
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all", *script]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=budget).returncode
