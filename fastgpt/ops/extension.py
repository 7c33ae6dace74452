"""The compiled halves of fastgpt, `_cpu` and `_cuda`. Neither links PyTorch: tensors cross as pointers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from types import ModuleType

# torch comes first: it brings the OpenMP runtime, and the extension then shares its thread pool.
import torch

from fastgpt import env

# Set in a process forked off one that had the CPU kernels: the OpenMP runtime's threads do not survive a fork, and a
# region in the child would wait for them for ever.
_forked = threading.Event()

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


@functools.cache
def why_not(name: str) -> str | None:
    """Why `fastgpt._<name>` cannot be used ("cpu" or "cuda"), or None when it can."""
    full_name = f"fastgpt._{name}"
    if importlib.util.find_spec(full_name) is None:
        needed = "nvcc" if name == "cuda" else "a C++17 compiler (GCC or Clang)"
        return f"the {name} extension was not built: {needed} was not found when fastgpt was installed"
    try:
        module = importlib.import_module(full_name)
    except ImportError as error:
        return f"the {name} extension does not load: {error}"
    if name == "cpu" and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forked.set)
    if name == "cpu" and (isa := env.isa()) is not None:
        try:
            module.select_isa(isa)
        except ValueError as error:
            return f"FASTGPT_ISA={isa}: {error}"
    return None


@functools.cache
def load(name: str) -> ModuleType:
    """The compiled module. Raises ImportError with the reason of `why_not`."""
    reason = why_not(name)
    if reason is not None:
        raise ImportError(reason)
    return importlib.import_module(f"fastgpt._{name}")


@functools.cache
def _thread_override() -> int | None:
    return env.num_threads()


def num_threads() -> int:
    """Threads for one CPU kernel: FASTGPT_NUM_THREADS, else torch.get_num_threads() (at each call); 1 after a fork."""
    if _forked.is_set():
        return 1
    return _thread_override() or torch.get_num_threads()
