"""Builds the two compiled halves of fastgpt with ninja. Everything else is said in pyproject.toml.

    fastgpt._cpu    the bindings once, the CPU kernels once per instruction set (chosen at run time)
    fastgpt._cuda   when nvcc is found; FASTGPT_BUILD_CUDA=0 leaves it out, =1 fails without it, =auto (default) decides

FASTGPT_SANITIZE=address builds fastgpt._cpu with AddressSanitizer and UndefinedBehaviorSanitizer, for tools/sanitize.py
alone: Python loads such a build only with libasan before it. No wheel can be made of it.

Neither half links PyTorch, so that this works in pip's isolated build, for every torch, and without a GPU.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

CPU_BINDINGS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "csrc").glob("*.cpp")
    if path.name != "cpu_kernels.cpp" and not path.name.startswith("cuda_")
)
CUDA_BINDINGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("cuda_*.cpp"))
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*_cuda.cu"))

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# The build that finds overruns and undefined behaviour. A finding ends the process.
SANITIZE_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Contraction turns a * b + c into one FMA. No -ffast-math: NaN and infinity keep their meaning.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS |= {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_vnni": [*AVX512, "-mavx512vnni"],
        "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    }

CUDA_ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    # PTX for every other chip from Ampere on, compiled by the driver when first loaded.
    "-gencode=arch=compute_80,code=compute_80",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-Werror=all-warnings"]


def check_link() -> None:
    """Stop with one sentence where git checked the link out as a file (Windows without links)."""
    if not (ROOT / "fastgpt" / "kernels").is_dir():
        sys.exit(
            "fastgpt/kernels must be a link to ../kernels; enable links (git config core.symlinks true), "
            "then check the file out again."
        )


def compiles(compiler: list[str], flags: list[str]) -> bool:
    """True when the compiler accepts these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, str(source), "-o", str(Path(folder, "probe"))]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def find_cxx() -> list[str] | None:
    """The C++ compiler: CXX, else the first of g++, clang++, c++. None when there is none that takes our flags."""
    named = os.environ.get("CXX")
    for candidate in [shlex.split(named)] if named else [["g++"], ["clang++"], ["c++"]]:
        if compiles(candidate, ["-std=c++17", "-fPIC"]):
            return candidate
    return None


