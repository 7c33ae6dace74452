"""What every CUDA C++ backend asks first."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from fastgpt.ops import extension

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The device whose tensors the kernels take; the emulator of the tests takes the CPU's.
DEVICE = "cuda"

UNPROVEN = "no GPU has run this kernel's tests yet, so it must be asked for by name"


def why_not(device: str, *dtypes: torch.dtype) -> str | None:
    """Why no CUDA kernel can run tensors of this device and these dtypes, or None."""
    if device != DEVICE:
        return f"the tensors are on {device}"
    for dtype in dtypes:
        if dtype not in DTYPE_CODES:
            return f"the CUDA kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return extension.why_not("cuda") or chip()


def chip() -> str | None:
    """Why the kernels cannot run on one of the GPUs, or None: a choice holds for all GPUs of the process."""
    return next((reason for i in range(torch.cuda.device_count()) if (reason := chip_of(i)) is not None), None)


@functools.cache
def chip_of(index: int) -> str | None:
    """Why the kernels cannot run on this GPU, or None."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"the kernels need compute capability 8.0, GPU {index} has {major}.{minor}"


@functools.cache
def runs_sm90a(index: int) -> bool:
    """True when this GPU runs machine code of sm_90a: Hopper and no other chip."""
    return torch.cuda.get_device_capability(index) == (9, 0)


def load() -> ModuleType:
    """The compiled module, fastgpt._cuda."""
    return extension.load("cuda")


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Inside, launches go to the tensor's GPU."""
    return torch.cuda.device(tensor.device)


def stream() -> int:
    """The raw handle of the stream that PyTorch uses now."""
    return torch.cuda.current_stream().cuda_stream
