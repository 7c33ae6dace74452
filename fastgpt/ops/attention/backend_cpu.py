"""Causal attention on the CPU: kernels/cpu/attention.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgpt.ops import cpu_support

if TYPE_CHECKING:
    from fastgpt.ops.attention import Case


def why_not(case: Case) -> str | None:
    """float32 and bfloat16 on the CPU."""
    return cpu_support.why_not(case.device, case.dtype) or "its kernel is being written"
