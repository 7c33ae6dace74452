"""How fastgpt judges a kernel: the error bound, and the skip that names its reason. For the tests and for users' own.

The bound: a kernel may be at most `factor` times as far from the truth as plain PyTorch in the same dtype is, where the
truth is computed in float64 (or float32 for 16-bit inputs), plus a floor for results that plain PyTorch gets exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

# One rounding of a number of size 1, and a little.
FLOORS = {torch.float64: 1e-15, torch.float32: 2.5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def assert_within_bound(
    got: Tensor, naive: Tensor, truth: Tensor, *, factor: float = FORWARD_FACTOR, floor: float | None = None
) -> None:
    """Fail unless max|got - truth| <= factor · max|naive - truth| + floor.

    Args:
        got: what the kernel gave.
        naive: plain PyTorch on the same input in the same dtype.
        truth: the same computation in a wider dtype.
        factor: 2 for outputs, 3 for gradients (FORWARD_FACTOR, GRADIENT_FACTOR).
        floor: absolute error that is always allowed; by default one rounding of the dtype at the size of the truth.

    Raises:
        AssertionError: with both errors, the worst index and its values; also for NaN where the truth has none.
    """
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, wanted {tuple(truth.shape)}"
    assert got.dtype == naive.dtype, f"dtype {got.dtype}, wanted {naive.dtype}"
    if got.numel() == 0:
        return
    wide = truth.double()
    if floor is None:
        floor = FLOORS[got.dtype] * max(1.0, wide.abs().max().item())
    got_error = (got.double() - wide).abs()
    bound = factor * (naive.double() - wide).abs().max().item() + floor
    worst = int(torch.nan_to_num(got_error, nan=torch.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
    error = got_error.flatten()[worst].item()
    assert error <= bound, (
        f"error {error:.3e} exceeds the bound {bound:.3e} (plain PyTorch errs by {(bound - floor) / factor:.3e}) "
        f"at {index}: got {got[index].item():.9g}, plain {naive[index].item():.9g}, truth {wide[index].item():.9g}"
    )