def find_nvcc() -> str | None:
    """nvcc from CUDA_HOME, CUDA_PATH or PATH."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (path := shutil.which("nvcc", path=str(Path(home, "bin")))):
            return path
    return shutil.which("nvcc")


class NinjaFile:
    """The lines of one build.ninja, written object by object."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.8", ""]

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc", ""] if depfile else [""]

    def build(self, output: str, rule: str, inputs: list[str], **variables: str) -> str:
        escaped = " ".join(path.replace(" ", "$ ").replace(":", "$:") for path in inputs)
        self.lines.append(f"build {output.replace(' ', '$ ')}: {rule} {escaped}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return output

    def run(self, verbose: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        program = Path(ninja.BIN_DIR, "ninja")
        command = [str(program), "-C", str(self.folder), *(["-v"] if verbose else [])]
        subprocess.run(command, check=True)


def sanitizers() -> list[str]:
    """The flags that FASTGPT_SANITIZE asks for."""
    wanted = os.environ.get("FASTGPT_SANITIZE", "")
    if wanted not in ("", "address"):
        sys.exit(f"FASTGPT_SANITIZE={wanted!r} is not known; use address, or leave it out.")
    if wanted and {"bdist_wheel", "editable_wheel", "install"} & set(sys.argv):
        sys.exit("FASTGPT_SANITIZE is for tools/sanitize.py; no wheel is made of such a build.")
    return SANITIZE_FLAGS if wanted else []


def quoted(flags: list[str]) -> str:
    return " ".join(shlex.quote(flag) for flag in flags)


class BuildExtensions(build_ext):
    """Writes one build.ninja per extension and lets ninja do the rest."""

    def build_extensions(self) -> None:
        if sys.platform == "win32":
            self.skip("the CPU kernels need GCC or Clang; on Windows fastgpt runs on PyTorch's own ops")
            return
        cxx = find_cxx()
        if cxx is None:
            self.skip("no C++17 compiler was found; fastgpt will run on PyTorch's own ops. Install g++ for speed")
            return
        for extension in self.extensions:
            self.build_cpu(cxx) if extension.name == "fastgpt._cpu" else self.build_cuda(cxx)

    def skip(self, reason: str) -> None:
        print(f"fastgpt: {reason}.", file=sys.stderr)
        self.extensions = []

    def target(self, name: str) -> Path:
        return Path(self.get_ext_fullpath(name)).resolve()

    def includes(self) -> list[str]:
        return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def build_cpu(self, cxx: list[str]) -> None:
        openmp = ["-fopenmp"] if compiles(cxx, ["-fopenmp"]) else []
        dynamic = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        sanitize = sanitizers()
        file = NinjaFile(Path(self.build_temp).resolve() / "cpu")
        file.rule("cxx", f"{quoted(cxx)} $flags -MMD -MF $out.d -c $in -o $out")
        file.rule("link", f"{quoted(cxx)} -shared $in -o $out {quoted(openmp + dynamic + sanitize)}", depfile=False)
        flags = quoted([*CXX_FLAGS, *openmp, *sanitize, *self.includes()])
        objects = [
            file.build(f"{Path(source).stem}.o", "cxx", [str(ROOT / source)], flags=flags) for source in CPU_BINDINGS
        ]
        kernels = str(ROOT / "csrc" / "cpu_kernels.cpp")
        for isa, isa_flags in ISA_FLAGS.items():
            flags = quoted([*CXX_FLAGS, *KERNEL_FLAGS, *openmp, *isa_flags, *sanitize, f"-DFASTGPT_ISA={isa}"])
            objects.append(file.build(f"cpu_kernels_{isa}.o", "cxx", [kernels], flags=flags))
        file.build(str(self.target("fastgpt._cpu")), "link", objects)
        self.target("fastgpt._cpu").parent.mkdir(parents=True, exist_ok=True)
        file.run(self.verbose > 1)

    def build_cuda(self, cxx: list[str]) -> None:
        wanted = os.environ.get("FASTGPT_BUILD_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            sys.exit(f"FASTGPT_BUILD_CUDA={wanted!r} is not known; use auto, 0 or 1.")
        nvcc = find_nvcc()
        if wanted == "0" or nvcc is None:
            if wanted == "1":
                sys.exit("FASTGPT_BUILD_CUDA=1, but nvcc is neither in CUDA_HOME nor in PATH.")
            return
        file = NinjaFile(Path(self.build_temp).resolve() / "cuda")
        host = f"-ccbin={shlex.quote(cxx[0])}"
        file.rule("cxx", f"{quoted(cxx)} $flags -MMD -MF $out.d -c $in -o $out")
        file.rule("nvcc", f"{shlex.quote(nvcc)} {host} $flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 "
                          f"|| (cat $out.log; exit 1)")  # fmt: skip
        file.rule("link", f"{shlex.quote(nvcc)} {host} -shared -cudart static $in -o $out", depfile=False)
        flags = quoted([*CXX_FLAGS, *self.includes()])
        objects = [
            file.build(f"{Path(source).stem}.o", "cxx", [str(ROOT / source)], flags=flags) for source in CUDA_BINDINGS
        ]
        objects += [
            file.build(f"{Path(source).stem}.o", "nvcc", [str(ROOT / source)],
                       flags=quoted([*NVCC_FLAGS, *CUDA_ARCHITECTURES]))
            for source in CUDA_SOURCES
        ]  # fmt: skip
        file.build(str(self.target("fastgpt._cuda")), "link", objects)
        self.target("fastgpt._cuda").parent.mkdir(parents=True, exist_ok=True)
        try:
            file.run(self.verbose > 1)
        except subprocess.CalledProcessError:
            if wanted == "1":
                raise
            print("fastgpt: nvcc was found but its build failed (see above); going on without CUDA C++. "
                  "FASTGPT_BUILD_CUDA=0 leaves the attempt out.", file=sys.stderr)  # fmt: skip

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        # What was not built has nothing to copy.
        self.extensions = [extension for extension in self.extensions if self.target_in_build(extension).exists()]
        super().copy_extensions_to_source()

    def target_in_build(self, extension: Extension) -> Path:
        return Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(extension.name)))


check_link()
setup(
    ext_modules=[
        Extension("fastgpt._cpu", sources=[*CPU_BINDINGS, "csrc/cpu_kernels.cpp"]),
        *([Extension("fastgpt._cuda", sources=[*CUDA_BINDINGS, *CUDA_SOURCES])] if CUDA_SOURCES else []),
    ],
    cmdclass={"build_ext": BuildExtensions},
)
