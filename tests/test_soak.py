"""A short soak; `make soak` runs 200,000 tokens, and has a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from soak import FORMATS, OVERFLOWS, soak

from fastgpt.memory import _glibc
from fastgpt.ops import extension

needs_extension = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))


@needs_extension
@pytest.mark.skipif(_glibc() is None, reason="the bound is for glibc's allocator")
def test_mixed_batches_do_not_make_the_process_grow():
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "20000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_extension
def test_a_soak_meets_every_format_and_overflow(one_thread):
    kinds = " ".join(soak(4000).kinds)
    assert all(word in kinds for word in (*FORMATS, *OVERFLOWS, "sampled", "stream"))
