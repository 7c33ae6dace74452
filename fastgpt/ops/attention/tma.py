"""TMA descriptors of queries, keys and values: from sm_90 on, one thread asks for a whole tile of a tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgpt import tuning
from fastgpt.ops import triton_support

# What the hardware asks of addresses and strides.
ALIGNMENT = 16
# The first Triton known to compile all three kernels with descriptors; 3.4, the first that has them, fails on one.
FIRST_TRITON = (3, 9)


def why_not(*tensors: Tensor) -> str | None:
    """Why these (batch, n_heads, length, head_dim) tensors cannot be read by descriptors, or None."""
    chip = triton_support.chip(tensors[0])
    if chip != "interpreter" and int(chip.removeprefix("sm_")) < 90:
        return f"{chip} has no TMA; sm_90 is the first that has"
    version = tuning.triton_version()
    if tuple(int(part) for part in version.split(".")[:2]) < FIRST_TRITON:
        return f"Triton {version} is not known to compile the kernels with descriptors; 3.9 is the first that is"
    for x in tensors:
        if x.numel() == 0:
            return "a descriptor needs elements"
        steps = [stride * x.itemsize for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
        # An expanded axis, of stride 0, is left to pointers.
        if x.data_ptr() % ALIGNMENT or any(step <= 0 or step % ALIGNMENT for step in steps):
            return f"address and strides must be multiples of {ALIGNMENT} bytes, and strides not 0"
    return None


def descriptor(x: Tensor, rows: int, block_d: int) -> Any:
    """The descriptor by which a kernel reads `rows` rows of one head at a time, zeros beyond the last and head_dim."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # An axis of one element is never stepped along, and its stride may be anything.
    strides = [stride if size > 1 else ALIGNMENT for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, block_d])
