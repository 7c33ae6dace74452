"""Every environment variable that fastgpt reads, in one place, each read when it is asked for.

| variable            | meaning                                                                          |
|---------------------|----------------------------------------------------------------------------------|
| FASTGPT_BACKEND     | backend for every op: auto (default), cuda, triton, cpu, torch, reference        |
| FASTGPT_NUM_THREADS | threads of the CPU kernels; without it torch.get_num_threads()                   |
| FASTGPT_ISA         | CPU kernels for: baseline, avx2, avx512, avx512_vnni, avx512_bf16                |
| FASTGPT_PRODUCTS    | engine of large products on the CPU: auto (default), own, torch, onednn          |
| FASTGPT_CUDA_PATH   | kernels of backend "cuda": auto (default: the GPU's best), sm_80 (any GPU's)     |
| FASTGPT_OFFLINE     | 1: never use the network                                                         |
| FASTGPT_BPE_DIR     | folder with GPT-2's encoder.json and vocab.bpe                                   |
| FASTGPT_TILES       | file that `fastgpt bench --tune` writes; else ~/.cache/fastgpt/tiles.json        |
| FASTGPT_LOG         | level of the "fastgpt" logger: debug, info, warning (default), error             |
| FASTGPT_REQUIRE     | tests: comma-separated backends whose tests must run, not skip                   |
| FASTGPT_TEST_DATA   | tests: folder of the third-party test data                                       |

FASTGPT_BUILD_CUDA (auto, 0, 1) and FASTGPT_SANITIZE (address) are read by setup.py alone. Where other programs keep
GPT-2's vocabulary is read from their own variables: TIKTOKEN_CACHE_DIR, DATA_GYM_CACHE_DIR, HF_HUB_CACHE, HF_HOME; the
user's cache from XDG_CACHE_HOME (products.json there remembers engines that a race chose); whether Triton interprets
its kernels from TRITON_INTERPRET, which must be set before they are imported.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

BACKENDS = ("auto", "cuda", "triton", "cpu", "torch", "reference")
CUDA_PATHS = ("auto", "sm_80")
ISAS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
PRODUCTS = ("auto", "own", "torch", "onednn")
LOG_LEVELS = ("debug", "info", "warning", "error")


def _choice(variable: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable, "").strip().lower() or default
    if value not in allowed:
        raise ValueError(f"{variable}={value!r} is not known; use one of: {', '.join(allowed)}.")
    return value


def _flag(variable: str) -> bool:
    value = os.environ.get(variable, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise ValueError(f"{variable}={value!r} is not a switch; use 1 or 0.")


def backend() -> str:
    """The backend that FASTGPT_BACKEND names, or "auto"."""
    return _choice("FASTGPT_BACKEND", BACKENDS, "auto")


def cuda_path() -> str:
    """Which kernels of backend "cuda" FASTGPT_CUDA_PATH allows: "auto" or "sm_80"."""
    return _choice("FASTGPT_CUDA_PATH", CUDA_PATHS, "auto")


def isa() -> str | None:
    """The instruction set that FASTGPT_ISA names, or None for the best that the processor has."""
    return _choice("FASTGPT_ISA", ("best", *ISAS), "best").replace("best", "") or None


def products() -> str:
    """The engine that FASTGPT_PRODUCTS names, or "auto"."""
    return _choice("FASTGPT_PRODUCTS", PRODUCTS, "auto")


def products_file() -> Path:
    """The file in the user's cache that remembers engines."""
    return _cache_file("products.json")


def num_threads() -> int | None:
    """The thread count that FASTGPT_NUM_THREADS names, or None."""
    value = os.environ.get("FASTGPT_NUM_THREADS", "").strip()
    if not value:
        return None
    if not value.isdecimal() or not 1 <= int(value) <= 1024:
        raise ValueError(f"FASTGPT_NUM_THREADS={value!r} must be a whole number from 1 to 1024.")
    return int(value)


def log_level() -> str:
    """The level that FASTGPT_LOG names, upper case as `logging` wants it."""
    return _choice("FASTGPT_LOG", LOG_LEVELS, "warning").upper()


def offline() -> bool:
    """True when FASTGPT_OFFLINE forbids the network."""
    return _flag("FASTGPT_OFFLINE")


def bpe_dir() -> Path | None:
    """The folder that FASTGPT_BPE_DIR names, or None."""
    value = os.environ.get("FASTGPT_BPE_DIR", "").strip()
    return Path(value).expanduser() if value else None


def tiles_file() -> Path:
    """The file of tile sizes that FASTGPT_TILES names, or the one in the user's cache."""
    value = os.environ.get("FASTGPT_TILES", "").strip()
    return Path(os.path.expanduser(value)) if value else _cache_file("tiles.json")


def _cache_file(name: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or os.path.join("~", ".cache")
    # Not Path.expanduser, which raises for a user without a home.
    return Path(os.path.expanduser(os.path.join(cache, "fastgpt", name)))


def tiktoken_cache_dirs() -> tuple[Path, ...]:
    """Folders in which tiktoken may have kept its downloads, the one it would use now first."""
    named = (os.environ.get(variable, "") for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"))
    return (*(Path(value) for value in named if value), Path(tempfile.gettempdir()) / "data-gym-cache")


def hugging_face_hub_dir() -> Path:
    """The folder in which huggingface_hub keeps its downloads."""
    home = os.environ.get("HF_HOME", "") or os.path.join("~", ".cache", "huggingface")
    # Not Path.expanduser, which raises for a user without a home.
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE", "") or os.path.join(home, "hub")))


def triton_interpret() -> bool:
    """True when TRITON_INTERPRET makes Triton run kernels in its interpreter, on the CPU."""
    return _flag("TRITON_INTERPRET")


def malloc_is_tuned() -> bool:
    """True when the user has set glibc's allocator by environment, which is then left alone."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    return any(name in os.environ for name in names) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def require() -> frozenset[str]:
    """Backends whose tests must not skip."""
    names = os.environ.get("FASTGPT_REQUIRE", "").replace(" ", "").lower()
    return frozenset(name for name in names.split(",") if name)


def test_data() -> Path | None:
    """The folder that FASTGPT_TEST_DATA names, or None."""
    value = os.environ.get("FASTGPT_TEST_DATA", "").strip()
    return Path(value).expanduser() if value else None
