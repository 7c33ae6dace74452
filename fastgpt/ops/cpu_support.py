"""What every CPU backend asks first."""

from __future__ import annotations

import torch

from fastgpt.ops import extension


def why_not(device: str, *dtypes: torch.dtype) -> str | None:
    """Why no CPU kernel can run tensors of this device and these dtypes, or None."""
    if device != "cpu":
        return f"the tensors are on {device}"
    for dtype in dtypes:
        if dtype not in extension.DTYPE_CODES:
            return f"the CPU kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return extension.why_not("cpu")
