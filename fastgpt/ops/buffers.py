"""Memory for what the CPU backends write: `torch.empty`, and inside `memory.kept_memory` blocks that leave no holes.

PyTorch asks glibc for aligned memory, and glibc asks itself for 96 bytes more than it then keeps. So the hole that a
freed tensor leaves is too small for the next tensor of the same size: GPT-2 124M at 2 x 1024 tokens, whose peak in use
is 3,118 MB, grew to 3,700 MB, and with activations in bfloat16 to 3,750 instead of 2,720. Blocks of plain malloc fit.

Source: glibc's malloc/malloc.c, _int_memalign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt import memory
from fastgpt.ops.extension import load, why_not

# Bytes. Smaller holes are soon filled, and a block takes a few microseconds longer than torch.empty.
_BIG = 1 << 20


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised, contiguous tensor on the CPU. Raises MemoryError or RuntimeError where there is no room."""
    if memory.is_kept() and (size := math.prod(shape) * dtype.itemsize) >= _BIG and why_not("cpu") is None:
        storage = torch.frombuffer(load("cpu").Block(size), dtype=torch.uint8).untyped_storage()
        # By set_ it is no view, as a gradient should not be.
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # type: ignore[call-overload]
    return torch.empty(shape, dtype=dtype, device="cpu")


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype, any device; x itself where it has that dtype already."""
    if x.dtype is dtype or not x.is_cpu:
        return x.to(dtype)
    return empty(x.shape, dtype).copy_(x)
