"""Overruns, undefined behaviour and races of the CPU kernels: `make sanitize`. It needs GCC on Linux.

    memory    fastgpt._cpu built with AddressSanitizer and UndefinedBehaviorSanitizer (FASTGPT_SANITIZE=address), in
              build/sanitize, and the tests of the kernels run on it
    threads   tests/sanitize/decoder_threads.cpp built with ThreadSanitizer, and run

Each begins with a control: a planted overrun and a planted race must be reported, or nothing is believed.

Leaks are not looked for, as Python keeps blocks until it ends; the soak (tests/soak.py) watches the process's memory.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
CXX = os.environ.get("CXX", "g++")

TESTS = (
    "attention", "decode_attention", "layer_norm", "gelu", "linear", "dropout_add_layer_norm", "embedding",
    "linear_cross_entropy", "packed_causal_attention", "native_decoder", "native_packed", "native_prompt",
    "cache_dtype", "draws", "fast_head", "prompt_lookup", "philox", "extension", "memory", "buffers",
)  # fmt: skip
# Compilers under AddressSanitizer take minutes and run no kernel of ours; the others count page faults or resident
# memory, which it changes.
LEFT_OUT = ("compile", "opcheck", "triton", "cuda", "page_faults", "goes_back", "every_big_block", "hold_no_more",
            "user_has_tuned", "outermost", "hole")  # fmt: skip

# The bindings trust addresses, so a caller who tells a wrong size makes them read and write outside.
OVERRUN = """
import torch
from fastgpt.ops import extension
x, weight, out, mean = torch.ones(3, 64), torch.ones(64), torch.empty(3, 64), torch.empty(4)
cpu = extension.load("cpu")
cpu.layer_norm_forward(out.data_ptr(), mean.data_ptr(), mean.data_ptr(), x.data_ptr(), weight.data_ptr(),
                       weight.data_ptr(), ROWS, 64, 64, 1e-5, 0, 0, 1)
"""


def library(name: str) -> str:
    """Where the compiler keeps one of its runtime libraries."""
    done = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in the repository's root, what it says kept."""
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def fail(what: str, done: subprocess.CompletedProcess[str]) -> None:
    sys.exit(f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}\nsanitize: {what}")


def memory() -> None:
    """The tests of the kernels under AddressSanitizer."""
    done = run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD / "lib"),
         "--build-temp", str(BUILD / "temp")],
        FASTGPT_SANITIZE="address", FASTGPT_BUILD_CUDA="0",
    )  # fmt: skip
    if done.returncode:
        fail("the build failed", done)
    variables = {
        # The C++ library too, as the runtime looks for its exceptions when it starts.
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:handle_segv=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # This build and no other: the working directory is not looked into.
        "PYTHONPATH": str(BUILD / "lib"),
        "PYTHONSAFEPATH": "1",
    }
    for rows, bad in (("3", False), ("4", True)):
        done = run([sys.executable, "-c", OVERRUN.replace("ROWS", rows)], **variables)
        if ("AddressSanitizer: heap-buffer-overflow" in done.stderr) != bad or (done.returncode != 0) != bad:
            fail(f"control: layer_norm over {rows} of 3 rows should {'' if bad else 'not '}be reported", done)
    print("memory: the planted overrun is reported", flush=True)
    files = [f"tests/test_{name}.py" for name in TESTS]
    choice = " and ".join(f"not {word}" for word in LEFT_OUT)
    # -s, as a report ends the process, and what pytest keeps would be gone with it.
    options = ["-s", "-x", "-p", "no:cacheprovider", "--timeout=900", "-k", choice]
    command = [sys.executable, "-m", "pytest", *options, *files]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False).returncode
    if code:
        sys.exit(f"sanitize: memory: the tests ended with {code}; a report stands above")
    print("memory: clean", flush=True)


def threads() -> None:
    """The decoder under ThreadSanitizer."""
    BUILD.mkdir(parents=True, exist_ok=True)
    program = str(BUILD / "decoder_threads")
    vectors = ["-mavx2", "-mfma", "-mf16c"] if platform.machine() in ("x86_64", "AMD64") else []
    done = run(
        [CXX, "-std=c++17", "-O1", "-g", "-fsanitize=thread", *vectors, "-ffp-contract=fast", "-Wall", "-Wextra",
         "-Wno-psabi", "-Wno-unused-parameter", "-Wno-unused-function", "-Wno-unknown-pragmas",
         "tests/sanitize/decoder_threads.cpp", "-o", program, "-pthread"]
    )  # fmt: skip
    if done.returncode:
        fail("the build of decoder_threads failed", done)
    # Without this the runtime refuses kernels that scatter addresses widely.
    command = ["setarch", "-R", program]
    done = run([*command, "plant"])
    if "ThreadSanitizer: data race" not in done.stderr:
        fail("control: the planted race should be reported", done)
    print("threads: the planted race is reported", flush=True)
    done = run(command, TSAN_OPTIONS="halt_on_error=1")
    if done.returncode or done.stderr:
        fail("threads: a race, or other numbers on several threads", done)
    print(f"threads: {done.stdout.strip()}\nthreads: clean", flush=True)


def main() -> None:
    if not sys.platform.startswith("linux"):
        sys.exit("sanitize: it needs GCC on Linux")
    wanted = sys.argv[1:] or ["threads", "memory"]
    if unknown := set(wanted) - {"threads", "memory"}:
        sys.exit(f"sanitize: {sorted(unknown)} is not known; use threads, memory, or nothing for both")
    for name in wanted:
        {"threads": threads, "memory": memory}[name]()


if __name__ == "__main__":
    main()
