"""fastgpt._cpu itself: what its door refuses, and every instruction set of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from fastgpt.ops import extension

if extension.why_not("cpu"):
    pytest.skip(extension.why_not("cpu"), allow_module_level=True)

CPU = extension.load("cpu")
BIG = 2**62


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p: CPU.gelu_forward(0, p, 0, 1, 4, 0, 0, 1), "null pointer"),
        (lambda p: CPU.gelu_forward(p + 1, p, 0, 1, 4, 0, 0, 1), "misaligned"),
        (lambda p: CPU.gelu_forward(p, p, 0, 1, -1, 0, 0, 1), "negative or too large"),
        (lambda p: CPU.gelu_forward(p, p, 0, BIG, 4, 0, 0, 1), "negative or too large"),
        (lambda p: CPU.gelu_forward(p, p, 0, 1, 4, 7, 0, 1), "unknown dtype code"),
        (lambda p: CPU.gelu_forward(p, p, 0, 1, 4, 0, 0, 0), "num_threads"),
        (lambda p: CPU.gelu_forward(p, p, p, 1, 4, 0, 1, 1), "bfloat16 bias"),
        (lambda p: CPU.gelu_backward(p, 0, 0, p, 0, 1, 4, 0, 0, 1), "null pointer"),
        (lambda p: CPU.gelu_backward(p, 0, p, p, p, 1, 4, 0, 0, 1), "null pointer"),
        (lambda p: CPU.layer_norm_forward(p, p, p, p, p, p, BIG, 4, 4, 1e-5, 0, 0, 1), "too large"),
        (lambda p: CPU.layer_norm_forward(p, p, p, p, p, p, 1, 4, -4, 1e-5, 0, 0, 1), "negative"),
        (lambda p: CPU.layer_norm_forward(p, p, p, p, 0, p, 1, 4, 4, 1e-5, 0, 0, 1), "null pointer"),
        (lambda p: CPU.layer_norm_forward(p, p, p, p, p, p, 1, 4, 4, 1e-5, 0, 1, 1), "bfloat16 weight"),
        (lambda p: CPU.layer_norm_backward(p, p, p, p, p, p, p, p, 2**40, 2**40, 4, 4, 0, 0, 1), "too large"),
    ],
)
def test_the_door_refuses_what_would_be_a_bad_address(call, text):
    buffer = torch.zeros(64)
    with pytest.raises(ValueError, match=text):
        call(buffer.data_ptr())


def test_an_unknown_instruction_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="have no instruction set 'mmx'; they have: .*baseline"):
        CPU.select_isa("mmx")


def test_the_extension_links_no_torch():
    if sys.platform != "linux":
        pytest.skip("reads the shared libraries with ldd, which is Linux's")
    linked = subprocess.run(["ldd", CPU.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"lib(torch|c10|cudart)", linked), linked


def test_the_extension_shares_the_openmp_runtime_of_torch():
    if sys.platform != "linux" or not CPU.openmp:
        pytest.skip("this build has no OpenMP, or this is not Linux")
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "gomp" in line or "iomp" in line}
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("isa", CPU.available_isas())
def test_every_instruction_set_of_this_machine_passes_the_op_tests(isa):
    """The op tests again, in a process that runs on this instruction set."""
    if isa == CPU.isa():
        pytest.skip(f"{isa} is what the other tests run on")
    files = [f"tests/test_{op}.py" for op in ("layer_norm", "gelu", "attention", "decode_attention")]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not compile and not opcheck and not isa", "-x"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**os.environ, "FASTGPT_ISA": isa, "FASTGPT_REQUIRE": "cpu"},
        capture_output=True, text=True, check=False,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
