"""What every Triton backend asks first, and how it launches."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt import env
from fastgpt.ops import cuda_support

if TYPE_CHECKING:
    from fastgpt.tuning import RowTile

UNPROVEN = cuda_support.UNPROVEN
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Options of every launch. Triton 3.10 turns the fusion of multiply and add off by default.
OPTIONS = {"enable_fp_fusion": True}


def why_not(device: str, *dtypes: torch.dtype) -> str | None:
    """Why no Triton kernel can run tensors of this device and these dtypes, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'fastgpt[triton]'"
    if device == "cpu" and not interpreting():
        return "the tensors are on cpu, where Triton runs in its interpreter alone (TRITON_INTERPRET=1, for tests)"
    if device not in ("cpu", "cuda"):
        return f"the tensors are on {device}"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None if interpreting() else cuda_support.chip()


def interpreting() -> bool:
    """True when Triton's interpreter runs the kernels, on the CPU and slowly."""
    return env.triton_interpret()


def tf32_allowed() -> bool:
    """True when PyTorch's own float32 products may round their factors to TF32."""
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on: the older name raises once this one has been set.
    precision = getattr(matmul, "fp32_precision", "none")
    return bool(matmul.allow_tf32) if precision == "none" else precision == "tf32"


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """The guard under which kernels are launched: Triton takes the current device, not the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors the device of `x` has; 2 in the interpreter, to have more than one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def chip(x: Tensor) -> str:
    """The name under which tables list the device of `x`: "sm_90" and the like; "interpreter" on the CPU."""
    if not x.is_cuda:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


def row_tile(kernel: str, x: Tensor, n: int, dropout: bool = False) -> RowTile:
    """What the tables give a kernel on rows of n for tensors like `x`."""
    from fastgpt.kernels.triton.row_tables import choose

    return choose(kernel, chip(x), 8 * x.dtype.itemsize, next_power_of_2(max(n, 16)), dropout)
