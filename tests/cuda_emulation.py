"""fastgpt._cuda compiled for the emulator of a thread block (tests/cuda_host), and ops that run on it.

All of csrc's CUDA sources are taken as C++ with the emulator's headers in the place of CUDA's, so that the same
bindings, launches and kernels run on tensors of the CPU. Compiled once for each content of the sources, into build/.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from fastgpt.ops import cuda_support, dispatch, extension

ROOT = Path(__file__).resolve().parents[1]
HOST = ROOT / "tests" / "cuda_host"
# -O1: kernels compile in a third of the time of -O2, and run as fast within the noise of the tests.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off")


def _compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"the emulator of CUDA kernels needs a C++ compiler; {compiler} was not found")
    return compiler


def _compile(sources: list[Path], extra: list[str], target: Path) -> None:
    """Compile each source, two at a time, and link them into a shared object."""
    compiler = _compiler()
    includes = [f"-I{HOST}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_one(source: Path) -> str:
        output = str(target.parent / f"{source.name}.o")
        command = [compiler, *FLAGS, *includes, *extra, "-x", "c++", "-c", str(source), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:5000]
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([compiler, "-shared", *objects, "-o", str(target)], check=True)


def compiled(sources: list[Path], extra: list[str] | None = None, kernels: str = "cuda") -> Path:
    """The shared object of these sources, from build/ where it is already there."""
    used = sorted([*HOST.iterdir(), *(ROOT / "kernels" / kernels).iterdir(), *(ROOT / "csrc").iterdir(), *sources])
    digest = hashlib.sha256()
    for part in (*(path.read_bytes() for path in used), repr((FLAGS, extra)).encode(), pybind11.__version__.encode()):
        digest.update(hashlib.sha256(part).digest())
    folder = ROOT / "build" / "emulated"
    target = folder / f"{digest.hexdigest()[:24]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, target.name)
            _compile(sources, extra or [], made)
            # Another process may have done the same; the last one wins, and both are whole.
            made.replace(target)
    return target


class Emulated:
    """The emulated module and its controls."""

    def __init__(self, target: Path) -> None:
        spec = importlib.util.spec_from_file_location("_cuda", target)
        assert spec is not None and spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._controls = ctypes.CDLL(str(target))
        self._controls.fastgpt_emulator_launches.restype = ctypes.c_int64

    def order(self, seed: int) -> None:
        """Run threads in another order."""
        self._controls.fastgpt_emulator_seed(ctypes.c_uint64(seed))

    def launches(self) -> int:
        """How many kernels were started so far."""
        return self._controls.fastgpt_emulator_launches()


def emulate() -> Emulated:
    """The module with all CUDA kernels of the package."""
    csrc = ROOT / "csrc"
    return Emulated(
        compiled([*sorted(csrc.glob("cuda_*.cpp")), *sorted(csrc.glob("*_cuda.cu")), HOST / "controls.cpp"])
    )


@contextmanager
def as_cuda_backend(emulated: Emulated, *ops: dispatch.Op, hopper: bool = False) -> Iterator[None]:
    """Inside, backend="cuda" of these ops takes tensors of the CPU and runs in the emulator; hopper: of a chip that
    runs the kernels of sm_90a."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_support, "extension", _Extension(emulated.module))
        patch.setattr(cuda_support, "chip", lambda: None)
        patch.setattr(cuda_support, "runs_sm90a", lambda index: hopper)
        patch.setattr(cuda_support, "device_of", lambda tensor: nullcontext())
        patch.setattr(cuda_support, "stream", lambda: 0)
        patch.setattr(cuda_support, "DEVICE", "cpu")
        for op in ops:
            patch.setattr(op, "_chosen", {})
        yield


class _Extension:
    """Stands in for fastgpt.ops.extension."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def why_not(self, name: str) -> str | None:
        return None if name == "cuda" else extension.why_not(name)

    def load(self, name: str) -> ModuleType:
        assert name == "cuda"
        return self._module
