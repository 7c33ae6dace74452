"""What ptxas makes of the sm_90a attention kernels: exponentials are taken while products are under way.

No emulator sees this, and ptxas likes to move the waits in front of the exponentials. Needs nvcc, and a cuobjdump: the
toolkit's, or the one that Triton brings. It compiles a few instances alone, in some ten seconds.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels" / "cuda"
SOURCE = """
#include "{kernels}/attention_backward_hopper.cuh"
#include "{kernels}/attention_hopper.cuh"
namespace fastgpt {{
namespace cuda {{
using T = __nv_bfloat16;
#define FORWARD(kD, kDropout) \\
  template __global__ void attention_forward_hopper_kernel<T, kD, kDropout>( \\
      const __grid_constant__ ForwardMaps, Heads<T>, float*, AttentionSizes, Dropout);
#define BACKWARD(kD, kKeys) \\
  template __global__ void attention_backward_hopper_kernel<T, kD, kKeys, false>( \\
      const __grid_constant__ GradientMaps, GradientCall<T>, Dropout);
FORWARD(64, false) FORWARD(128, false) FORWARD(64, true)
BACKWARD(64, false) BACKWARD(64, true) BACKWARD(128, false) BACKWARD(128, true)
}}
}}
"""
OPCODE = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
FORWARD = ("forward_hopper_kernelI13__nv_bfloat16Li64ELb0E", "forward_hopper_kernelI13__nv_bfloat16Li128ELb0E",
           "forward_hopper_kernelI13__nv_bfloat16Li64ELb1E")  # fmt: skip
BACKWARD = tuple(f"backward_hopper_kernelI13__nv_bfloat16Li{d}ELb{keys}E" for d in (64, 128) for keys in (0, 1))


def cuobjdump() -> str | None:
    """The path of cuobjdump, or None."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """ptxas' report, and the opcodes of each kernel by its mangled name."""
    nvcc, dump = shutil.which("nvcc"), cuobjdump()
    if nvcc is None or dump is None:
        pytest.skip("needs nvcc and cuobjdump")
    folder = tmp_path_factory.mktemp("sass")
    (folder / "kernels.cu").write_text(SOURCE.format(kernels=KERNELS))
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
    done = subprocess.run(
        [*command, "kernels.cu", "-o", "kernels.cubin"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = subprocess.run(
        [dump, "--dump-sass", "kernels.cubin"], cwd=folder, capture_output=True, text=True, check=True
    )
    kernels = {}
    for part in text.stdout.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        kernels[name.strip()] = [match.groups() for match in map(OPCODE.search, body.splitlines()) if match]
    return done.stdout + done.stderr, kernels


def intervals(kernels, name):
    """Of each stretch that a wait for products begins: how many groups that wait leaves, and its opcodes."""
    (opcodes,) = (opcodes for mangled, opcodes in kernels.items() if name in mangled)
    found = [(None, [])]
    for opcode, rest in opcodes:
        if opcode.startswith("WARPGROUP.DEPBAR"):
            found.append((int(rest.split(",")[1], 16), []))
        else:
            found[-1][1].append(opcode)
    return found


def exponentials(opcodes):
    return sum(opcode.startswith("MUFU.EX2") for opcode in opcodes)


def test_no_kernel_spills_and_no_product_is_serialized(compiled):
    report = compiled[0]
    assert set(re.findall(r"(\d+) bytes spill stores", report)) == {"0"}
    assert "serialized" not in report


@pytest.mark.parametrize("name", FORWARD)
def test_the_forward_takes_exponentials_beside_the_product_with_the_values(compiled, name):
    # Two loops, of whole and of masked blocks: 64 weights a thread.
    beside = [exponentials(opcodes) for left, opcodes in intervals(compiled[1], name) if left == 1]
    assert len(beside) == 2 and min(beside) >= 64


@pytest.mark.parametrize("name", BACKWARD)
def test_the_backward_takes_exponentials_beside_the_product_for_the_weights_gradient(compiled, name):
    found = intervals(compiled[1], name)
    beside = [exponentials(opcodes) for left, opcodes in found if left == 1]
    assert sum(beside) == sum(exponentials(opcodes) for _, opcodes in found) == 64
